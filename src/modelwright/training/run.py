"""What `modelwright train` does: data and model in, a model folder out, resumed where it was cut short."""

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

from modelwright import provenance
from modelwright.data.records import Records
from modelwright.errors import UserError
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
from modelwright.models.new import check_source, new_config, new_model
from modelwright.progress import Progress, Silent
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.packing import TokenStream, tokenize
from modelwright.training.resume import working_folder


def train_to_folder(
    data: Sequence[str | Path],
    output: str | Path,
    options: TrainingOptions,
    *,
    model: str | None = None,
    architecture: str | None = None,
    settings: Mapping[str, Any] | None = None,
    attention: str | None = None,
    tokenizer: str | Path | None = None,
    eval_data: Sequence[str | Path] = (),
    text_field: str = "text",
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a model and writes its folder; the same call after a crash finishes with the same result.

    Args:
        data: Training documents: anything that :class:`~modelwright.data.records.Records` reads.
        output: Folder for config, safetensors, tokenizer and ``training_log.jsonl``.
        options: The run's options.
        model: Checkpoint to continue, or
        architecture: architecture to train from scratch.
        settings: Config fields for ``architecture``.
        attention: An attention of the catalog with its options, such as ``rope-alibi`` or ``prflash: {law: uniform}``,
            which the written checkpoint keeps; the model's own by default.
        tokenizer: Its folder or hub id; that of ``model`` by default.
        eval_data: Held-out documents.
        text_field: Field of the text.
        trust_remote_code: Whether code beside the model's weights may be executed.
        force: Whether to replace ``output``, and to discard an unfinished run with other options.
        progress: Shows what is being done.

    Returns:
        Counts, speed, loss and what the model is.

    Raises:
        UserError: Bad options or input.
        KeyboardInterrupt: Interrupted; a checkpoint was saved.
    """
    options.check()
    output, progress = Path(output), progress or Silent()
    leader = os.environ.get("RANK", "0") == "0"
    check_output(output, force)
    if options.eval_every and not eval_data:
        raise UserError("--eval-every says when to evaluate, but not on what: give --eval-data, or leave it out.")
    check_source(model, architecture, settings, tokenizer)
    source = find_folder(tokenizer if tokenizer is not None else str(model))
    words = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if architecture is not None:
        config = new_config(architecture, settings, words)
        _check_size(config, options)
        network = new_model(config, options.seed)
        dtype = network.dtype
    else:
        network = load_model(str(model), device="cpu", trust_remote_code=trust_remote_code)
        dtype = network.dtype
        network = network.to(resolve_dtype("float32"))
    if attention is not None:
        from modelwright.attention.implementation import read_attention

        read_attention(attention).install(network)
    records = Records(list(data), text_field)
    heldout = list(Records(list(eval_data), text_field).texts()) if eval_data else []
    plan = {
        **{k: v for k, v in dataclasses.asdict(options).items() if k not in ("save_every", "save_minutes", "device")},
        "data": records.fingerprint(),
        "eval_data": [len(heldout), sum(map(len, heldout))],
        "model": _identity(model),
        "architecture": architecture,
        "set": dict(settings or {}),
        "attention": attention,
        "tokenizer": _identity(str(source)),
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }
    with working_folder(output, plan, force, leader) as work:
        stream = _tokens(records, words, work, progress, leader)
        result = train(
            network, stream.tokens, options, tokenizer=words, heldout=heldout, folder=work, progress=progress
        )
        summary = {
            **result.summary(),
            **describe(network),
            "documents": stream.documents,
            "bytes": stream.bytes,
            "data_tokens": len(stream.tokens),
            "epochs": round(result.tokens / len(stream.tokens), 3),
        }
        if leader:
            with atomic_path(output, force) as partial:
                write_model(network.to(dtype), words, partial)
                lines = (json.dumps(row) for row in result.log)
                (partial / "training_log.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            del stream
            shutil.rmtree(work, ignore_errors=True)
    return {"output": str(output), **summary}


def _check_size(config: Any, options: TrainingOptions) -> None:
    """Refuses, before memory is filled, a model that cannot be trained here; a forgotten --set means 7 billion."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    needed = 16 * parameters / 2**30  # weights, gradients and AdamW's two moments, in float32
    there = provenance.machine().get("memory_gib")
    device = resolve_device(options.device)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1] / 2**30
    if there is not None and needed > there and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError(
            f"A {config.model_type} model with these settings has {parameters:,} parameters: training it needs "
            f"{needed:.0f} GiB and there are {there:.0f}. Make it smaller, such as --set hidden_size=256 "
            f"--set num_hidden_layers=6."
        )


def _identity(name: str | None) -> str | None:
    """A hub id as it is, a folder by its content."""
    return content_hash(name) if name is not None and Path(name).is_dir() else name


def _tokens(records: Records, words: Any, work: Path, progress: Progress, leader: bool) -> TokenStream:
    """Tokenises into the working folder, once; the other processes of a distributed run wait for the first."""
    counts, path = work / "tokens.json", work / "tokens.bin"
    if leader and not counts.exists():
        stream = tokenize(records.texts(), words, path, progress)
        write_json(counts, {"documents": stream.documents, "bytes": stream.bytes, "dtype": str(stream.tokens.dtype)})
    _wait_for_leader()
    found = json.loads(counts.read_text(encoding="utf-8"))
    return TokenStream(np.memmap(path, dtype=found["dtype"], mode="r"), found["documents"], found["bytes"])


def _wait_for_leader() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        # Long enough for the first to tokenise a large corpus; the usual patience is ten minutes.
        PartialState(timeout=datetime.timedelta(days=7)).wait_for_everyone()
