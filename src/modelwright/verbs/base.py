"""What a verb is: a dataclass of options with a ``run``.

The command line and a recipe's YAML are both made from these dataclasses, so there is no second schema to keep in
step. Modules in this package import nothing heavy at the top: `modelwright --help` reads all of them.
"""

from __future__ import annotations

from typing import Any, Protocol

from modelwright.options import Arg
from modelwright.progress import Progress

__all__ = ["Arg", "Verb"]


class Verb(Protocol):
    """A piece of work with options. Subclasses are keyword-only dataclasses; the docstring is the help text."""

    def run(self, progress: Progress) -> dict[str, Any]:
        """Does the work and returns a JSON-able summary: outputs by name, metrics, counts.

        Raises:
            UserError: The options or the input are bad. Nothing half-written is left.
        """
