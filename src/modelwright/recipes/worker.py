"""The process that steps run in: ``python -m modelwright.recipes.worker``.

Jobs come as JSON lines on standard input, and events go back as JSON lines on what was standard output. A worker
stays for the whole run, because importing torch and transformers takes longer than many a step.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock

from modelwright import provenance
from modelwright.errors import MEMORY_IS_FULL, UserError, memory_is_full
from modelwright.files import write_json
from modelwright.recipes.options import OptionProblem, options_of
from modelwright.recipes.store import Store, remove_scratch

#: Seconds between two events of progress.
_THROTTLE = 0.1


class Channel:
    """Sends events to the parent, one JSON object a line."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, event: str, **values: Any) -> None:
        """Sends one event."""
        with self._lock:
            self._stream.write(json.dumps({"event": event, **values}) + "\n")
            self._stream.flush()


class Reporter:
    """Implements :class:`modelwright.progress.Progress` by sending events."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._done, self._sent = channel, 0, 0.0

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a phase."""
        self._done = 0
        self._channel.send("phase", label=label, total=total)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts finished units; sent now and then."""
        self._done += units
        if time.monotonic() - self._sent >= _THROTTLE:
            self._sent = time.monotonic()
            self._channel.send("advance", done=self._done, note=note)

    def message(self, text: str) -> None:
        """Sends a line that stays."""
        self._channel.send("message", text=text)


def run_step(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Does one step in its folder and writes its ``result.json``, atomically and last.

    A folder without ``result.json`` was left by a process that was killed: a finished output in it is removed (it
    cannot be told from a good one), while working files beside it stay, so that a verb can go on from them.

    Args:
        job: ``run`` (the run's folder), ``key``, ``verb`` (``module:class``), ``name``, ``options``, ``outputs``.
        progress: Where the verb reports to.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: The verb refused its input, or the disk is full.
    """
    store = Store(Path(job["run"]))
    folder = store.step(job["key"])
    folder.mkdir(parents=True, exist_ok=True)
    # A worker whose parent was killed may still be on its way out of this very folder.
    with FileLock(folder / ".lock"):
        outputs = {option: folder / name for option, name in job["outputs"].items()}
        for stale in (*outputs.values(), folder / "result.json"):
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)
        module, attribute = job["verb"].split(":")
        verb = getattr(importlib.import_module(module), attribute)
        known = options_of(verb)
        values = {known[name].field: known[name].convert(value) for name, value in job["options"].items()}
        if "force" in known:
            values.setdefault("force", True)  # whatever lies in this folder is ours to replace
        started, stamp = time.perf_counter(), time.time()
        result = verb(**values, **outputs).run(progress)
        record = {
            "format": 1,
            "verb": job["name"],
            "options": store.relative(job["options"]),
            "result": store.relative(plain(result)),
            "started": round(stamp, 3),
            "seconds": round(time.perf_counter() - started, 3),
            "machine": provenance.machine(),
            "versions": provenance.versions(),
        }
        remove_scratch(folder)
        write_json(folder / "result.json", record)
        (folder / ".lock").unlink(missing_ok=True)
    return record


def plain(value: Any) -> Any:
    """Returns a verb's result as JSON can hold it: paths as text, numpy's numbers as numbers, no infinities."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a verb's result holds a {type(value).__name__}, which JSON cannot: {value!r:.80}")


def _do(job: dict[str, Any], channel: Channel) -> None:
    store = Store(Path(job["run"]))
    defect = store.folder / f"{job['key']}.error.txt"
    try:
        record = run_step(job, Reporter(channel))
        defect.unlink(missing_ok=True)
        channel.send("finished", record=record)
    except UserError as error:
        channel.send("refused", text=str(error))
    except OptionProblem as problem:
        channel.send("refused", text=f"the option {'.'.join(map(str, problem.place))}: {problem.problem}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            channel.send("refused", text=f"the disk is full ({error.filename or store.folder}): free some space.")
        else:
            _defect(defect, error, channel)
    except Exception as error:
        if memory_is_full(error):
            channel.send("refused", text=MEMORY_IS_FULL)
        else:
            _defect(defect, error, channel)


def _defect(path: Path, error: Exception, channel: Channel) -> None:
    path.write_text(traceback.format_exc(), encoding="utf-8")
    channel.send("defect", text=f"{type(error).__name__}: {error}", path=str(path))


def _read_jobs(stream: Any, jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in stream:
        jobs.put(json.loads(line))
    # The parent has closed the pipe, or it was killed: nobody waits for what we do, nor for our own children.
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Does jobs until standard input ends."""
    signal.signal(signal.SIGTERM, _stop)
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    # Nothing that a step starts may read the orders or write among the events.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # of one that is killed, too, it can be read
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(orders, jobs), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            job = jobs.get()
            folder = Store(Path(job["run"])).step(job["key"])
            folder.mkdir(parents=True, exist_ok=True)
            log = folder / "log.txt"
            # What libraries print goes beside the result, and not into the display of the run.
            with log.open("w", encoding="utf-8") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            _do(job, channel)
            sys.stdout.flush()
            sys.stderr.flush()
            if log.exists() and not log.stat().st_size:
                log.unlink()
            gc.collect()
    # Threads of libraries have kept interpreters from ending; everything of ours is on disk.
    os._exit(0)


if __name__ == "__main__":
    main()
