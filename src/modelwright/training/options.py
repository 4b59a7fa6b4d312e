"""How to train: the numbers of a run, apart from model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from modelwright.errors import UserError


class Schedule(Protocol):
    """Options that shape the learning rate."""

    @property
    def schedule(self) -> Literal["cosine", "linear", "constant"]:
        """Shape after the warm-up."""

    @property
    def min_lr_ratio(self) -> float:
        """Last learning rate over the peak."""

    def warmup_steps(self, total: int) -> int:
        """Returns the length of the warm-up in steps."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every kind of training has.

    Attributes:
        steps: Optimizer steps; None if another option says how long.
        epochs: Passes over the data.
        learning_rate: Peak learning rate.
        schedule: Shape after the warm-up.
        warmup: Warm-up, linear from 0: steps if 1 or more, else the fraction of all steps.
        min_lr_ratio: Last learning rate over the peak, for ``cosine`` and ``linear``.
        weight_decay: Decay of matrices (linear maps, convolutions, embeddings); norms, biases and scalars have none.
        beta1: Decay of the gradient's mean.
        beta2: Decay of the gradient's square.
        clip: Largest norm of the gradient; 0 for none.
        seed: Seed of the order of data, of dropout and, from scratch, of the weights.
        precision: ``auto`` is bfloat16 (autocast, weights in float32) where the accelerator has it, else float32.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        log_every: Steps between rows of the log.
        eval_every: Steps between evaluations on held-out data; 0 evaluates at the end only.
        save_every: Steps between checkpoints; 0 for none by steps.
        save_minutes: Minutes between checkpoints; 0 for none by time.
        device: ``auto``, ``cpu``, ``cuda`` …
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    save_minutes: float = 5.0
    device: str = "auto"

    #: Options that say how long, of which one must be given; those that must be positive; and those not below 0.
    lengths: ClassVar[tuple[str, ...]] = ("steps", "epochs")
    positive: ClassVar[tuple[str, ...]] = ("learning_rate", "log_every")
    not_negative: ClassVar[tuple[str, ...]] = (
        *("warmup", "weight_decay", "clip", "eval_every", "save_every", "save_minutes", "seed"),
    )

    def check(self) -> None:
        """Raises :class:`UserError` for the first option that makes no sense."""
        given = [name for name in self.lengths if getattr(self, name) is not None]
        if len(given) != 1:
            names = f"{', '.join(self.lengths[:-1])} or {self.lengths[-1]}"
            raise UserError(f"Say how long to train by one of {names} (given: {', '.join(given) or 'none'}).")
        for name in (*given, *self.positive):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be greater than 0, not {value}.")
        for name in self.not_negative:
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be 0 or more and less than 1, not {getattr(self, name)}.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio must lie between 0 and 1, not {self.min_lr_ratio}.")

    def warmup_steps(self, total: int) -> int:
        """Returns the length of the warm-up in steps."""
        return round(self.warmup if self.warmup >= 1 else self.warmup * total)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RunOptions):
    """Options of a run of AdamW on packed blocks.

    Attributes:
        tokens: Tokens to train on; the last step is completed.
        batch_size: Blocks per device and forward pass.
        block_size: Tokens per block.
        gradient_accumulation: Forward passes per step.
        compile: Compile the model with ``torch.compile``.
    """

    tokens: int | None = None
    batch_size: int = 8
    block_size: int = 512
    gradient_accumulation: int = 1
    compile: bool = False

    lengths: ClassVar[tuple[str, ...]] = ("steps", "epochs", "tokens")
    positive: ClassVar[tuple[str, ...]] = (*RunOptions.positive, "batch_size", "gradient_accumulation")

    def check(self) -> None:
        """Raises :class:`UserError` for the first option that makes no sense."""
        super().check()
        if self.block_size < 2:
            raise UserError(f"block_size must be at least 2, not {self.block_size}.")

    def total_steps(self, tokens: int, processes: int = 1) -> int:
        """Returns the number of optimizer steps for a stream of ``tokens`` tokens."""
        if self.steps is not None:
            return self.steps
        blocks_a_step = self.batch_size * self.gradient_accumulation * processes
        if self.tokens is not None:
            blocks = -(-self.tokens // self.block_size)
        else:
            assert self.epochs is not None
            blocks = max(1, round(self.epochs * (tokens // self.block_size)))
        return max(1, -(-blocks // blocks_a_step))
