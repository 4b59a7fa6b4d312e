"""What `modelwright train contrastive` does: pairs and a model in, a model folder out, resumed where it was cut."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback

from modelwright.errors import UserError
from modelwright.files import atomic_path, check_output, content_hash, read_json, write_json
from modelwright.models.loading import describe, load_tokenizer, resolve_device
from modelwright.progress import Progress, Silent
from modelwright.training.contrastive.arguments import ContrastiveOptions, ContrastiveTrainingArguments
from modelwright.training.contrastive.batches import Order
from modelwright.training.contrastive.encoders import PairEncoder, load_pair_encoder, pair_encoder
from modelwright.training.contrastive.pairs import Pairs, read_pairs
from modelwright.training.contrastive.towers import tower_parameters
from modelwright.training.contrastive.trainer import ContrastiveTrainer, default_loss
from modelwright.training.resume import latest_checkpoint, working_folder
from modelwright.training.session import session, training_arguments
from modelwright.training.trainer import rate

#: What does not change the result, and may differ when a run is taken up again.
_HOW = ("save_every", "save_minutes", "device", "workers")


def train_pairs_to_folder(
    data: Sequence[str | Path],
    output: str | Path,
    options: ContrastiveOptions,
    *,
    model: str | None = None,
    architecture: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    eval_data: Sequence[str | Path] = (),
    fields: Mapping[str, Any] | None = None,
    select: str | None = None,
    select_options: Mapping[str, Any] | None = None,
    skip_bad: bool = False,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains an encoder of pairs and writes its folder; the same call after a crash finishes with the same result.

    Args:
        data: Sources of pairs, see :func:`~modelwright.training.contrastive.pairs.read_pairs`.
        output: Folder for the model, its processor and ``training_log.jsonl``.
        options: The run's options.
        model: Checkpoint to continue: a folder or a hub id; or
        architecture: ``clip`` or ``siglip``, to train from scratch.
        settings: Config fields for ``architecture``.
        tokenizer: Folder or hub id of the tokenizer for ``architecture``.
        eval_data: Sources of held-out pairs, for retrieval; all must be usable, whatever ``skip_bad`` says, and are
            looked at before training.
        fields: ``query_field``, ``key_field``, ``negative_field`` and ``base``, if they are not found by themselves.
        select: Method that chooses each batch from a larger one (``batch_selectors`` in the catalog).
        select_options: Its own options.
        skip_bad: Whether to look at every pair first and leave out those that cannot be used.
        trust_remote_code: Whether code beside the model's weights may be executed.
        force: Whether to replace ``output``, and to discard an unfinished run with other options.
        progress: Shows what is being done.

    Returns:
        Counts, speed, loss, retrieval and what the model is.

    Raises:
        UserError: Bad options or input, or another process of a distributed run has ended.
        KeyboardInterrupt: Interrupted; a checkpoint was saved.
    """
    options.check()
    output, progress, fields = Path(output), progress or Silent(), dict(fields or {})
    processes, leader = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    check_output(output, force)
    if options.eval_every and not eval_data:
        raise UserError("--eval-every says when to evaluate, but not on what: give --eval-data, or leave it out.")
    if (model is None) == (architecture is None):
        raise UserError("Give either --model (continue a checkpoint) or --architecture (train from scratch).")
    if model is not None and (settings or tokenizer):
        raise UserError("--set and --tokenizer make a new model: give them with --architecture, not with --model.")
    if select is None and select_options:
        raise UserError(
            f"{next(iter(select_options))} is an option of a selection: name one with --select, such as jest."
        )
    if options.batch_size % processes:
        raise UserError(
            f"The batch size is over all processes, and {options.batch_size} pairs cannot be shared evenly by "
            f"{processes}: choose a multiple of {processes}."
        )
    selection = make_selection(select, select_options or {}, options.seed) if select else None
    device = _join_processes(options, processes)
    encoder = _encoder(model, architecture, settings, tokenizer, options, trust_remote_code)
    _freeze(encoder, options.freeze)
    pairs = read_pairs(list(data), **fields, bad_texts="keep" if skip_bad else "refuse")
    heldout = read_pairs(list(eval_data), **fields) if eval_data else None
    # Evaluation may come only when training has ended, and then it would be too late to find a bad image.
    if heldout is not None and heldout.kind == "image-text" and (bad := heldout.check_images(progress)):
        raise UserError(f"{bad[0].name} {bad[0].reason}: mend or remove the pair.")
    plan = {
        **{k: v for k, v in dataclasses.asdict(options).items() if k not in _HOW},
        "data": pairs.fingerprint(),
        "eval_data": heldout.fingerprint() if heldout is not None else None,
        "model": _identity(model),
        "architecture": architecture,
        "set": dict(settings or {}),
        "tokenizer": _identity(tokenizer),
        "select": select,
        "select_options": {k: _identity(v) if isinstance(v, str) else v for k, v in (select_options or {}).items()},
        "skip_bad": skip_bad,
        "processes": processes,
    }
    with working_folder(output, plan, force, leader) as work:
        _meet(processes)
        skipped = 0
        if skip_bad:
            pairs, skipped = _without_bad(pairs, work, progress, leader, processes)
        trainer = train_pairs(
            encoder, pairs, options, device=device, heldout=heldout, selection=selection, folder=work, progress=progress
        )
        log = log_rows(trainer)
        summary = {
            **_summary(trainer, log),
            **{k: v for k, v in describe(encoder.model).items() if k != "parameters"},
            "kind": encoder.kind,
            "objective": encoder.objective,
            "data_pairs": len(pairs),
            "skipped": skipped,
            "processes": processes,
        }
        if leader:
            with atomic_path(output, force) as partial:
                partial.mkdir()
                encoder.save(partial)
                lines = (json.dumps(row) for row in log)
                (partial / "training_log.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            shutil.rmtree(work, ignore_errors=True)
    return {"output": str(output), **summary}


def train_pairs(
    encoder: PairEncoder,
    pairs: Any,
    options: ContrastiveOptions,
    *,
    device: torch.device | None = None,
    heldout: Any = None,
    selection: Any = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> ContrastiveTrainer:
    """Trains an encoder in place; leaves it in evaluation mode.

    Args:
        encoder: In float32.
        pairs: The data.
        options: The run's options; those that make the encoder (objective, scale, freeze …) have no effect here.
        device: Where to train; by default as the options say.
        heldout: Held-out pairs.
        selection: Chooses the batches.
        folder: Where checkpoints go and are resumed from; None keeps none.
        progress: Shows steps and loss.

    Returns:
        The trainer, with its log in ``state.log_history``; :func:`log_rows` makes rows of it.

    Raises:
        UserError: See :func:`train_pairs_to_folder`; or memory is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM (what the caller's handler raises); a checkpoint is in ``folder``.
    """
    options.check()
    progress = progress or Silent()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    device = device or resolve_device(options.device)
    size = selection.super_batch_size(options.batch_size) if selection is not None else options.batch_size
    steps = options.total_steps(Order(len(pairs), size, processes=processes).steps_per_pass)
    smaller = (
        f"at {options.mini_batch_size} pairs in the encoder: use a smaller mini_batch_size (the result is the same)"
    )
    with session(options, encoder.model, folder, progress, smaller=smaller, ask_every=1) as (work, companion):
        args = _arguments(options, work, steps, device, processes, heldout is not None, save=folder is not None)
        trainer = ContrastiveTrainer(
            encoder,
            args,
            train_dataset=pairs,
            eval_dataset=heldout,
            loss=default_loss(
                encoder,
                args.world_size,
                block_size=options.block_size,
                symmetric={"both": True, "one": False}.get(options.directions),
            ),
            selection=selection,
            rate=lambda step, total: rate(step, total, options),
            callbacks=[companion],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.resume(latest_checkpoint(work))
    encoder.eval()
    return trainer


def make_selection(name: str, options: Mapping[str, Any], seed: int) -> Any:
    """Makes a selection by its name in the catalog.

    Raises:
        UserError: No such selection or option, or a value of the wrong type.
    """
    from modelwright import catalog
    from modelwright.options import make_part

    cls = catalog.load("batch_selectors", name)
    if "seed" in {f.name for f in dataclasses.fields(cls)}:
        options = {"seed": seed, **options}
    return make_part(cls, name, options)


def _join_processes(options: ContrastiveOptions, processes: int) -> torch.device:
    """Forms the process group, if there is one to form, before anybody waits for anybody."""
    device = resolve_device(options.device)
    if processes > 1:
        from accelerate import PartialState

        # Waiting is not the fault that a time limit would make of it; a process that died is noticed by its heartbeat.
        PartialState(cpu=device.type == "cpu", timeout=datetime.timedelta(days=7))
    return device


def _meet(processes: int) -> None:
    if processes > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _encoder(
    model: str | None,
    architecture: str | None,
    settings: Mapping[str, Any] | None,
    tokenizer: str | Path | None,
    options: ContrastiveOptions,
    trust_remote_code: bool,
) -> PairEncoder:
    keys: dict[str, Any] = {
        "objective": options.objective,
        "pooling": options.pooling,
        "max_tokens": options.max_tokens,
        "scale": options.scale,
    }
    if model is not None:
        return load_pair_encoder(model, **keys, device="cpu", trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise UserError(
            "A new model needs --tokenizer: make one with `modelwright tokenizer`, or name an existing one."
        )
    from modelwright.models.new_pairs import new_pair_model

    words = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    return pair_encoder(*new_pair_model(str(architecture), settings, words, seed=options.seed), **keys)


def _freeze(encoder: PairEncoder, tower: str) -> None:
    if tower == "none":
        return
    if encoder.kind != "image-text":
        raise UserError(f"--freeze {tower} is for models of images and texts: this one has a single encoder of texts.")
    found = tower_parameters(encoder.model, tower)
    if not found:
        children = [name for name, _ in encoder.model.named_children()]
        raise UserError(f"The {tower} tower of {type(encoder.model).__name__} was not found among {children}.")
    for parameter in found:
        parameter.requires_grad_(False)


def _identity(name: Any) -> Any:
    """A hub id as it is, a folder by its content."""
    return content_hash(name) if name is not None and Path(name).is_dir() else name


def _without_bad(pairs: Pairs, work: Path, progress: Progress, leader: bool, processes: int) -> tuple[Pairs, int]:
    """Leaves out what cannot be used; one process looks, and only once."""
    path, names = work / "bad.json", work / "bad.txt"
    if leader and not path.exists():
        _, bad = pairs.without_bad(progress)
        names.write_text("".join(f"{b.name}: {b.reason}\n" for b in bad), encoding="utf-8")
        for b in bad[:5]:
            progress.message(f"Left out: {b.name} {b.reason}.")
        if len(bad) > 5:
            progress.message(f"Left out: {len(bad) - 5} more.")
        write_json(path, [b.index for b in bad])
    _meet(processes)
    indices = read_json(path)
    return pairs.select(np.setdiff1d(np.arange(len(pairs)), indices)) if indices else pairs, len(indices)


def _arguments(
    options: ContrastiveOptions,
    work: Path,
    steps: int,
    device: torch.device,
    processes: int,
    evaluate: bool,
    save: bool,
) -> ContrastiveTrainingArguments:
    more: dict[str, Any] = {"optim": "adafactor"} if options.optimizer == "adafactor" else {}
    return training_arguments(
        ContrastiveTrainingArguments,
        options,
        work,
        steps,
        device,
        evaluate=evaluate,
        save=save,
        per_device_train_batch_size=options.batch_size // processes,
        mini_batch_size=options.mini_batch_size,
        dataloader_num_workers=options.workers,
        ddp_timeout=7 * 24 * 3600,
        **more,
    )


_KEPT = ("step", "pairs", "loss", "learning_rate", "grad_norm", "scale", "bias", "pairs_per_second", "seconds")
_DROPPED = ("epoch", "total_flos", "train_loss", "train_runtime")


def log_rows(trainer: ContrastiveTrainer) -> list[dict[str, float]]:
    """Returns the log as rows by step: :data:`_KEPT`, what a selection noted, and ``eval_…`` of held-out pairs."""
    rows: list[dict[str, float]] = []
    for entry in trainer.state.log_history:
        if "loss" not in entry and not any(k.startswith("eval_") for k in entry):
            continue
        names = [k for k in _KEPT if k in entry]
        names += [k for k in entry if k not in (*_KEPT, *_DROPPED)]
        kept = {k: entry[k] for k in names}
        if rows and rows[-1]["step"] == kept["step"]:
            rows[-1] = {**kept, **rows[-1]}
        else:
            rows.append(kept)
    return rows


def _summary(trainer: ContrastiveTrainer, log: list[dict[str, float]]) -> dict[str, Any]:
    steps, seconds = trainer.state.global_step, round(trainer.clock.total, 4)
    pairs = steps * trainer.batch_size
    read = trainer.selection.super_batch_size(trainer.batch_size) if trainer.selection else trainer.batch_size
    last = next(row for row in reversed(log) if "loss" in row)
    evaluated = next((row for row in reversed(log) if any(k.startswith("eval_") for k in row)), {})
    return {
        "steps": steps,
        "pairs": pairs,
        "epochs": round(steps * read / len(trainer.train_dataset), 3),
        "parameters": sum(p.numel() for p in trainer.encoder.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.encoder.parameters() if p.requires_grad),
        "train_seconds": seconds,
        "pairs_per_second": round(pairs / seconds, 1) if seconds else 0.0,
        "final_loss": last["loss"],
        "scale": trainer.encoder.scale().item(),
        **({"bias": bias.item()} if (bias := trainer.encoder.bias()) is not None else {}),
        **{k: v for k, v in evaluated.items() if k.startswith("eval_")},
    }


def as_options(source: Any) -> ContrastiveOptions:
    """Picks the fields of :class:`ContrastiveOptions` from an object that has them, such as the verb."""
    return ContrastiveOptions(**{f.name: getattr(source, f.name) for f in dataclasses.fields(ContrastiveOptions)})
