"""Work on many pieces in other processes, with none left over afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def in_processes(
    function: Callable[..., T], calls: Iterable[tuple[Any, ...]], workers: int, *, in_order: bool = True
) -> Iterator[T]:
    """Yields ``function(*call)`` for every call; a few calls ahead are at work at any time.

    The processes are kept for the next use, need no ``if __name__ == "__main__"``, and end when this one does, however
    it ends.

    Args:
        function: A function of a module.
        calls: Its arguments, picklable.
        workers: Processes; with 1, everything happens here.
        in_order: Whether results come in the order of the calls, or as they are ready.
    """
    if workers <= 1:
        yield from (function(*call) for call in calls)
        return
    import joblib

    parent = os.getpid()
    kind = "generator" if in_order else "generator_unordered"
    pool = joblib.Parallel(workers, "loky", return_as=kind, initializer=_watch, initargs=(parent,))
    yield from pool(joblib.delayed(function)(*call) for call in calls)


def _watch(parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # A parent that was killed cannot stop its workers, which would wait minutes for work, also for their first.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
