"""Scores of short answers, as in SQuAD's evaluation: normalised, the best over the right answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

#: Fields that hold right answers, in the order in which they are looked for.
FIELDS = ("answers", "answer")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Returns a text in lower case, without ASCII punctuation, English articles and more than single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the normalised prediction is one of the normalised answers, else 0."""
    said = normalise(prediction)
    return float(any(said == normalise(answer) for answer in answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if one of the normalised answers stands in the normalised prediction (sub-span match), else 0.

    As in the published code, an answer may stand inside a longer word.
    """
    said = normalise(prediction)
    return float(any(normalise(answer) in said for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the harmonic mean of precision and recall of normalised words, the best over the answers."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))


def answers_of(row: Mapping[str, Any], field: str | None = None) -> list[str] | None:
    """Returns the right answers that a row holds: a text or a list of them, nested as Natural Questions has them.

    Args:
        row: The row.
        field: Its field; by default the first of :data:`FIELDS` that it has.
    """
    fields = FIELDS if field is None else (field,)
    for name in fields:
        if name in row and (found := _flat(row[name])):
            return found
    return None


def _flat(value: Any) -> list[str]:
    if isinstance(value, Mapping):  # SQuAD's {"text": [...], "answer_start": [...]}
        value = value.get("text")
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _flat(item)]
    return [] if value is None or isinstance(value, bool) else [str(value)]
