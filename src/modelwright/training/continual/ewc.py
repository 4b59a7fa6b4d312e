"""Elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796): weights that mattered before are held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from modelwright.training.continual.examples import answer_loss


class ElasticWeights:
    """The penalty ``strength / 2 * sum_k sum_i F_ki (w_i - w*_ki)^2`` over the tasks k trained before.

    Its terms are quadratic in the same weights, so all tasks together need two tensors a weight, however many they are:
    the sum of the Fisher informations and the sum of Fisher information times weight.

    Args:
        strength: Lambda.
    """

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.precision: dict[str, torch.Tensor] = {}
        self.weighted: dict[str, torch.Tensor] = {}

    def add(self, model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Adds a task that was just trained.

        Args:
            model: The model; its gradients are discarded.
            batches: Batches of one example: the diagonal of the empirical Fisher information is the mean of squared
                gradients of single examples' log-likelihoods.
        """
        training = model.training
        model.eval()
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        squares = {name: torch.zeros_like(p) for name, p in weights.items()}
        count = 0
        for batch in batches:
            inputs = {k: v.to(next(iter(weights.values())).device) for k, v in batch.items()}
            labels = inputs.pop("labels")
            loss = answer_loss(model(**inputs), labels, 1)
            for (name, _), grad in zip(
                weights.items(), torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True
            ):
                if grad is not None:
                    squares[name] += grad.square()
            count += 1
        with torch.no_grad():
            for name, weight in weights.items():
                fisher = squares[name] / max(count, 1)
                self.precision[name] = self.precision.get(name, 0) + fisher
                self.weighted[name] = self.weighted.get(name, 0) + fisher * weight
        model.train(training)

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty but for a constant; a scalar."""
        total = torch.zeros((), device=next(model.parameters()).device)
        for name, weight in model.named_parameters():
            if name in self.precision:
                held = self.precision[name]
                centre = self.weighted[name] / held.clamp(min=torch.finfo(held.dtype).tiny)
                total = total + (held * (weight - centre).square()).sum()
        return self.strength / 2 * total

    def state(self) -> dict[str, torch.Tensor]:
        """Returns tensors by name, for :meth:`load`."""
        return {f"precision.{k}": v for k, v in self.precision.items()} | {
            f"weighted.{k}": v for k, v in self.weighted.items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Restores :meth:`state`."""
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            {"precision": self.precision, "weighted": self.weighted}[kind][name] = value.to(device)
