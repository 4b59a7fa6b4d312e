"""``transformers.Trainer`` for packed causal language models: exact resumption, our log, no idle work in a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback

from modelwright.training.options import Schedule, TrainingOptions
from modelwright.training.resume import ResumableTrainer


def rate(step: int, total: int, options: Schedule) -> float:
    """Returns the learning rate of a step (from 0) over the peak."""
    warmup = options.warmup_steps(total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if options.schedule == "cosine" else 1 - done
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * shape


class CausalTrainer(ResumableTrainer):
    """The loop. What is overridden here either makes resumption exact or spares work that no step needs.

    Args:
        evaluate_with: Called with the model; returns metrics for the log.
        options: The run's options.
        decay_groups: From the model to the optimizer's parameter groups; None makes the two that the arguments mean.
        keys: As for ``Trainer``.
    """

    def __init__(
        self,
        *,
        options: TrainingOptions,
        evaluate_with: Callable[[nn.Module], dict[str, float]] | None,
        decay_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(rate=lambda step, total: rate(step, total, options), **keys)
        self.options, self.evaluate_with, self.decay_groups = options, evaluate_with, decay_groups
        self._parameters: list[nn.Parameter] = []
        # All blocks have the same length, so a mean of means is exact, and counting labels in each step is not needed.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, with groups of our own if there are any."""
        if getattr(self, "optimizer", None) is None and self.decay_groups is not None:
            network = model if model is not None else self.model
            kind, keys = self.get_optimizer_cls_and_kwargs(self.args, network)
            self.optimizer: Any = kind(self.decay_groups(network), **keys)
            return self.optimizer
        return super().create_optimizer(*([] if model is None else [model]))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # PackedBlocks has the order of the blocks

    def _prepare_for_training(self, *args: Any, **keys: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **keys)
        self._parameters = [p for p in prepared[0].parameters() if p.requires_grad]
        return prepared

    def training_step(self, *args: Any, **keys: Any) -> torch.Tensor:
        """One forward and backward pass; keeps the loss for the log without waiting for it."""
        loss = self._plain_step(*args, **keys) if self._is_plain else super().training_step(*args, **keys)
        self._losses.append(loss)
        return loss

    @property
    def _is_plain(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.NO and self.accelerator.scaler is None

    def _plain_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # On one device this is all there is to do. The general step also walks over all modules and looks for an
        # installed package each time: 3% of a step of a small model.
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._is_plain:
            return super()._clip_grad_norm(model)
        return nn.utils.clip_grad_norm_(self._parameters, self.args.max_grad_norm)

    def progress_made(self) -> dict[str, float]:
        """Tokens."""
        blocks = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return {"tokens": self.state.global_step * blocks * self.options.block_size}

    def evaluate(self, *args: Any, **keys: Any) -> dict[str, float]:
        """Bits per byte of the held-out text."""
        assert self.evaluate_with is not None
        self.clock.stop()
        self.model.eval()
        metrics = self.evaluate_with(self.model)
        self.model.train()
        self.clock.start()
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
