"""Worker processes: started when there is work for them, kept for the whole run, stopped together."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
#: Seconds that a worker gets to leave its step in good order.
_GRACE = 10.0


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    def __init__(self, events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]], threads: int) -> None:
        self.job: dict[str, Any] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelwright.recipes.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            # A session of its own: Ctrl-C reaches only the parent, which then stops the worker and its children.
            start_new_session=True,
            env={**dict.fromkeys(_THREADS, str(threads)), **os.environ},
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed worker may be cut
                events.put((self, json.loads(line)))
        events.put((self, None))

    def send(self, job: dict[str, Any]) -> None:
        self.job = job
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is about to be heard of
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, number)
            else:
                self.process.terminate()


class Pool:
    """At most ``size`` workers.

    Args:
        size: Processes.
    """

    def __init__(self, size: int) -> None:
        self.size, self._threads = size, max(1, cores() // size)
        self._workers: list[_Worker] = []
        self._events: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()

    @property
    def free(self) -> int:
        """How many more jobs could run now."""
        return self.size - sum(worker.job is not None for worker in self._workers)

    def submit(self, job: dict[str, Any]) -> None:
        """Gives a job to an idle worker, or to a new one."""
        worker = next((w for w in self._workers if w.job is None), None)
        if worker is None:
            worker = _Worker(self._events, self._threads)
            self._workers.append(worker)
        worker.send(job)

    def next(self, timeout: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Waits for an event: a job and what happened to it, or None.

        A worker that died gives the event ``died`` with its exit ``code`` (negative: a signal) and last words.
        """
        try:
            worker, event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        job = worker.job
        if event is None:
            self._workers = [w for w in self._workers if w is not worker]
            event = {"event": "died", "code": worker.process.wait(), "text": worker.last_words()}
        if event["event"] in ("finished", "refused", "defect", "died"):
            worker.job = None
        return (job, event) if job is not None else None

    def close(self) -> None:
        """Stops every worker: idle ones at once, busy ones after they have left their step in good order."""
        try:
            for worker in self._workers:
                worker.signal(signal.SIGTERM if worker.job is not None else _KILL)
            deadline = time.monotonic() + _GRACE
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # also when a second Ctrl-C cuts the waiting short
            for worker in self._workers:
                worker.signal(_KILL)
                worker.process.wait()
            self._workers = []


_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
