"""The step ``pick``: of everything that a step made, the one with the best number."""

from __future__ import annotations

import math
from typing import Any

from modelwright.errors import UserError

#: Its options: the number (a reference that gathers), what to hand on, and which end is better.
OPTIONS = ("from", "value", "prefer")
REQUIRED = ("from", "value")
PREFER = ("lowest", "highest")


def choose(numbers: list[Any], places: list[dict[str, Any]], prefer: str) -> dict[str, Any]:
    """Returns which candidate is best: its ``index``, its number as ``best``, and where it stands as ``at``.

    The first of equals wins; candidates without a finite number are passed over.

    Args:
        numbers: One a candidate.
        places: Each candidate's matrix coordinates.
        prefer: ``lowest`` or ``highest``.

    Raises:
        UserError: No candidate has a finite number, or one has something else than a number.
    """
    sign = 1 if prefer == "lowest" else -1
    finite = []
    for i, number in enumerate(numbers):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise UserError(f"'from' must be numbers, but candidate {places[i]} has {number!r:.80}.")
        if number is not None and math.isfinite(number):
            finite.append((sign * number, i))
    if not finite:
        raise UserError(f"none of the {len(numbers)} candidates has a finite number.")
    index = min(finite)[1]
    return {"index": index, "best": numbers[index], "at": places[index], "candidates": len(numbers)}
