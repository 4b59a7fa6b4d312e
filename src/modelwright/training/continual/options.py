"""How to train on a stream of tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from modelwright.errors import UserError
from modelwright.training.options import RunOptions

TUNINGS = ("full", "lora", "inc-lora", "o-lora")
Tuning = Literal["full", "lora", "inc-lora", "o-lora"]


@dataclass(frozen=True, kw_only=True)
class ContinualOptions(RunOptions):
    """Options of a stream. Lengths (``steps``, ``epochs``) are those of each task; defaults are the MIGU paper's.

    The learning rate is that of its full fine-tuning; with adapters the paper, O-LoRA's code and the command take 1e-3.

    Attributes:
        tuning: ``full``: all weights. ``lora``: one adapter for all tasks. ``inc-lora``: a new adapter for each task,
            the earlier ones merged. ``o-lora``: the same, and the new A kept orthogonal to the earlier ones (arXiv
            2310.14152).
        batch_size: Examples per device and forward pass.
        gradient_accumulation: Forward passes per step.
        max_tokens: Longest prompt; longer ones lose their middle.
        new_tokens: Tokens of an answer at most; by default as many as the longest label needs.
        eval_batch_size: Prompts at once when answers are written.
        lora_rank: r.
        lora_alpha: The update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: Dropout before A.
        lora_targets: Names as peft takes them; ``all-linear`` is every linear layer but the head.
        orthogonality: Weight of O-LoRA's penalty, the sum of ``|A_old A_new^T|``.
        replay: Share of each earlier task's rows that is trained on again beside the new task's.
        ewc: Weight of elastic weight consolidation (arXiv 1612.00796); 0 for none.
        ewc_samples: Examples of each task from which the Fisher information is estimated.
        mask_first_task: Whether gradient masks act during the first task too; in MIGU's official code they do not.
    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    warmup: float = 0.0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.01
    beta2: float = 0.999
    tuning: Tuning = "full"
    batch_size: int = 64
    gradient_accumulation: int = 1
    max_tokens: int = 512
    new_tokens: int | None = None
    eval_batch_size: int = 64
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_targets: str | tuple[str, ...] = "all-linear"
    orthogonality: float = 0.5
    replay: float = 0.0
    ewc: float = 0.0
    ewc_samples: int = 200
    mask_first_task: bool = False

    positive: ClassVar[tuple[str, ...]] = (
        *RunOptions.positive,
        *("batch_size", "gradient_accumulation", "max_tokens", "eval_batch_size", "lora_rank", "lora_alpha"),
        "ewc_samples",
    )
    not_negative: ClassVar[tuple[str, ...]] = (*RunOptions.not_negative, "orthogonality", "ewc")

    def check(self) -> None:
        """Raises :class:`UserError` for the first option that makes no sense."""
        super().check()
        if self.tuning not in TUNINGS:
            raise UserError(f"There is no tuning '{self.tuning}': choose one of {', '.join(TUNINGS)}.")
        if not 0 <= self.replay <= 1:
            raise UserError(f"replay is {self.replay}: it is a share of the earlier tasks' rows, between 0 and 1.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout}: give at least 0 and less than 1.")
        if self.new_tokens is not None and self.new_tokens < 1:
            raise UserError(f"new_tokens is {self.new_tokens}: an answer needs at least 1 token.")
        if self.max_tokens < 8:
            raise UserError(f"max_tokens is {self.max_tokens}: a prompt needs at least 8 tokens.")
        if self.ewc and self.tuning in ("inc-lora", "o-lora"):
            raise UserError(
                f"EWC holds on to weights that are trained again, and with {self.tuning} each task has new ones: use "
                f"full or lora."
            )

    def total_steps(self, rows: int, processes: int = 1) -> int:
        """Returns the number of optimizer steps of a task of so many rows."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, -(-round(self.epochs * rows) // (self.batch_size * self.gradient_accumulation * processes)))


def as_options(source: Any) -> ContinualOptions:
    """Picks the fields of :class:`ContinualOptions` from an object that has them, such as the verb."""
    names = [f.name for f in dataclasses.fields(ContinualOptions)]
    return ContinualOptions(**{name: getattr(source, name) for name in names if hasattr(source, name)})
