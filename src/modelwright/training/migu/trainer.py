"""MIGU under ``transformers.Trainer`` and its kin."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from modelwright.training.gradient_mask import GradientMaskMixin
from modelwright.training.migu.config import MIGUConfig
from modelwright.training.migu.mask import MIGUMask


class MIGUTrainerMixin(GradientMaskMixin):
    """MIGU for any subclass of ``Trainer``: ``class Mine(MIGUTrainerMixin, OtherTrainer)``.

    Gradients are masked when those of all micro-batches and processes are in, before the Trainer clips them.

    Args:
        args: As for the trainer.
        migu: A mask on the model, which the caller keeps and removes; or options for a new one; or None for the
            defaults.
        keys: As for the trainer.

    Raises:
        UserError: See :class:`MIGUMask`; or DeepSpeed, FSDP or DataParallel is asked for.
    """

    def __init__(self, *args: Any, migu: MIGUMask | MIGUConfig | None = None, **keys: Any) -> None:
        super().__init__(*args, **keys)
        trainer: Any = self
        self.migu = migu if isinstance(migu, MIGUMask) else MIGUMask(trainer.model, migu)
        self.use_gradient_mask(self.migu)


class MIGUTrainer(MIGUTrainerMixin, Trainer):
    """``transformers.Trainer`` with MIGU; see :class:`MIGUTrainerMixin` for ``migu=``."""
