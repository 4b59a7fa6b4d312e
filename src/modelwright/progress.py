"""Progress that works under a recipe, on a terminal and in a log alike."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where long work tells how far it is. Every verb's ``run`` takes one."""

    def start(self, label: str, total: int | None = None) -> None:
        """Begins a phase of ``total`` units, or of unknown length."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts finished units; ``note`` is a short text such as ``loss 2.31``."""

    def message(self, text: str) -> None:
        """Prints a line that stays."""


class Silent:
    """Shows nothing."""

    def start(self, label: str, total: int | None = None) -> None:
        """See :class:`Progress`."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """See :class:`Progress`."""

    def message(self, text: str) -> None:
        """See :class:`Progress`."""
