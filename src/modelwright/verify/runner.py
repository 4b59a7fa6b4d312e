"""Runs a claim over its seeds in worker processes, survives being killed, and judges the bars."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.catalog import Card
from modelwright.errors import UserError
from modelwright.files import read_json
from modelwright.progress import Progress
from modelwright.provenance import machine, versions
from modelwright.verify.claim import Bar, Claim, Scale
from modelwright.verify.results import FORMAT
from modelwright.verify.statistics import Sample
from modelwright.verify.worker import Job, work

NOT_ENOUGH_SEEDS = "not enough seeds"
#: Confidence of the one-sided lower bound that a bar is judged by.
CONFIDENCE = 0.95


def load_claim(card: Card) -> Claim:
    """Imports the claim of a method.

    Raises:
        UserError: The method has none.
    """
    if not card.has_claim:
        raise UserError(f"{card.name} has no claim to verify: its folder holds no claim.py.")
    return importlib.import_module(f"{card.package}.claim").CLAIM


def check_claim(claim: Claim) -> None:
    """Checks that a claim can be judged: its bars name what it declares.

    Raises:
        ValueError: A defect of the claim.
    """
    if not claim.bars:
        raise ValueError(f"{claim.method}: a claim needs at least one bar.")
    for bar in claim.bars:
        for variant in (bar.method, bar.baseline):
            if variant not in claim.variants:
                raise ValueError(f"{claim.method}: the bar '{bar.statement}' names '{variant}', not a variant.")
        if bar.metric not in claim.metrics or claim.metrics[bar.metric].better is None:
            raise ValueError(f"{claim.method}: the bar '{bar.statement}' needs a metric with a better direction.")


def run_claim(
    claim: Claim,
    scale: Scale,
    seeds: Sequence[int] | None,
    workers: int | None,
    progress: Progress,
    *,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Runs a claim and returns its result document (see :mod:`modelwright.verify.results`).

    The preparation runs once, then every seed in a process of its own, with one thread each unless the scale is
    ``gpu``. Finished jobs are kept in a working folder until all are done: a killed run continues there, as long as
    neither the code nor a library version has changed.

    Args:
        claim: The claim. ``prepare`` and ``run`` must be functions of an importable module.
        scale: One of the scales for which the claim names seeds.
        seeds: Seeds; None takes the claim's own.
        workers: Processes at once; None takes one per usable core, or one on a GPU.
        progress: Where to show progress.
        cache: Parent of the working folder; None takes the user's cache folder.

    Returns:
        A JSON-able dict.

    Raises:
        UserError: No such scale, no GPU for ``gpu``, the same claim is being verified by another process, or the
            claim's own code raised it.
        RuntimeError: The claim's code failed; the message holds its traceback.
    """
    check_claim(claim)
    if scale not in claim.seeds:
        raise UserError(f"The claim of {claim.method} has no scale '{scale}': it has {', '.join(claim.seeds)}.")
    seeds = list(dict.fromkeys(claim.seeds[scale] if seeds is None else seeds))
    if not seeds:
        raise UserError("At least one seed is needed.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}: it must be at least 1.")
    workers = workers or (1 if scale == "gpu" else _cores())
    device = _device(scale)
    pickled = pickle.dumps(claim)
    started = time.perf_counter()
    with _working_folder(claim, scale, cache) as folder:
        prepared: dict[str, Any] = {}
        spent: list[dict[str, Any]] = []

        def job(name: str, seed: int | None) -> Job:
            return Job(name=name, seed=seed, scale=scale, device=device, prepared=prepared, folder=folder)

        if claim.prepare is not None:
            preparation = job("prepare", None)
            _run_jobs(pickled, [preparation], 1, f"{claim.method}: prepare", progress)
            spent.append(read_json(preparation.result))
            prepared = spent[0]["value"]
        jobs = [job(f"seed-{seed}", seed) for seed in seeds]
        _run_jobs(pickled, jobs, workers, f"{claim.method}: seeds", progress)
        outcomes = [read_json(j.result) for j in jobs]
        spent += outcomes
        document: dict[str, Any] = {
            "format": FORMAT,
            "method": claim.method,
            "statement": claim.statement,
            "paper": claim.paper,
            "notes": claim.notes,
            "scale": scale,
            "seeds": seeds,
            "claim_seeds": list(claim.seeds[scale]),
            "metrics": {
                key: {"name": m.name, "unit": m.unit, "better": m.better, "digits": m.digits}
                for key, m in claim.metrics.items()
            },
            "variants": dict(claim.variants),
            "prepared": prepared,
            "measurements": {str(s): o["value"] for s, o in zip(seeds, outcomes)},
            "seed_seconds": {str(s): o["seconds"] for s, o in zip(seeds, outcomes)},
        }
        document["summary"] = summarise(document)
        document["bars"] = [judge(bar, claim, document["measurements"]) for bar in claim.bars]
        document["verdict"] = verdict(document["bars"])
        document |= {
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(sum(o["cpu_seconds"] for o in spent), 1),
            "workers": workers,
            "device": device,
            "versions": versions(),
            "machine": machine(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }
        _forget(folder)
    return document


def summarise(document: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns variant to metric to mean, sd, n, diverged, and the method's paired ratio and gain over that variant.

    The ratio is method / variant and the gain is positive where the method is better, both per seed and then averaged.
    """
    measured: Mapping[str, Any] = document["measurements"]
    method = next(iter(document["variants"]))
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in document["variants"]:
        summary[variant] = {}
        for key, metric in document["metrics"].items():
            present = [s[variant][key] for s in measured.values() if key in s[variant]]
            if not present:
                continue
            values = [v for v in present if v is not None]
            entry: dict[str, Any] = {"mean": None, "sd": None, "n": len(values), "diverged": len(present) - len(values)}
            if values:
                sample = Sample.of(values)
                entry |= {"mean": sample.mean, "sd": sample.sd}
            pairs = _pairs(measured, method, variant, key)
            if variant != method and pairs:
                if all(b for _, b in pairs):
                    ratio = Sample.of([m / b for m, b in pairs])
                    entry["ratio"] = {"mean": ratio.mean, "sd": ratio.sd}
                if metric["better"]:
                    gain = Sample.of([m - b if metric["better"] == "higher" else b - m for m, b in pairs])
                    entry["gain"] = {"mean": gain.mean, "sd": gain.sd}
            summary[variant][key] = entry
    return summary


def _pairs(measured: Mapping[str, Any], method: str, baseline: str, key: str) -> list[tuple[float, float]]:
    pairs = [(seed[method].get(key), seed[baseline].get(key)) for seed in measured.values()]
    return [(m, b) for m, b in pairs if m is not None and b is not None]


def judge(bar: Bar, claim: Claim, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Judges one bar: met when the lower confidence bound of the mean paired gain is at least the margin.

    A seed on which either side diverged or was not measured leaves the bar unmet: dropping it would flatter the
    survivor.
    """
    better = claim.metrics[bar.metric].better
    pairs = _pairs(measured, bar.method, bar.baseline, bar.metric)
    gains = [m - b if better == "higher" else b - m for m, b in pairs]
    result: dict[str, Any] = {
        "statement": bar.statement,
        "method": bar.method,
        "baseline": bar.baseline,
        "metric": bar.metric,
        "margin": float(bar.margin),
        "confidence": CONFIDENCE,
        "gains": gains,
        "gain": None,
        "sd": None,
        "lower_bound": None,
        "missing_seeds": len(measured) - len(pairs),
        "met": None if len(measured) < 2 else False,
    }
    if gains:
        sample = Sample.of(gains)
        bound = sample.lower_bound(CONFIDENCE)
        result |= {"gain": sample.mean, "sd": sample.sd, "lower_bound": bound}
        if bound is not None and len(pairs) == len(measured):
            result["met"] = bool(bound >= bar.margin)
    return result


def verdict(bars: Sequence[Mapping[str, Any]]) -> str:
    """Returns the verdict in the words that tables use."""
    met = [bar["met"] for bar in bars]
    if None in met:
        return NOT_ENOUGH_SEEDS
    if all(met):
        return "holds"
    return "holds in part" if any(met) else "does not hold at this scale"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _device(scale: Scale) -> str:
    if scale != "gpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UserError("--scale gpu needs a CUDA GPU, and torch sees none here: use --scale cpu.")
    return "cuda"


def _fingerprint(claim: Claim, scale: Scale) -> str:
    """Hashes what a kept seed depends on: the code of this package and of the claim's, and the versions."""
    digest = hashlib.sha256(json.dumps([claim.method, scale, versions()]).encode())
    # The claim's own folder is named apart: its top package may be without __init__.py, and then has no __file__.
    files = set(Path(importlib.import_module(claim.run.__module__).__file__ or "").parent.glob("*.py"))
    for package in {__name__.partition(".")[0], claim.run.__module__.partition(".")[0]}:
        file = Path(importlib.import_module(package).__file__ or "")
        files |= set(file.parent.rglob("*.py")) if file.name == "__init__.py" else {file}
    for file in sorted(f for f in files if f.is_file()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Returns this user's folder for unfinished work, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelwright" / "verify"


@contextlib.contextmanager
def _working_folder(claim: Claim, scale: Scale, cache: Path | None) -> Iterator[Path]:
    from filelock import FileLock, Timeout

    parent = (cache or cache_folder()) / f"{claim.method}.{scale}"
    parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parent / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"The claim of {claim.method} at scale {scale} is being verified by another process: wait for it."
        ) from None
    try:
        folder = parent / _fingerprint(claim, scale)
        for other in parent.iterdir():
            if other.is_dir() and other != folder:
                _forget(other)  # of older code: its seeds can no longer be used
        folder.mkdir(exist_ok=True)
        for scratch in folder.glob("*.scratch"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield folder
    finally:
        lock.release()


def _forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _run_jobs(pickled: bytes, jobs: Sequence[Job], workers: int, label: str, progress: Progress) -> None:
    """Runs the jobs that have no result yet, at most ``workers`` at once, and stops all of them on any exception."""
    import multiprocessing
    from multiprocessing.connection import Connection, wait

    context = multiprocessing.get_context("spawn")
    waiting = [job for job in jobs if not job.result.exists()]
    progress.start(label, len(jobs))
    if kept := len(jobs) - len(waiting):
        progress.advance(kept, "kept from the run before")
    running: dict[Any, tuple[Job, Any]] = {}
    # Noted before they start: Ctrl-C may come at any moment, and Python waits for them at its end.
    started: list[Any] = []
    pipes: list[Connection] = []
    try:
        while waiting or running or pipes:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                job.error.unlink(missing_ok=True)
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(pickled, job, writer), name=job.name)
                started.append(process)
                process.start()
                writer.close()
                running[process.sentinel] = (job, process)
                pipes.append(reader)
            for ready in sorted(wait([*running, *pipes]), key=lambda r: r in running):  # messages before endings
                if isinstance(ready, Connection):
                    try:
                        progress.message(str(ready.recv()))
                    except EOFError:
                        pipes.remove(ready)
                    continue
                job, process = running.pop(ready)
                process.join()
                started.remove(process)  # it would keep a file open
                if not job.result.exists():
                    _raise_failure(job, process.exitcode)
                progress.advance(1, job.name.replace("-", " "))
    finally:
        left = [process for process in started if process.pid is not None and process.is_alive()]
        for process in left:
            process.terminate()
        for process in left:
            process.join(5)
            if process.is_alive():
                process.kill()


def _raise_failure(job: Job, exitcode: int | None) -> None:
    reason = job.error.read_text(encoding="utf-8") if job.error.exists() else f"its process ended with {exitcode}"
    if exitcode == 2 and job.error.exists():
        raise UserError(reason)
    raise RuntimeError(f"The claim failed at {job.name.replace('-', ' ')}: {reason}")
