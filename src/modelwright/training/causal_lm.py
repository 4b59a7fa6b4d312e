"""Training a causal language model: a new one of a named architecture, or a checkpoint further."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from modelwright.errors import UserError
from modelwright.models.loading import resolve_device
from modelwright.models.scoring import bits_per_byte, context_length
from modelwright.progress import Progress, Silent
from modelwright.training.options import TrainingOptions
from modelwright.training.packing import PackedBlocks, as_batch
from modelwright.training.resume import latest_checkpoint
from modelwright.training.session import session, training_arguments
from modelwright.training.trainer import CausalTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class BlockStream(Protocol):
    """Where blocks come from, if not from one array: such as a mixture of sources."""

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of a pass."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    def largest(self) -> int:
        """Returns the largest token."""

    def take(self, length: int) -> torch.utils.data.Dataset[dict[str, torch.Tensor]]:
        """Returns the first ``length`` blocks as a dataset like :class:`~modelwright.training.packing.PackedBlocks`."""


@dataclass(frozen=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens trained on, passes over the same data counted each time.
        parameters: Parameters of the model.
        train_seconds: Wall time of the steps, without evaluating and saving; over all parts of a resumed run.
        final_loss: Mean training loss (nats a token) of the last row of the log.
        bits_per_byte: Of the held-out text at the end; None without one.
        log: Rows with step, tokens, loss, learning_rate, seconds, eval_bits_per_byte.
    """

    steps: int
    tokens: int
    parameters: int
    train_seconds: float
    final_loss: float
    bits_per_byte: float | None
    log: list[dict[str, float]]

    def summary(self) -> dict[str, Any]:
        """Returns the result of the verb, without the log."""
        found = {k: v for k, v in vars(self).items() if k not in ("log", "bits_per_byte")}
        found["tokens_per_second"] = round(self.tokens / self.train_seconds, 1) if self.train_seconds else 0.0
        if self.bits_per_byte is not None:
            found["eval_bits_per_byte"] = self.bits_per_byte
        return found


def train(
    model: PreTrainedModel,
    tokens: np.ndarray | BlockStream,
    options: TrainingOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    heldout: Sequence[str] = (),
    folder: Path | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    decay_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
) -> TrainingResult:
    """Trains ``model`` in place on packed blocks, with AdamW; leaves it in evaluation mode.

    Args:
        model: Any causal language model, in float32.
        tokens: (tokens,) integers, as :func:`~modelwright.training.packing.tokenize` gives them, or a stream of blocks
            of ``options.block_size``.
        options: The run's options.
        tokenizer: Needed for ``heldout``.
        heldout: Documents to evaluate on.
        folder: Where checkpoints go and are resumed from; None keeps none.
        progress: Shows steps and loss.
        callbacks: Of the ``Trainer``, beside our own.
        decay_groups: From the model to the optimizer's parameter groups, each with its ``weight_decay``; None decays as
            the options say.

    Raises:
        UserError: The options do not fit each other, the data or the model; the loss is not finite; memory is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM (what the caller's handler of the signal raises); a checkpoint is in
            ``folder``.
    """
    options.check()
    _check_model(model, _largest(tokens), options)
    progress = progress or Silent()
    smaller = (
        f"at batches of {options.batch_size} x {options.block_size} tokens: use a smaller batch_size with more "
        f"gradient_accumulation"
    )
    with session(options, model, folder, progress, smaller=smaller) as (work, companion):
        size = len(tokens) if isinstance(tokens, np.ndarray) else tokens.tokens_per_epoch
        args = _arguments(options, work, size, bool(heldout), save=folder is not None)
        total = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        trainer = CausalTrainer(
            options=options,
            evaluate_with=_evaluator(tokenizer, heldout, options) if heldout else None,
            model=model,
            args=args,
            train_dataset=(
                PackedBlocks(tokens, options.block_size, total, options.seed)
                if isinstance(tokens, np.ndarray)
                else tokens.take(total)
            ),
            eval_dataset=list(heldout) or None,
            data_collator=as_batch,
            callbacks=[companion, *callbacks],
            decay_groups=decay_groups,
        )
        trainer.resume(latest_checkpoint(work))
    model.eval()
    return _result(trainer, model)


def _largest(tokens: np.ndarray | BlockStream) -> int:
    return int(tokens[: 1 << 24].max(initial=0)) if isinstance(tokens, np.ndarray) else tokens.largest()


def _check_model(model: PreTrainedModel, top: int, options: TrainingOptions) -> None:
    longest = context_length(model)
    if longest is not None and options.block_size > longest:
        raise UserError(f"Blocks of {options.block_size} tokens do not fit the model, which takes at most {longest}.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if top >= vocabulary:
        raise UserError(
            f"The data hold token {top}, but the model knows only {vocabulary}: the tokenizer is another model's."
        )
    if model.dtype != torch.float32:
        raise UserError(f"The model is in {model.dtype}: load it in float32; small updates are lost in fewer bits.")


def _arguments(options: TrainingOptions, work: Path, tokens: int, evaluate: bool, save: bool) -> TrainingArguments:
    device = resolve_device(options.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = training_arguments(
        TrainingArguments,
        options,
        work,
        options.total_steps(tokens, processes),
        device,
        evaluate=evaluate,
        save=save,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        torch_compile=options.compile,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    # Several visible GPUs without torchrun would mean DataParallel, which is slow and changes the batch size.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _evaluator(tokenizer: PreTrainedTokenizerBase | None, heldout: Sequence[str], options: TrainingOptions) -> Any:
    if tokenizer is None:
        raise UserError("Held-out text is given, but no tokenizer to read it with.")

    def evaluate(model: Any) -> dict[str, float]:
        return {
            "eval_bits_per_byte": bits_per_byte(
                model, tokenizer, heldout, window=options.block_size, batch_size=4 * options.batch_size
            )
        }

    return evaluate


def _result(trainer: CausalTrainer, model: PreTrainedModel) -> TrainingResult:
    rows: list[dict[str, float]] = []
    for entry in trainer.state.log_history:
        kept = {
            k: entry[k]
            for k in ("step", "tokens", "loss", "learning_rate", "grad_norm", "seconds", "eval_bits_per_byte")
            if k in entry
        }
        if "loss" in kept or "eval_bits_per_byte" in kept:
            if rows and rows[-1]["step"] == kept["step"]:
                rows[-1] = {**kept, **rows[-1]}
            else:
                rows.append(kept)
    return TrainingResult(
        steps=trainer.state.global_step,
        tokens=int(rows[-1]["tokens"]),
        parameters=sum(p.numel() for p in model.parameters()),
        train_seconds=round(trainer.clock.total, 4),
        final_loss=next(r["loss"] for r in reversed(rows) if "loss" in r),
        bits_per_byte=next((r["eval_bits_per_byte"] for r in reversed(rows) if "eval_bits_per_byte" in r), None),
        log=rows,
    )


def as_options(source: Any) -> TrainingOptions:
    """Picks the fields of :class:`TrainingOptions` from an object that has them, such as the verb."""
    return TrainingOptions(**{f.name: getattr(source, f.name) for f in dataclasses.fields(TrainingOptions)})
