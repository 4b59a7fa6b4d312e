"""Features of the text alone: is it a template that any model could continue, and how compressible are its characters?

Two rules make a template. A text *repeats* if some period of at most half its length explains every character. It
*increments* if it is made of units in which some numbers run through arithmetic progressions and nothing else changes.

Source: section 3 of the paper, and the official code where the paper is silent. ``legacy=True`` reproduces four
traps of that code: with exactly three numbers it takes any triple that bends downwards ("1 2 1") for a progression, if
its last two differ; hexadecimal numbers are read only where blanks stand on both sides; the first and the last piece
never count, so that three compound units ("23: 0xf1, 24: 0xf2, 25: 0xf3", the paper's own example) are not seen; and
of a repetition the first and the last character do not count either, while one of three characters is none. (A fifth
is not reproduced: a step that a shorter period left behind may make constant units increment, in one made-up text of
some thousands.)
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

#: Largest difference between two steps of one progression (the official code's, for decimal numbers).
TOLERANCE = 1e-10
_QUOTES = re.compile(r"\\n|\\x|[\\'\"`]")
_HEXADECIMAL = re.compile(r"(?<![0-9A-Za-z])0[xX]([0-9a-fA-F]{1,16})(?![0-9A-Za-z])")
_WORD_LITERAL = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+|[1-9][0-9]*|0+)")
_DIGITS = re.compile(r"([0-9]+)")

Piece = int | str


class Templating(NamedTuple):
    """Which rules a text fulfils."""

    incrementing: bool
    repeating: bool


def templating(text: str, *, legacy: bool = False) -> Templating:
    """Tells whether a text is a template.

    Args:
        text: The decoded sequence.
        legacy: Decide as the official code does, traps included.
    """
    incrementing = is_incrementing(text, legacy=legacy)
    # The official code does not look for repetitions in what increments.
    return Templating(incrementing, not (legacy and incrementing) and is_repeating(text, legacy=legacy))


def is_repeating(text: str, *, legacy: bool = False) -> bool:
    """Whether some period p of at most half the length makes every character equal the one p places before it.

    Args:
        text: The decoded sequence.
        legacy: Leave out the first and the last of more than four characters; fewer than four do not repeat.
    """
    if legacy:
        text = text[1:-1] if len(text) > 4 else text if len(text) == 4 else ""
    length = len(text)
    if length < 2:
        return False
    # The smallest period is the length less the longest border, which Knuth, Morris and Pratt's table ends with.
    border = [0] * length
    for i in range(1, length):
        k = border[i - 1]
        while k and text[i] != text[k]:
            k = border[k - 1]
        border[i] = k + (text[i] == text[k])
    return length - border[-1] <= length // 2


def is_incrementing(text: str, *, legacy: bool = False) -> bool:
    """Whether a text counts: see the module's head for the rule and for ``legacy``."""
    found = pieces(text, legacy=legacy)
    if len(found) == 3 and all(isinstance(piece, int) for piece in found):
        first, second, third = (int(piece) for piece in found)
        bend = third - 2 * second + first
        return bend < TOLERANCE and second != third if legacy else bend == 0 and first != second
    if len(found) < 3:
        return False
    # A sequence is cut out of running text, so its first and last piece may be halves.
    inner = found[1:-1] if len(found) > 4 else found
    return _progresses(inner) or (not legacy and inner is not found and _progresses(found))


def pieces(text: str, *, legacy: bool = False) -> list[Piece]:
    """Splits a text in maximal runs of digits, as numbers, and what stands between them.

    White space, quotes and escapes are left out; hexadecimal numbers count as numbers.
    """
    words = text.split()
    if legacy:
        words = [str(int(w, 0)) if _WORD_LITERAL.fullmatch(w) else w for w in words]
    else:
        words = [_HEXADECIMAL.sub(lambda m: str(int(m[1], 16)), w) for w in words]
    found: list[Piece] = []
    for word in words:
        for part in _DIGITS.split(_QUOTES.sub("", word)):
            if part:
                found.append(_number(part) if part[0] in "0123456789" else part)
    return found


def _number(digits: str) -> Piece:
    # Python refuses to read thousands of digits, and such a run is no counter.
    return int(digits) if len(digits) <= 400 else digits


def _progresses(found: Sequence[Piece]) -> bool:
    return any(_progresses_with(found, period) for period in range(1, len(found) // 2 + 1))


def _progresses_with(found: Sequence[Piece], period: int) -> bool:
    counted = False
    for start in range(period):
        unit = found[start::period]
        if isinstance(unit[0], str):
            if any(piece != unit[0] for piece in unit):
                return False
            continue
        if not all(isinstance(piece, int) for piece in unit):
            return False
        steps = [int(b) - int(a) for a, b in itertools.pairwise(unit)]
        if any(step != steps[0] for step in steps):
            return False
        counted = counted or (len(steps) >= 2 and steps[0] != 0)
    return counted


def shannon_code_length(text: str) -> int | float:
    """Returns the mean length, in bits a character, of the code that gives character c ``ceil(-log2 p_c)`` bits.

    The paper calls it the Huffman coding length. It lies between the entropy of the characters and that plus one, and
    is never below Huffman's own mean length, save for texts of a single different character: those have length 0
    here, where a real code needs a bit. An empty text has 0 as well.
    """
    total = len(text)
    # ceil(log2(n / c)) in whole numbers, since a rounded logarithm would miss the powers of two.
    bits = sum(c * (-(-total // c) - 1).bit_length() for c in Counter(text).values())
    return bits / total if total else 0.0
