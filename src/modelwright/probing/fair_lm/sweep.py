"""What `modelwright sweep weight-decay` does: the same training over lambdas and seeds, and the comparison."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelwright import provenance
from modelwright.data.records import Records
from modelwright.errors import UserError
from modelwright.files import atomic_path, check_output, content_hash, read_json, write_json
from modelwright.models.loading import (
    describe,
    find_folder,
    load_model,
    load_tokenizer,
    resolve_dtype,
    write_model,
)
from modelwright.models.new import check_source, new_config, new_model
from modelwright.probing.fair_lm.bins import frequency_bins
from modelwright.probing.fair_lm.chunks import ChunkedModel
from modelwright.probing.fair_lm.counts import TokenCounts, tokenizer_fingerprint
from modelwright.probing.fair_lm.decay import DecayOn, decay_groups
from modelwright.probing.fair_lm.sweep_compare import compare_lambdas
from modelwright.probing.fair_lm.sweep_run import SPLITS, count_blocks, diverged, pick_blocks, run_once
from modelwright.progress import Progress, Silent
from modelwright.training.options import TrainingOptions
from modelwright.training.packing import tokenize
from modelwright.training.resume import working_folder


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is swept, apart from how each run trains.

    Attributes:
        lambdas: Weight decays.
        seeds: Seeds of weights, order of data and dropout; each lambda is trained with every one.
        decay_on: Which parameters decay.
        intervals: K, between the K + 1 checkpoints that are measured.
        measure_tokens: Tokens of each split that are measured, at most.
        heldout_share: Share of the documents that is held out where there is no held-out text.
        base: Ratio of the edges of the frequency bins.
        keep_models: Whether to write each run's model.
    """

    lambdas: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    decay_on: DecayOn = "matrices"
    intervals: int = 8
    measure_tokens: int = 500_000
    heldout_share: float = 0.05
    base: int = 3
    keep_models: bool = False

    def check(self) -> None:
        """Raises :class:`UserError` for the first option that makes no sense."""
        if not self.lambdas or len(set(self.lambdas)) < len(self.lambdas):
            raise UserError("Give at least one weight decay (lambda), and none twice.")
        if bad := [value for value in self.lambdas if not (value >= 0 and math.isfinite(value))]:
            raise UserError(f"A weight decay must be 0 or more, not {bad[0]}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("Give at least one seed, and none twice.")
        if self.intervals < 1:
            raise UserError(f"Give at least 1 interval between checkpoints, not {self.intervals}.")
        if not 0 < self.heldout_share < 1:
            raise UserError(f"The held-out share must lie between 0 and 1, not {self.heldout_share}.")
        if self.measure_tokens < 1 or self.base < 2:
            raise UserError("Measure at least 1 token, in bins of a base of at least 2.")


def sweep_to_folder(
    data: Sequence[str | Path],
    output: str | Path,
    options: TrainingOptions,
    sweep: SweepOptions,
    *,
    model: str | None = None,
    architecture: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    eval_data: Sequence[str | Path] = (),
    text_field: str = "text",
    trust_remote_code: bool = False,
    force: bool = False,
    draw: Callable[[Mapping[str, Any], Path], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains every lambda with every seed and writes one folder; the same call after a crash finishes the rest.

    The folder holds ``result.json``, ``counts.parquet`` (of the training stream), for each run its ``.json`` and the
    last losses by type as Parquet, and what ``draw`` makes. Runs are done one after the other in this process.

    Args:
        data: Training documents.
        output: Folder to write.
        options: Of every run; its ``weight_decay`` and ``seed`` are replaced.
        sweep: What is swept.
        model: Checkpoint that every run continues, or
        architecture: architecture that every run trains from scratch.
        settings: Config fields for ``architecture``.
        tokenizer: Its folder or hub id; that of ``model`` by default.
        eval_data: Held-out documents; without, a share of the documents of ``data`` is held out.
        text_field: Field of the text.
        trust_remote_code: Whether code beside the model's weights may be executed.
        force: Whether to replace ``output``, and to discard an unfinished sweep with other options.
        draw: Called with the result and the folder to draw a page into.
        progress: Shows what is being done.

    Returns:
        The result: ``rows`` by lambda (see :func:`~modelwright.probing.fair_lm.sweep_compare.compare_lambdas`),
        ``settings``, ``runs`` and ``software``.

    Raises:
        UserError: Bad options or input, or every run diverged.
        KeyboardInterrupt: Interrupted; a checkpoint was saved.
    """
    options.check()
    sweep.check()
    output, progress = Path(output), progress or Silent()
    check_output(output, force)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("A sweep runs in one process: start it without torchrun, one sweep for each device.")
    check_source(model, architecture, settings, tokenizer)
    source = find_folder(tokenizer if tokenizer is not None else str(model))
    words = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = None if architecture is None else new_config(architecture, settings, words)

    def make(seed: int) -> Any:
        if config is not None:
            return new_model(config, seed)
        return load_model(str(model), device="cpu", trust_remote_code=trust_remote_code).to(resolve_dtype("float32"))

    first = make(sweep.seeds[0])
    about = describe(first)
    width = ChunkedModel(first).vocab_size
    decay_groups(first, 0.1, sweep.decay_on)  # refuses what it refuses before hours of other runs
    del first
    records, heldout = Records(list(data), text_field), Records(list(eval_data), text_field) if eval_data else None
    how = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("save_every", "save_minutes", "device")}
    plan = {
        **how,
        **dataclasses.asdict(sweep),
        "data": records.fingerprint(),
        "eval_data": None if heldout is None else heldout.fingerprint(),
        "model": content_hash(model) if model is not None and Path(model).is_dir() else model,
        "architecture": architecture,
        "set": dict(settings or {}),
        "tokenizer": content_hash(source),
    }
    # Lambdas and seeds may be added to an unfinished sweep: each run stands for itself.
    fixed = {name: value for name, value in plan.items() if name not in ("lambdas", "seeds", "weight_decay", "seed")}
    with working_folder(output, fixed, force, holds_work=_holds_work) as work:
        streams = _streams(records, heldout, sweep.heldout_share, words, work, options.block_size, progress)
        counts = TokenCounts(count_blocks(streams["train"], options.block_size, width), tokenizer_fingerprint(words))
        bins = frequency_bins(counts, sweep.base)
        splits = {s: pick_blocks(streams[s], options.block_size, sweep.measure_tokens) for s in SPLITS}
        runs = []
        for number, (value, seed) in enumerate(_pairs(sweep), 1):
            name = run_name(value, seed)
            progress.message(f"run {number} of {len(sweep.lambdas) * len(sweep.seeds)}: λ = {value:g}, seed {seed}")
            if not (work / "runs" / f"{name}.json").exists():
                mine = dataclasses.replace(options, weight_decay=value, seed=seed)
                _one(make(seed), words, streams["train"], splits, bins, mine, sweep, work, name, progress)
            runs.append(read_json(work / "runs" / f"{name}.json"))
        if all("diverged" in run for run in runs):
            raise UserError(f"Every run diverged ({runs[0]['diverged']})")
        result = {
            **compare_lambdas(runs),
            "settings": {
                **how, **dataclasses.asdict(sweep), **about, "lambdas": sorted(sweep.lambdas),
                "tokens": {s: len(streams[s]) for s in SPLITS}, "measured_blocks": {s: len(splits[s]) for s in SPLITS},
            },
            "runs": runs,
            "machine": provenance.machine(),
            "software": provenance.versions(),
        }  # fmt: skip
        del result["settings"]["weight_decay"], result["settings"]["seed"]
        with atomic_path(output, force) as partial:
            shutil.copytree(work / "runs", partial / "runs", ignore=_ignored(sweep))
            counts.save(partial / "counts.parquet", words)
            write_json(partial / "result.json", result)
            if draw is not None:
                draw(result, partial)
        del streams, splits
        shutil.rmtree(work, ignore_errors=True)
    return result


def run_name(value: float, seed: int) -> str:
    """Returns what a run's files are called."""
    return f"lambda-{value:g}-seed-{seed}"


def _pairs(sweep: SweepOptions) -> Iterator[tuple[float, int]]:
    # Seed after seed: what a sweep that is stopped halfway has, can be compared.
    return ((value, seed) for seed in sweep.seeds for value in sweep.lambdas)


def _ignored(sweep: SweepOptions) -> Callable[[str, list[str]], set[str]]:
    """Leaves out the runs of lambdas and seeds that an earlier, unfinished call had and this one has not."""
    wanted = {run_name(*pair) for pair in _pairs(sweep)}

    def ignored(folder: str, names: list[str]) -> set[str]:
        if Path(folder).name != "runs":
            return set()
        stem = {n: n.removesuffix(".json").removesuffix(".parquet").removesuffix(".train") for n in names}
        return {n for n in names if stem[n].removesuffix(".heldout").removesuffix(".model") not in wanted}

    return ignored


def _holds_work(folder: Path) -> bool:
    done = any(folder.glob("runs/*.json"))
    return done or any(folder.glob("unfinished/*/checkpoint-*/modelwright.json"))


def _one(
    network: Any,
    words: Any,
    tokens: np.ndarray,
    splits: Mapping[str, np.ndarray],
    bins: Any,
    options: TrainingOptions,
    sweep: SweepOptions,
    work: Path,
    name: str,
    progress: Progress,
) -> None:
    """Does a run that is not there yet; its ``.json`` is written last, so it is there whole or not at all."""
    place = work / "unfinished" / name
    place.mkdir(parents=True, exist_ok=True)
    dtype = network.dtype
    try:
        found, reports = run_once(
            network, tokens, splits, bins, options, decay_on=sweep.decay_on, intervals=sweep.intervals,
            folder=place, progress=progress,
        )  # fmt: skip
    except UserError as error:
        if not diverged(error):
            raise
        progress.message(f"{name}: {error}")
        found, reports = {"lambda": options.weight_decay, "seed": options.seed, "diverged": str(error)}, {}
    for split, report in reports.items():
        report.to_parquet(work / "runs" / f"{name}.{split}.parquet", force=True)
    if sweep.keep_models and reports:
        with atomic_path(work / "runs" / f"{name}.model", force=True) as partial:
            write_model(network.to(dtype), words, partial)
    write_json(work / "runs" / f"{name}.json", found)
    shutil.rmtree(place, ignore_errors=True)


def _streams(
    records: Records,
    heldout: Records | None,
    share: float,
    words: Any,
    work: Path,
    block_size: int,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Tokenises both splits into files, once."""
    about = work / "tokens.json"
    if not about.exists():
        every = max(2, round(1 / share))
        texts: dict[str, Any] = {"train": records.texts()}
        if heldout is not None:
            texts["heldout"] = heldout.texts()
        else:
            texts = {s: _every(records, every, s == "heldout") for s in SPLITS}
        dtypes = {s: str(tokenize(texts[s], words, work / f"{s}.bin", progress).tokens.dtype) for s in SPLITS}
        write_json(about, dtypes)
    dtypes = read_json(about)
    found: dict[str, np.ndarray] = {}
    for split in SPLITS:
        path = work / f"{split}.bin"
        size = path.stat().st_size // np.dtype(dtypes[split]).itemsize
        if size < block_size:
            where = "training" if split == "train" else "held-out"
            raise UserError(
                f"The {where} text has {size} tokens, less than one block of {block_size}: give more text, smaller "
                f"blocks{', or held-out text of its own with --eval-data' if split == 'heldout' else ''}."
            )
        found[split] = np.memmap(path, dtype=dtypes[split], mode="r")
    return found


def _every(records: Records, every: int, heldout: bool) -> Iterator[str]:
    return (r.text for r in records if (r.index % every == every - 1) == heldout)
