"""What is seen of a run: bars on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from modelwright.progress import Progress, Silent

#: Seconds between two lines about a running step, in a log.
_LOG_SECONDS = 30.0


class Lines:
    """A line for every finished step, and now and then one for a running step.

    Args:
        progress: Where lines go.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._total = self._done = 0
        self._phase: dict[str, tuple[str, int | None]] = {}
        self._printed: dict[str, float] = {}

    def begin(self, total: int, cached: int, workers: int) -> None:
        """Begins a run of ``total`` instances."""
        self._total, self._done = total, cached
        kept = f", {cached} of them done before" if cached else ""
        self._progress.message(f"{total} steps{kept}; {workers} worker{'s' if workers > 1 else ''}")

    def started(self, name: str) -> None:
        """An instance has begun."""
        self._printed[name] = time.monotonic()

    def event(self, name: str, event: dict[str, Any]) -> None:
        """Something happened inside a running instance."""
        if event["event"] == "message":
            self._progress.message(f"{name}: {event['text']}")
        elif event["event"] == "phase":
            self._phase[name] = event["label"], event["total"]
        elif event["event"] == "advance" and time.monotonic() - self._printed[name] >= _LOG_SECONDS:
            self._printed[name] = time.monotonic()
            label, total = self._phase.get(name, ("", None))
            of = f" of {total:,}" if total else ""
            self._progress.message(f"  {name}: {label} {event['done']:,}{of} {event['note']}".rstrip())

    def finished(self, name: str, seconds: float) -> None:
        """An instance is done."""
        self._done += 1
        self._progress.message(f"[{self._done}/{self._total}] {name}  {seconds:.1f} s")

    def close(self) -> None:
        """The run has ended, well or not."""


class Bars:
    """One bar for the run and one for each running step. The same methods as :class:`Lines`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        # Ids hold square brackets, which are rich's markup.
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True)),
            console=Console(stderr=True),
        )
        self._run: Any = None
        self._tasks: dict[str, Any] = {}

    def begin(self, total: int, cached: int, workers: int) -> None:
        """Begins a run of ``total`` instances."""
        self._bars.start()
        note = f"{cached} cached" if cached else ""
        self._run = self._bars.add_task("steps", total=total, completed=cached, note=note)

    def started(self, name: str) -> None:
        """An instance has begun."""
        self._tasks[name] = self._bars.add_task(name, total=None, note="starting")

    def event(self, name: str, event: dict[str, Any]) -> None:
        """Something happened inside a running instance."""
        task = self._tasks[name]
        if event["event"] == "message":
            self._bars.console.print(f"{name}: {event['text']}", highlight=False, markup=False)
        elif event["event"] == "phase":
            self._bars.reset(task, total=event["total"], note=event["label"])
        elif event["event"] == "advance":
            note = {"note": event["note"]} if event["note"] else {}
            self._bars.update(task, completed=event["done"], **note)

    def finished(self, name: str, seconds: float) -> None:
        """An instance is done."""
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        self._bars.advance(self._run)

    def close(self) -> None:
        """The run has ended, well or not."""
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self._bars.stop()


def display_for(progress: Progress) -> Lines | Bars:
    """Returns bars if standard error is a terminal and the caller wants to see anything."""
    return Bars() if sys.stderr.isatty() and not isinstance(progress, Silent) else Lines(progress)
