"""How to train an encoder of pairs: the numbers of a run, apart from model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from transformers import TrainingArguments

from modelwright.errors import UserError
from modelwright.training.options import RunOptions


@dataclass
class ContrastiveTrainingArguments(TrainingArguments):
    """``TrainingArguments`` of :class:`~modelwright.training.contrastive.trainer.ContrastiveTrainer`.

    ``per_device_train_batch_size`` is what the loss sees of each process; with n processes the loss is over n times as
    many pairs. ``mini_batch_size`` of them are in the encoder at a time, in training and in evaluation, so
    ``per_device_eval_batch_size`` has no effect; nor may there be gradient accumulation, which would be another loss.
    ``dataloader_num_workers`` processes prepare the sub-batches.

    Attributes:
        mini_batch_size: Pairs in the encoder at a time (GradCache).
    """

    mini_batch_size: int = field(default=128, metadata={"help": "Pairs in the encoder at a time (GradCache)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mini_batch_size < 1:
            raise UserError(f"mini_batch_size must be at least 1, not {self.mini_batch_size}.")
        if self.gradient_accumulation_steps != 1:
            raise UserError(
                "Gradient accumulation does not enlarge a contrastive batch, for the loss couples its pairs: raise "
                "per_device_train_batch_size instead; mini_batch_size keeps the memory small."
            )
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            self.ddp_find_unused_parameters = False


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptions(RunOptions):
    """Options of a run of `modelwright train contrastive`.

    Attributes:
        batch_size: Pairs of a step, over all processes.
        mini_batch_size: Pairs in the encoder at a time, on each process.
        optimizer: ``adamw`` or ``adafactor`` (no momentum, sub-linear memory; beta1 and beta2 have no effect).
        objective: ``softmax`` (CLIP, InfoNCE), ``sigmoid`` (SigLIP), or what suits the model.
        directions: Of the softmax loss: ``both``, or ``one``, from query to key; ``auto`` is both for image-text (CLIP)
            and one for text-text (InfoNCE).
        block_size: Side of the loss's tiles; None chooses.
        freeze: ``image`` or ``text``: that tower is not trained (``image`` is LiT).
        scale: Fixes the multiplier of the cosines.
        pooling: Of an encoder of texts.
        max_tokens: Longest text.
        workers: Processes that read and prepare data.
    """

    learning_rate: float = 1e-4
    min_lr_ratio: float = 0.0
    beta2: float = 0.98
    batch_size: int = 1024
    mini_batch_size: int = 128
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    objective: Literal["auto", "softmax", "sigmoid"] = "auto"
    directions: Literal["auto", "both", "one"] = "auto"
    block_size: int | None = None
    freeze: Literal["none", "image", "text"] = "none"
    scale: float | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    max_tokens: int | None = None
    workers: int = 2

    positive: ClassVar[tuple[str, ...]] = (
        *(*RunOptions.positive, "batch_size", "mini_batch_size", "block_size", "scale"),
    )
    not_negative: ClassVar[tuple[str, ...]] = (*RunOptions.not_negative, "workers")

    def total_steps(self, steps_per_pass: int) -> int:
        """Returns the number of optimizer steps."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(round(self.epochs * steps_per_pass, 6)))
