"""What is trained on a task: all weights, one adapter, an adapter for each task, or one orthogonal to the earlier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modelwright.errors import UserError, require
from modelwright.models.tiny import seeded
from modelwright.training.continual.options import ContinualOptions


class Adaptation:
    """Puts adapters on a model and takes them off, task by task.

    The adapters of earlier tasks are merged into the weights. For incremental LoRA and O-LoRA that is the same model
    as one that keeps all of them frozen beside each other, and costs the same for the hundredth task as for the first.

    Args:
        options: ``tuning`` and what belongs to it.
    """

    def __init__(self, options: ContinualOptions) -> None:
        self.options = options
        #: O-LoRA: layer to the A's of earlier tasks, (tasks * r, d_in).
        self.earlier: dict[str, torch.Tensor] = {}

    def begin(self, model: Any, task: int) -> Any:
        """Returns the model to train on a task: ``model`` itself, or peft's wrapper of it."""
        if self.options.tuning == "full" or (self.options.tuning == "lora" and _adapted(model)):
            return model
        require("peft", "training", "adapters")
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.options.lora_rank,
            lora_alpha=self.options.lora_alpha,
            lora_dropout=self.options.lora_dropout,
            target_modules=self.options.lora_targets
            if isinstance(self.options.lora_targets, str)
            else list(self.options.lora_targets),
        )
        with seeded(self.options.seed * 10_007 + task):
            try:
                return get_peft_model(model, config)
            except ValueError as error:
                raise UserError(f"LoRA cannot be put on this model: {' '.join(str(error).split())[:300]}") from error

    def end(self, model: Any, *, last: bool) -> Any:
        """Returns the model as the next task finds it, or, after the last, as an ordinary one."""
        if not _adapted(model):
            return model
        if self.options.tuning == "o-lora":
            for name, a in _downs(model):
                before = self.earlier.get(name)
                now = a.detach().clone()
                self.earlier[name] = now if before is None else torch.cat([before, now])
        if self.options.tuning == "lora" and not last:
            return model
        merged = model.merge_and_unload()
        # get_peft_model froze the base and left its config there, which would be found again.
        merged.requires_grad_(True)
        if hasattr(merged, "peft_config"):
            del merged.peft_config
        return merged

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """Returns O-LoRA's penalty, the sum over layers of ``|A_old A_new^T|`` (its equation 8); None without one."""
        if self.options.tuning != "o-lora" or not self.earlier or not self.options.orthogonality:
            return None
        parts = [(self.earlier[name].to(a) @ a.T).abs().sum() for name, a in _downs(model) if name in self.earlier]
        return self.options.orthogonality * torch.stack(parts).sum()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns tensors by name, for :meth:`load`."""
        return dict(self.earlier)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores :meth:`state`."""
        self.earlier = dict(tensors)


def _adapted(model: Any) -> bool:
    return hasattr(model, "merge_and_unload")


def _downs(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The A's of the adapter, by layer."""
    from peft.tuners.lora import LoraLayer

    return [
        (name, module.lora_A["default"].weight)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    ]
