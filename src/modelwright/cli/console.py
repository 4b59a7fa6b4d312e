"""Progress on a terminal (bars, by rich) or in a log (a line now and then), always on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

_LOG_SECONDS = 15.0


class Console:
    """Implements :class:`modelwright.progress.Progress`. Use as a context manager.

    rich is imported at the first bar, so that commands that end in an error do not pay for it.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._label, self._total, self._done, self._note, self._printed = "", 0, 0, "", 0.0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self._finish()

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a phase; the previous one is finished."""
        self._finish()
        self._label, self._total, self._done, self._note, self._printed = label, total or 0, 0, "", time.monotonic()
        if not self._terminal:
            self.message(f"{label}{f' ({total:,})' if total else ''} …")
            return
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=RichConsole(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts finished units."""
        self._done += units
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=units, note=self._note)
        elif not self._terminal and time.monotonic() - self._printed >= _LOG_SECONDS:
            self._printed = time.monotonic()
            of = f" of {self._total:,}" if self._total else ""
            self.message(f"{self._label}: {self._done:,}{of} {self._note}".rstrip())

    def message(self, text: str) -> None:
        """Prints a line that stays, above a running bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
