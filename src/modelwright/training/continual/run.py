"""What `modelwright train continual` does: a stream and a model in, a model folder with its matrix out."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright import catalog, provenance
from modelwright.errors import UserError, did_you_mean
from modelwright.files import atomic_path, check_output, content_hash, write_json
from modelwright.models.loading import (
    describe,
    find_folder,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    write_model,
)
from modelwright.options import make_part
from modelwright.progress import Progress, Silent
from modelwright.training.continual.examples import fit
from modelwright.training.continual.options import ContinualOptions
from modelwright.training.continual.similarity import task_overlap
from modelwright.training.continual.stream import ContinualBenchmark, has_state
from modelwright.training.continual.tasks import fingerprint, read_stream
from modelwright.training.resume import working_folder

#: Options that say how, not what.
_HOW = ("save_every", "save_minutes", "device", "eval_batch_size")


def train_stream_to_folder(
    tasks: str | Path,
    output: str | Path,
    options: ContinualOptions,
    *,
    model: str,
    methods: Sequence[str] = (),
    method_options: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    finish: Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Trains a model on a stream of tasks and writes its folder; the same call after a crash ends with the same result.

    Args:
        tasks: See :func:`~modelwright.training.continual.read_stream`.
        output: Folder for the model, its tokenizer, ``continual.json`` and ``training_log.jsonl``.
        options: The run's options.
        model: Checkpoint to train: a folder or a hub id.
        methods: Gradient masks by their names in the catalog, such as ``migu``; at most one.
        method_options: Their options, as ``threshold`` or ``migu.threshold``.
        tokenizer: Folder or hub id, if the model has none of its own.
        trust_remote_code: Whether code beside the model's weights may be executed.
        force: Whether to replace ``output``, and to discard an unfinished run with other options.
        progress: Shows what is being done.
        finish: Called with what goes into ``continual.json`` and with the folder, to add pages to it.

    Returns:
        The matrix and its numbers, counts, seconds and what the model is.

    Raises:
        UserError: Bad options or input.
        KeyboardInterrupt: Interrupted; a checkpoint was saved.
    """
    options.check()
    output, progress = Path(output), progress or Silent()
    leader = os.environ.get("RANK", "0") == "0"
    check_output(output, force)
    mask = make_mask(methods, method_options or {})
    benchmark = ContinualBenchmark(read_stream(tasks))
    _join_processes(options)
    source = find_folder(tokenizer if tokenizer is not None else model)
    words = load_tokenizer(source, trust_remote_code=trust_remote_code)
    network = load_model(model, device="cpu", trust_remote_code=trust_remote_code)
    dtype = network.dtype
    network = network.to(resolve_dtype("float32"))
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in _HOW}
    chosen = {"name": methods[0], **dataclasses.asdict(mask)} if mask is not None else None
    plan = {
        **settings,
        "tasks": fingerprint(benchmark.tasks),
        "model": content_hash(model) if Path(model).is_dir() else model,
        "tokenizer": content_hash(source) if Path(source).is_dir() else str(source),
        "with": chosen,
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }
    with working_folder(output, plan, force, leader, holds_work=has_state) as work:
        result = benchmark.run(network, words, options, mask=mask, folder=work, progress=progress)
        encoder, _ = fit(result.model, words, benchmark.tasks, options.max_tokens)
        document = {
            "task": "continual",
            **result.summary(),
            "matrix": result.matrix.to_dict(),
            "overlap": task_overlap(result.model, encoder, benchmark.tasks),
            "steps_by_task": result.steps,
            "seconds_by_task": result.seconds,
            "rows": {t.name: {"train": len(t.train), "test": len(t.test)} for t in benchmark.tasks},
            "model": {"name": model, **describe(result.model)},
            "with": chosen,
            "settings": settings,
            "software": provenance.versions(),
            "machine": provenance.machine(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }
        if leader:
            with atomic_path(output, force) as partial:
                write_model(result.model.to(dtype), words, partial)
                write_json(partial / "continual.json", document)
                lines = (json.dumps(row) for row in result.log)
                (partial / "training_log.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                if finish is not None:
                    finish(document, partial)
            shutil.rmtree(work, ignore_errors=True)
    shown = {k: document[k] for k in ("accuracy", "learning_accuracy", "forgetting", "backward_transfer")}
    return {"output": str(output), **shown, **result.summary(), "matrix": document["matrix"]}


def make_mask(methods: Sequence[str], options: Mapping[str, Any]) -> Any:
    """Makes the gradient mask of the named method; None without one.

    Raises:
        UserError: No such method or option, or more than one.
    """
    names = [part.strip() for name in methods for part in name.split(",") if part.strip()]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} both mask the gradients, so only one of them can be used at a time.")
    if not names:
        if options:
            raise UserError(f"{next(iter(options))} is an option of a method: name one with --with, such as migu.")
        return None
    name = names[0].lower().replace("_", "-")
    own = {}
    for key, value in options.items():
        head, dot, tail = key.partition(".")
        if dot and head.replace("_", "-") != name:
            raise UserError(f"There is no method '{head}' in this run: {did_you_mean(head, [name])}")
        own[tail if dot else key] = value
    return make_part(catalog.load("gradient_masks", name), name, own)


def _join_processes(options: ContinualOptions) -> None:
    """Forms the process group, if there is one to form, before anybody waits for anybody."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=resolve_device(options.device).type == "cpu", timeout=datetime.timedelta(days=7))
