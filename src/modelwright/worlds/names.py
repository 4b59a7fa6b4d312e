"""Pronounceable names that no text contains by accident."""

from __future__ import annotations

from modelwright.errors import UserError
from modelwright.worlds.base import Draw

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"

#: Names that can be had from one :class:`Names`; three syllables give 343,000, of which half may be taken.
CAPACITY = (len(_CONSONANTS) * len(_VOWELS)) ** 3 // 2


class Names:
    """Makes words such as ``Dalimo``, each once.

    All have six letters, so none is part of another, and a name is in a text exactly if it was put there.
    """

    def __init__(self, draw: Draw, avoid: str = "") -> None:
        """Draws from ``draw``; words of the text ``avoid`` are never given out."""
        self._draw = draw
        self._taken = set(avoid.lower().split())

    def word(self) -> str:
        """Returns a new name, capitalised.

        Raises:
            UserError: Too many were asked for.
        """
        if len(self._taken) > CAPACITY:
            raise UserError(f"The world needs more than {CAPACITY:,} names: make it smaller.")
        while True:
            word = "".join(self._draw.choice(_CONSONANTS) + self._draw.choice(_VOWELS) for _ in range(3))
            if word not in self._taken:
                self._taken.add(word)
                return word.capitalize()
