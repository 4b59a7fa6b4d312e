"""LoRA and AdaLoRA as editors (arXiv 2410.16251, 2106.09685, 2303.10512)."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import nn

from modelwright.editing.deltas import LowRank
from modelwright.editing.edit import WeightEdit, check_editable
from modelwright.editing.editor import Editor, check_layer
from modelwright.editing.examples import make_examples, target_loss, trainable_only
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.requests import EditRequest, check_requests
from modelwright.errors import UserError, require
from modelwright.models.roles import Projection, roles, unwrap
from modelwright.options import Arg
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ADAPTER = "default"


@dataclass(kw_only=True)
class _Adapter(Editor):
    stronger: ClassVar[str] = "raise steps or rank, or change learning_rate (--set steps=200)"

    rank: Annotated[int, Arg("Rank of each adapter.")] = 8
    alpha: Annotated[float, Arg("The adapter's scale (LoRA divides it by the rank).")] = 32.0
    dropout: Annotated[float, Arg("Share of an adapter's inputs that is dropped in training.")] = 0.1
    learning_rate: Annotated[float, Arg("Adam's learning rate.")] = 5e-3
    steps: Annotated[int, Arg("Passes over the requests, all of which are made.")] = 70
    batch_size: Annotated[int, Arg("Requests a step.")] = 1
    layers: Annotated[tuple[int, ...], Arg("Layers with adapters; all by default.")] = ()
    seed: Annotated[int, Arg("Seed of the start and of dropout.")] = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.steps, self.batch_size) < 1:
            raise UserError("rank, steps and batch_size must be at least 1.")
        if not 0 <= self.dropout < 1 or not 0 < self.learning_rate < math.inf:
            raise UserError("dropout must be 0 or more and below 1, and learning_rate above 0.")

    @abstractmethod
    def _config(self, targets: list[str], total_steps: int) -> Any:
        """Returns peft's configuration of the adapters."""

    @abstractmethod
    def _factors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns an adapter's factors (out, rank) and (rank, in), scaled."""

    @abstractmethod
    def _left(self, layer: Any) -> torch.Tensor:
        """Returns the adapter's trained factor (out, rank)."""

    def _penalty(self, adapted: nn.Module) -> torch.Tensor | float:
        return 0.0

    def _after_step(self, tuner: Any, step: int) -> None:
        pass

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> WeightEdit:
        """See :meth:`Editor.fit`. The adapter is taken off again; its product is kept as factors.

        On families that fuse query, key and value (GPT-2, GPT-NeoX) the adapter is on the fused map, but what it adds
        to the key stays zero.

        ``details`` has each pass's mean loss.
        """
        require("peft", "training", "editing by adapters")
        from peft import get_peft_model

        check_requests(requests)
        progress = progress or Silent()
        inner: Any = unwrap(model)
        targets, rows = self._targets(model)
        batches = [
            make_examples(model, tokenizer, [(r.text, r.target) for r in requests[at : at + self.batch_size]])
            for at in range(0, len(requests), self.batch_size)
        ]
        losses: list[float] = []
        devices = [inner.device] if inner.device.type == "cuda" else []
        with (
            trainable_only(model),
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # peft asks transformers in ways that it warns of
            torch.manual_seed(self.seed)
            adapted = get_peft_model(inner, self._config(list(targets), self.steps * len(batches)))
            try:
                for name, module in adapted.named_modules():
                    module.training = "lora_dropout" in name
                parameters = [p for p in adapted.parameters() if p.requires_grad]
                for name in targets:
                    self._keep_out(inner.get_submodule(name), rows[name])
                optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
                step = 0
                for _ in range(self.steps):
                    total = 0.0
                    for examples in batches:
                        loss = target_loss(adapted(**examples.inputs).logits, examples)
                        optimizer.zero_grad()
                        (loss + self._penalty(adapted)).backward()
                        optimizer.step()
                        self._after_step(adapted.base_model, step)
                        total, step = total + float(loss.detach()), step + 1
                    losses.append(total / len(batches))
                deltas = {}
                for name, projection in targets.items():
                    u, v = self._factors(inner.get_submodule(name))
                    deltas[f"{name}.weight"] = LowRank(
                        u.detach().float().cpu(), v.detach().float().cpu(), projection.transposed
                    )
            finally:
                adapted.unload()
        progress.advance(len(requests), f"loss {losses[-1]:.3g}")
        return WeightEdit(self.name, model_fingerprint(model, whole=deltas), deltas, requests, {"losses": losses})

    def _targets(self, model: PreTrainedModel) -> tuple[dict[str, Projection], dict[str, torch.Tensor | None]]:
        """Returns the maps to adapt by name, and which of a fused one's outputs are the query's or the value's."""
        parts = roles(model)
        chosen = [check_layer(layer, len(parts.layers)) for layer in self.layers] or range(len(parts.layers))
        every = [p for i in chosen for p in (parts.layers[i].query, parts.layers[i].value) if p is not None]
        if not every:
            raise UserError(f"The layers of a '{parts.family}' model have no query or value projection to adapt.")
        found = {p.name: p for p in every}
        rows: dict[str, torch.Tensor | None] = {}
        for name in found:
            check_editable(model, f"{name}.weight")
            own = [p.rows for p in every if p.name == name and p.rows is not None]
            rows[name] = torch.cat(own) if own else None
        return found, rows

    @torch.no_grad()
    def _keep_out(self, layer: Any, rows: torch.Tensor | None) -> None:
        """Keeps an adapter's other outputs than these at zero, where there are others."""
        if rows is None:
            return
        left = self._left(layer)
        kept = torch.zeros(len(left), 1, dtype=left.dtype, device=left.device)
        kept[rows.to(left.device)] = 1.0
        left.mul_(kept)
        left.register_hook(lambda gradient: gradient * kept)


@dataclass(kw_only=True)
class LoRA(_Adapter):
    """LoRA: an update of low rank to the query and value projections of all layers."""

    name: ClassVar[str] = "lora"

    def _config(self, targets: list[str], total_steps: int) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM", r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets
        )

    def _factors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._left(layer) * layer.scaling[_ADAPTER], layer.lora_A[_ADAPTER].weight

    def _left(self, layer: Any) -> torch.Tensor:
        found: torch.Tensor = layer.lora_B[_ADAPTER].weight
        return found


