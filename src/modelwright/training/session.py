"""What every kind of training does around its trainer: a folder, signals, full memory, and the common arguments."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import TrainingArguments

from modelwright.errors import UserError
from modelwright.models.loading import quiet
from modelwright.progress import Progress
from modelwright.training.options import RunOptions
from modelwright.training.resume import Companion

_Arguments = TypeVar("_Arguments", bound=TrainingArguments)


class Session(NamedTuple):
    """What a run works with.

    Attributes:
        work: Where checkpoints go and are resumed from.
        companion: The callback that shows progress, saves by the clock, and stops the run gently.
    """

    work: Path
    companion: Companion


@contextlib.contextmanager
def session(
    options: RunOptions, model: Any, folder: Path | None, progress: Progress, *, smaller: str, ask_every: int = 10
) -> Iterator[Session]:
    """Runs the block as one run of training.

    Args:
        options: The run's options.
        model: The transformers model whose activations may be checkpointed.
        folder: Where checkpoints go; None keeps none.
        progress: Where to show steps.
        smaller: What to say when memory is full: at which sizes, and what to make smaller.
        ask_every: As for :class:`~modelwright.training.resume.Companion`.

    Raises:
        UserError: Memory is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM (what the caller's handler of the signal raises); a checkpoint is in
            ``folder``.
    """
    with contextlib.ExitStack() as stack:
        work = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelwright-training-")))
        stack.enter_context(quiet())
        companion = stack.enter_context(
            Companion(progress, options.save_minutes, can_save=folder is not None, ask_every=ask_every)
        )
        if options.gradient_checkpointing:
            stack.enter_context(checkpointing(model))
        try:
            yield Session(work, companion)
        except torch.OutOfMemoryError as error:
            raise UserError(f"Memory is full {smaller}, or gradient_checkpointing.") from error
    if companion.signal is not None:
        signal.raise_signal(companion.signal)  # the caller's handler is in place again
        raise KeyboardInterrupt


def training_arguments(
    kind: type[_Arguments],
    options: RunOptions,
    work: Path,
    steps: int,
    device: torch.device,
    *,
    evaluate: bool,
    save: bool,
    **more: Any,
) -> _Arguments:
    """Returns ``TrainingArguments`` with what the options say.

    Args:
        kind: Which class of arguments.
        options: The run's options.
        work: Where checkpoints go.
        steps: Optimizer steps.
        device: Where to train.
        evaluate: Whether there is something to evaluate on.
        save: Whether to keep checkpoints.
        more: Further arguments.
    """
    bf16 = options.precision == "bfloat16"
    if options.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    common: dict[str, Any] = {
        "output_dir": str(work),
        "max_steps": steps,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "adam_beta1": options.beta1,
        "adam_beta2": options.beta2,
        "max_grad_norm": options.clip,
        "optim": "adamw_torch_fused" if device.type in ("cpu", "cuda") else "adamw_torch",
        "seed": options.seed,
        "bf16": bf16,
        "use_cpu": device.type == "cpu",
        "logging_strategy": "steps",
        "logging_steps": options.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": options.eval_every or steps,
        "save_strategy": "steps" if save and options.save_every else "no",
        "save_steps": options.save_every or steps,
        "save_total_limit": 2,  # the one before stays until the newest is whole
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return kind(**(common | more))


@contextlib.contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Recomputes activations in the backward pass while the block runs."""
    # Not by TrainingArguments: later versions have another name for it, there and here.
    new = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)({"use_reentrant": False})
    try:
        yield
    finally:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()
