"""Gradients that are masked between the backward pass and clipping: what such a mask is, and a ``Trainer`` for it.

A method's card names its masks under ``[provides.gradient_masks]``: a dataclass of options with
``on(model) -> GradientMask``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

from modelwright.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


class GradientMask(Protocol):
    """A mask that watches a model and is applied once in each optimizer step.

    Attributes:
        active: Whether it masks at all.
        step: Number of the optimizer step, from 0; decides draws.
    """

    active: bool
    step: int

    def apply(self) -> None:
        """Masks the gradients of a whole step, after the backward pass of its last micro-batch and before clipping."""

    def after_step(self) -> None:
        """Called after the optimizer's step."""

    def remove(self) -> None:
        """Takes all hooks off the model."""


class _AfterStep(TrainerCallback):
    def __init__(self, mask: GradientMask) -> None:
        self.mask = mask

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
        self.mask.after_step()


class GradientMaskMixin:
    """For a ``Trainer``: applies :attr:`gradient_mask` when the gradients of a step are whole, before they are clipped.

    ``TrainerCallback.on_pre_optimizer_step`` would come after clipping, and clip by the norm of what is then masked.
    """

    gradient_mask: GradientMask | None = None

    def use_gradient_mask(self, mask: GradientMask | None) -> None:
        """Sets the mask; call it once, after ``Trainer.__init__``.

        Raises:
            UserError: Gradients are sharded, or cannot be reached before the step.
        """
        self.gradient_mask = mask
        if mask is None:
            return
        trainer: Any = self
        if getattr(trainer, "is_deepspeed_enabled", False):
            raise UserError(
                "DeepSpeed takes its optimizer's step inside the backward pass and may shard gradients, so they cannot "
                "be masked: train with DDP instead (torchrun without a DeepSpeed config)."
            )
        if getattr(trainer, "is_fsdp_enabled", False):
            raise UserError(
                "FSDP shards weights and gradients over the processes, so whole output rows cannot be masked: train "
                "with DDP instead (torchrun without FSDP)."
            )
        if trainer.args.n_gpu > 1:
            raise UserError(
                "Several GPUs in one process (DataParallel) run copies of the model whose outputs are not seen: start "
                "one process a GPU with torchrun, or make one GPU visible."
            )
        trainer.add_callback(_AfterStep(mask))

    def training_step(self, model: nn.Module, *args: Any, **keys: Any) -> torch.Tensor:
        """As ``Trainer``'s; masks when the step's gradients are whole."""
        loss: torch.Tensor = super().training_step(model, *args, **keys)  # type: ignore[misc]
        trainer: Any = self
        if self.gradient_mask is not None and trainer.accelerator.sync_gradients:
            self.gradient_mask.step = trainer.state.global_step  # the same after a resumption
            self.gradient_mask.apply()
        return loss
