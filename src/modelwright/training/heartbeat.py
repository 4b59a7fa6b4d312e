"""Notices within a minute that another process of a distributed run has died, and ends this one with a message."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_NUMBERS = itertools.count()
_SIGNS = ("Connection closed by peer", "Connection reset", "Broken pipe", "Connection refused")


class Heartbeat:
    """A thread that tells the others that this process lives, and watches whether they do; a context manager.

    A collective operation waits for a dead process for as long as its timeout says (half an hour by default), or for
    ever. Gloo notices a closed connection; NCCL does not. Each process therefore counts upwards in the store through
    which the group was formed, and reads the others' counts. One whose count has stood still for ``patience`` seconds
    (as many intervals of this process: a machine that stood still as a whole has killed nobody) is taken for dead:
    after a moment, in which an error that has reached the main thread may be reported instead, ``lost`` is called. A
    process that is stopped (SIGSTOP) counts as dead; one that works, evaluates or waits does not.

    Without ``torch.distributed``, with one process, or where the group was not formed by ``MASTER_ADDR`` and
    ``MASTER_PORT``, it does nothing.

    Args:
        patience: Seconds without a sign of life.
        interval: Seconds between signs.
        grace: Seconds left to the main thread.
        lost: Called with the message; by default prints it and ends this process with exit code 1.
        member: Store, rank and number of processes; by default those of ``torch.distributed``.
    """

    def __init__(
        self,
        patience: float = 40.0,
        interval: float = 4.0,
        grace: float = 8.0,
        lost: Callable[[str], None] | None = None,
        member: tuple[Any, int, int] | None = None,
    ) -> None:
        self.patience, self.interval, self.grace = patience, interval, grace
        self.lost, self.member = lost or _end, member
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        member = self.member or _member(self.patience)
        if member is not None:
            self._store, self._rank, self._world = member
            self._store.set(str(self._rank), "0")
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # whoever kept the store may have ended
            self._store.set(str(self._rank), "failed" if kind is not None else "done")

    def _watch(self) -> None:
        seen = {rank: (b"", 0) for rank in range(self._world) if rank != self._rank}
        count = 0
        while not self._stop.wait(self.interval):
            count += 1
            message = ""
            try:
                self._store.set(str(self._rank), str(count))
                for rank, (before, looks) in seen.items():
                    now = self._store.get(str(rank)) if self._store.check([str(rank)]) else b""
                    looks = looks + 1 if now == before else 0
                    seen[rank] = (now, looks)
                    if now == b"failed":
                        message = f"Process {rank} of {self._world} stopped with an error"
                    elif now != b"done" and looks * self.interval > self.patience:
                        message = f"Process {rank} of {self._world} has given no sign of life for {self.patience:g} s"
            except RuntimeError:
                message = "The process through which the processes of this run find each other is gone"
            if message:
                if not self._stop.wait(self.grace):
                    self.lost(f"{message}: stopping. The same command goes on from the last checkpoint.")
                return


def _member(patience: float) -> tuple[Any, int, int] | None:
    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not there or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    # A connection of its own: the group's blocks while it waits for something.
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=patience),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"modelwright/{attempt}/{next(_NUMBERS)}"
    return dist.PrefixStore(prefix, store), dist.get_rank(), dist.get_world_size()


def _end(message: str) -> None:
    # The main thread may be inside a collective operation that nothing interrupts.
    print(f"Error: {message}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def connection_lost(error: BaseException) -> bool:
    """Returns whether an exception of a collective operation means that another process has ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
