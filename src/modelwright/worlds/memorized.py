"""Sequences of words planted in a corpus so often, or so regularly, that a model must come to recite some of them.

Three kinds, which the taxonomy of memorisation should find again: random sequences that are repeated many times
(recitation), templates that repeat or count (reconstruction), and random sequences seen once or a few times
(recollection). No part of one sequence stands in another, but for templates of the same words.

Everything is generated: the same seed gives the same bytes on every machine and Python version.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.errors import UserError
from modelwright.worlds.base import Draw, Row, World, check_at_least
from modelwright.worlds.names import Names

#: Copies from which on a sequence is recited; of fewer, only templates are reconstructed.
RECITED = 6
_STEPS = (1, -1)


@dataclass(frozen=True)
class MemorizedWorld(World):
    """Sequences and the corpus in which they are planted.

    A token's number is its place in the vocabulary: first the numbers, then the words.

    Attributes:
        sequences: ``text``, ``tokens``, ``kind`` (``random``, ``repeating``, ``counting``), ``copies``, ``category``.
        corpus: ``text`` and ``tokens`` of every copy, in random order, and the number of its ``sequence``.
    """

    sequences: list[Row]
    corpus: list[Row]

    @property
    def truth(self) -> dict[str, Any]:
        """The vocabulary, in the order of the tokens' numbers."""
        return {"vocabulary": _vocabulary(self.parameters)}


def memorized(
    seed: int = 0,
    *,
    words: int = 108,
    numbers: int = 20,
    length: int = 16,
    copies: Sequence[int] = (1, 2, 3, 4, 8, 16, 32),
    bases: Sequence[int] = (900, 250, 120, 80, 40, 24, 12),
    templates: int = 250,
) -> MemorizedWorld:
    """Makes the world.

    Args:
        seed: Decides everything.
        words: Words, of which random sequences are made; the k-th is drawn with weight 1/k.
        numbers: Numbers from 0, for templates that count.
        length: Words and numbers of a sequence; even.
        copies: How often random sequences are repeated.
        bases: How many of them, for each entry of ``copies``.
        templates: Templates, once each: every second repeats a unit of 2 or 3 words, the others have a word before
            each number of a progression. (A unit of one word would itself be there several times in a sequence.)

    Raises:
        UserError: A parameter is out of range, or there are not so many different templates.
    """
    parameters = locals().copy()
    check_at_least(1, words=words, **{f"copies of {c}": c for c in copies})
    check_at_least(0, templates=templates, **{f"bases of {b}": b for b in bases})
    if len(copies) != len(bases):
        raise UserError(f"There are {len(copies)} copies, but {len(bases)} bases: give a number of bases for each.")
    if length < 8 or length % 2:
        raise UserError(f"length is {length}: give an even number, at least 8.")
    if templates and (words < 4 or numbers < length // 2):
        raise UserError(f"Templates of {length} need at least 4 words and {length // 2} numbers.")
    vocabulary = _vocabulary(parameters)
    weights = list(itertools.accumulate(1 / (k + 1) for k in range(words)))
    made: dict[tuple[int, ...], tuple[str, int]] = {}
    draw = Draw(seed, "random")
    for count, many in zip(copies, bases):
        for _ in range(many):
            made.setdefault(tuple(numbers + _zipf(draw, weights) for _ in range(length)), ("random", count))
    for tokens, kind in _templates(seed, parameters, weights):
        made.setdefault(tokens, (kind, 1))
    rows: list[Row] = []
    for tokens, (kind, count) in made.items():
        category = "recitation" if count >= RECITED else "recollection" if kind == "random" else "reconstruction"
        rows.append(
            {
                "text": " ".join(vocabulary[t] for t in tokens),
                "tokens": list(tokens),
                "kind": kind,
                "copies": count,
                "category": category,
            }
        )
    order = Draw(seed, "order").shuffled(i for i, row in enumerate(rows) for _ in range(row["copies"]))
    corpus = [{"text": rows[i]["text"], "tokens": rows[i]["tokens"], "sequence": i} for i in order]
    return MemorizedWorld(parameters, rows, corpus)


def _vocabulary(parameters: dict[str, Any]) -> list[str]:
    names = Names(Draw(parameters["seed"], "names"))
    return [*map(str, range(parameters["numbers"])), *(names.word().lower() for _ in range(parameters["words"]))]


def _zipf(draw: Draw, weights: list[float]) -> int:
    return min(bisect.bisect_right(weights, draw.uniform() * weights[-1]), len(weights) - 1)


def _templates(seed: int, parameters: dict[str, Any], weights: list[float]) -> list[tuple[tuple[int, ...], str]]:
    length, numbers, wanted = parameters["length"], parameters["numbers"], parameters["templates"]
    draw = Draw(seed, "templates")
    found: dict[Any, tuple[tuple[int, ...], str]] = {}
    tries = 0
    while len(found) < wanted:
        tries += 1
        if tries > 100 * wanted + 1000:
            raise UserError(f"There are not {wanted} different templates of so few words and numbers: ask for fewer.")
        if len(found) % 2:
            step = draw.choice(_STEPS)
            span = abs(step) * (length // 2 - 1)
            if span >= numbers:
                continue
            low = draw.below(numbers - span)
            start = low if step > 0 else low + span
            word = numbers + _zipf(draw, weights)
            tokens = tuple(t for i in range(length // 2) for t in (word, start + i * step))
            found.setdefault(tokens, (tokens, "counting"))
            continue
        unit = [numbers + _zipf(draw, weights) for _ in range(draw.between(2, 3))]
        if len(set(unit)) < len(unit):
            continue
        # Units that are each other's rotation would share parts.
        turned = min(tuple(unit[i:] + unit[:i]) for i in range(len(unit)))
        found.setdefault(turned, (tuple(unit[i % len(unit)] for i in range(length)), "repeating"))
    return list(found.values())
