"""What a verb is: a dataclass of options with a ``run``.

The command line and a recipe's YAML are both made from these dataclasses, so there is no second schema to keep in
step. Modules in this package import nothing heavy at the top: `modelwright --help` reads all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from modelwright.progress import Progress


@dataclass(frozen=True)
class Arg:
    """Metadata of an option: ``Annotated[int, Arg("Documents to keep.")]``.

    Attributes:
        help: One sentence for ``--help`` and the documentation.
        positional: Given by position on the command line instead of as ``--name``.
        short: A one-letter form such as ``-o``.
        kind: ``input`` (a file or folder that is read: recipes hash its content), ``output`` (written: recipes set it),
            ``run`` (how, not what: worker counts, ``force``; recipes leave it out of the cache key) or ``value``.
        filename: For an ``output``: the name a recipe gives it inside the step's folder.
    """

    help: str
    positional: bool = False
    short: str = ""
    kind: str = "value"
    filename: str = ""


class Verb(Protocol):
    """A piece of work with options. Subclasses are keyword-only dataclasses; the docstring is the help text."""

    def run(self, progress: Progress) -> dict[str, Any]:
        """Does the work and returns a JSON-able summary: outputs by name, metrics, counts.

        Raises:
            UserError: The options or the input are bad. Nothing half-written is left.
        """