@dataclass(kw_only=True)
class AdaLoRA(_Adapter):
    """AdaLoRA: the update as P Λ Q with P and Q kept near orthogonal. This is what the benchmark's tables call LoRA.

    The benchmark's code never calls the step that moves rank between layers, so by default there is none. With
    ``start_rank`` above ``rank`` peft prunes from the one to the other over the first two thirds of the steps.
    """

    name: ClassVar[str] = "adalora"

    start_rank: Annotated[int | None, Arg("Rank of each adapter before ranks are shared out; none: no pruning.")] = None
    orthogonality: Annotated[float, Arg("Weight of the term that keeps P and Q orthogonal.")] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_rank is not None and self.start_rank < self.rank:
            raise UserError(f"start_rank is {self.start_rank}: give at least the rank, {self.rank}.")

    def _config(self, targets: list[str], total_steps: int) -> Any:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=self.start_rank or self.rank, target_r=self.rank, lora_alpha=self.alpha,
            lora_dropout=self.dropout, target_modules=targets, total_step=total_steps, tinit=total_steps // 10,
            tfinal=total_steps // 3, deltaT=1, orth_reg_weight=self.orthogonality,
        )  # fmt: skip

    def _penalty(self, adapted: nn.Module) -> torch.Tensor | float:
        grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in _vectors(adapted)]
        norms = [(gram - torch.eye(len(gram), device=gram.device)).norm() for gram in grams]
        return self.orthogonality * torch.stack(norms).mean()

    def _after_step(self, tuner: Any, step: int) -> None:
        if self.start_rank is not None and self.start_rank > self.rank:
            tuner.update_and_allocate(step)

    def _factors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scale = layer.scaling[_ADAPTER] / (layer.ranknum[_ADAPTER] + 1e-5)
        return self._left(layer) * scale, layer.lora_A[_ADAPTER] * layer.lora_E[_ADAPTER]

    def _left(self, layer: Any) -> torch.Tensor:
        found: torch.Tensor = layer.lora_B[_ADAPTER]
        return found


def _vectors(adapted: nn.Module) -> list[torch.Tensor]:
    """Returns every adapter's P (out, rank) and Q (rank, in)."""
    return [p for n, p in adapted.named_parameters() if "lora_A" in n or "lora_B" in n]
