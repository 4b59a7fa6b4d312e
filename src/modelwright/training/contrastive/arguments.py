"""How to train an encoder of pairs: the numbers of a run, apart from model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from modelwright.errors import UserError


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
class ContrastiveOptions:
    """Options of a run of `modelwright train contrastive`.

    Attributes:
        steps: Optimizer steps; None if ``epochs`` says how long.
        epochs: Passes over the data.
        batch_size: Pairs of a step, over all processes.
        mini_batch_size: Pairs in the encoder at a time, on each process.
        learning_rate: Peak learning rate.
        schedule: Shape after the warm-up.
        warmup: Warm-up, linear from 0: steps if 1 or more, else the fraction of all steps.
        min_lr_ratio: Last learning rate over the peak, for ``cosine`` and ``linear``.
        optimizer: ``adamw`` or ``adafactor`` (no momentum, sub-linear memory; beta1 and beta2 have no effect).
        weight_decay: Decay of matrices (linear maps, convolutions, embeddings); norms, biases, scale and bias have
            none.
        beta1: Decay of the gradient's mean.
        beta2: Decay of the gradient's square.
        clip: Largest norm of the gradient; 0 for none.
        objective: ``softmax`` (CLIP, InfoNCE), ``sigmoid`` (SigLIP), or what suits the model.
        directions: Of the softmax loss: ``both``, or ``one``, from query to key; ``auto`` is both for image-text (CLIP)
            and one for text-text (InfoNCE).
        block_size: Side of the loss's tiles; None chooses.
        freeze: ``image`` or ``text``: that tower is not trained (``image`` is LiT).
        scale: Fixes the multiplier of the cosines.
        pooling: Of an encoder of texts.
        max_tokens: Longest text.
        gradient_checkpointing: Recompute activations within a sub-batch too.
        precision: ``auto`` is bfloat16 (autocast, weights in float32) where the accelerator has it, else float32.
        seed: Seed of the order of data, of dropout and of selection.
        workers: Processes that read and prepare data.
        log_every: Steps between rows of the log.
        eval_every: Steps between evaluations; 0 evaluates at the end only.
        save_every: Steps between checkpoints; 0 for none by steps.
        save_minutes: Minutes between checkpoints; 0 for none by time.
        device: ``auto``, ``cpu``, ``cuda`` …
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 1024
    mini_batch_size: int = 128
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    min_lr_ratio: float = 0.0
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    objective: Literal["auto", "softmax", "sigmoid"] = "auto"
    directions: Literal["auto", "both", "one"] = "auto"
    block_size: int | None = None
    freeze: Literal["none", "image", "text"] = "none"
    scale: float | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    max_tokens: int | None = None
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    workers: int = 2
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    save_minutes: float = 5.0
    device: str = "auto"

    def check(self) -> None:
        """Raises :class:`UserError` for the first option that makes no sense."""
        given = [n for n in ("steps", "epochs") if getattr(self, n) is not None]
        if len(given) != 1:
            raise UserError(f"Say how long to train by one of steps or epochs (given: {', '.join(given) or 'none'}).")
        for name in (*given, "batch_size", "mini_batch_size", "learning_rate", "log_every", "block_size", "scale"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be greater than 0, not {value}.")
        for name in ("warmup", "weight_decay", "clip", "eval_every", "save_every", "save_minutes", "seed", "workers"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be 0 or more and less than 1, not {getattr(self, name)}.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio must lie between 0 and 1, not {self.min_lr_ratio}.")

    def total_steps(self, steps_per_pass: int) -> int:
        """Returns the number of optimizer steps."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(round(self.epochs * steps_per_pass, 6)))

    def warmup_steps(self, total: int) -> int:
        """Returns the length of the warm-up in steps."""
        return round(self.warmup if self.warmup >= 1 else self.warmup * total)
