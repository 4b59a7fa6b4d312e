"""One job of a claim (its preparation, or one seed) in a process of its own.

A fresh process for every job makes a seed's result independent of what ran before it, so that parallel, serial and
resumed runs agree; it also gives back all memory, and can be stopped at any moment.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.errors import UserError
from modelwright.files import write_json
from modelwright.verify.claim import Claim, Scale

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker does.

    Attributes:
        name: ``prepare`` or ``seed-3``; also the stem of its files.
        seed: Seed, or None for the preparation.
        scale: Scale.
        device: Torch device.
        prepared: What the preparation returned.
        folder: Where ``NAME.json`` (or ``NAME.error``) and the scratch folder go.
    """

    name: str
    seed: int | None
    scale: Scale
    device: str
    prepared: dict[str, Any]
    folder: Path

    @property
    def result(self) -> Path:
        """The file that exists only once the job is done."""
        return self.folder / f"{self.name}.json"

    @property
    def error(self) -> Path:
        """The file that says why it failed."""
        return self.folder / f"{self.name}.error"


@dataclass
class WorkerContext:
    """Implements :class:`modelwright.verify.claim.Context`."""

    scale: Scale
    device: str
    folder: Path
    name: str
    messages: Any

    def report(self, message: str) -> None:
        """Shows a line of progress."""
        self.messages.send(f"{self.name}: {message}")


def _die_with_parent() -> None:
    # Without this, workers of a killed `verify` would go on for minutes.
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(pickled_claim: bytes, job: Job, messages: Any) -> None:
    """Runs one job and writes its result file atomically. Meant for a spawned process.

    The claim comes pickled a second time because unpickling imports the method's code, and the number of threads must
    be set before torch or a BLAS is loaded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and stops its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if job.scale != "gpu":
        os.environ.update(dict.fromkeys(_THREADS, "1"))
    scratch = Path(tempfile.mkdtemp(prefix=f"{job.name}.", suffix=".scratch", dir=job.folder))
    try:
        claim: Claim = pickle.loads(pickled_claim)
        torch = sys.modules.get("torch")
        if torch is not None and job.scale != "gpu":
            torch.set_num_threads(1)
        context = WorkerContext(job.scale, job.device, scratch, job.name.replace("-", " "), messages)
        before, started = os.times(), time.perf_counter()
        if job.seed is None:
            assert claim.prepare is not None
            value = dict(claim.prepare(context))
        else:
            value = {variant: dict(metrics) for variant, metrics in claim.run(context, job.seed, job.prepared).items()}
            check_measurements(claim, value)
            value = {v: {m: _finite(x) for m, x in metrics.items()} for v, metrics in value.items()}
        after = os.times()
        write_json(
            job.result,
            {
                "value": value,
                "seconds": round(time.perf_counter() - started, 3),
                "cpu_seconds": round(sum(after[:4]) - sum(before[:4]), 3),
            },
        )
    except UserError as error:
        job.error.write_text(str(error), encoding="utf-8")
        raise SystemExit(2) from None
    except BaseException:
        job.error.write_text(traceback.format_exc(), encoding="utf-8")
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_measurements(claim: Claim, value: dict[str, dict[str, Any]]) -> None:
    """Checks what a claim's ``run`` returned against what the claim declares.

    Raises:
        ValueError: A variant is missing or unknown, or a metric is unknown: a defect of the claim.
    """
    if set(value) != set(claim.variants):
        raise ValueError(f"{claim.method}: measured {sorted(value)}, but the claim declares {sorted(claim.variants)}.")
    for variant, metrics in value.items():
        if unknown := set(metrics) - set(claim.metrics):
            raise ValueError(f"{claim.method}: {variant} measured {sorted(unknown)}, which the claim does not declare.")


def _finite(value: Any) -> float | None:
    # JSON has no infinity: a run that diverged is kept as null, and counts against the method.
    number = float(value)
    return number if number - number == 0 else None
