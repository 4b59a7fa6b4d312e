"""The stability gap in numbers: how far a score falls, how long it takes to come back, and what is lost meanwhile.

The paper shows the gap as curves; these numbers are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from modelwright.errors import UserError

Direction = Literal["higher", "lower"]


def gap_metrics(
    tokens: Sequence[float], values: Sequence[float], better: Direction = "higher"
) -> dict[str, float | None]:
    """Returns the numbers of one curve.

    The lowest point is that of the whole curve (the first of equal ones), so a late fall counts as well as an early
    one. Between two measurements the curve is taken for a straight line.

    Args:
        tokens: Tokens trained on at each measurement, increasing.
        values: The score there; the first is that before training.
        better: Whether higher or lower is better. For ``lower`` (a loss) falls are rises.

    Returns:
        ``start`` and ``end``: first and last value. ``drop``: start minus the worst value, at least 0. ``worst`` and
        ``tokens_to_worst``. ``tokens_to_recover``: where after the worst point the score is first measured to be as
        good as at the start (None: never; 0: there was no drop). ``area``: integral of the shortfall below the start
        over tokens. ``peak`` and ``tokens_to_peak``: the best value, and where it was first reached.

    Raises:
        UserError: Too few or different numbers of points, tokens that do not increase, or values that are not finite.
    """
    if len(tokens) != len(values) or not len(values):
        raise UserError(
            f"A curve needs as many tokens as values, and at least one; there are {len(tokens)} and {len(values)}."
        )
    if any(b <= a for a, b in itertools.pairwise(tokens)):
        raise UserError("The tokens of a curve must increase.")
    if not all(math.isfinite(v) for v in values):
        raise UserError("A value of the curve is not finite.")
    sign = 1.0 if better == "higher" else -1.0
    scores = [sign * float(v) for v in values]
    start = scores[0]
    worst = min(range(len(scores)), key=scores.__getitem__)
    best = max(range(len(scores)), key=scores.__getitem__)
    drop = start - scores[worst]
    recovered: float | None = 0.0
    if drop > 0:
        recovered = next((float(tokens[i]) for i in range(worst + 1, len(scores)) if scores[i] >= start), None)
    area = math.fsum(
        _shortfall(float(tokens[i]), float(tokens[i + 1]), start - scores[i], start - scores[i + 1])
        for i in range(len(scores) - 1)
    )
    return {
        "start": float(values[0]),
        "end": float(values[-1]),
        "drop": drop,
        "worst": float(values[worst]),
        "tokens_to_worst": float(tokens[worst]),
        "tokens_to_recover": recovered,
        "area": area,
        "peak": float(values[best]),
        "tokens_to_peak": float(tokens[best]),
    }


def _shortfall(t0: float, t1: float, a: float, b: float) -> float:
    """The integral of max(0, line from a to b)."""
    if a <= 0 and b <= 0:
        return 0.0
    if a >= 0 and b >= 0:
        return (t1 - t0) * (a + b) / 2
    above = max(a, b)
    return (t1 - t0) * above * above / (2 * abs(b - a))


def gap_report(history: Sequence[Mapping[str, Any]], better: Mapping[str, Direction]) -> dict[str, dict[str, Any]]:
    """Returns :func:`gap_metrics` of every probe of a history.

    Args:
        history: Rows with ``tokens`` and a value for each probe, as
            :class:`~modelwright.training.stability_gap.callback.StabilityGapCallback` keeps them.
        better: Probe to its direction.
    """
    return {
        name: gap_metrics([row["tokens"] for row in history], [row[name] for row in history], direction)
        for name, direction in better.items()
    }


def probe_steps(total: int, tokens_per_step: int, every_tokens: int, growth: float = 1.5) -> list[int]:
    """Returns the optimizer steps after which to probe: few steps apart at first, then every ``every_tokens`` tokens.

    Before the first whole interval the steps grow by ``growth``: 1, 2, 3, 4, 7 …; the last step is always there. 0,
    before training, is not in the list.

    Args:
        total: Steps of the run.
        tokens_per_step: Tokens of a step.
        every_tokens: Tokens between probes later on.
        growth: Ratio of neighbouring early steps.
    """
    interval = max(1, round(every_tokens / tokens_per_step))
    found = {total}
    step = 1.0
    while step < min(interval, total):
        found.add(round(step))
        step = max(step + 1, step * growth)
    found.update(range(interval, total + 1, interval))
    return sorted(s for s in found if 0 < s <= total)
