"""How a dataclass's field describes itself as an option of the command line and of recipes."""

from __future__ import annotations

from dataclasses import dataclass


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
