"""Means, spreads and paired differences over a handful of seeds, with Student's t. Standard library only."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def t_cdf(t: float, dof: int) -> float:
    """Returns P(T <= t) for Student's t with a whole number of degrees of freedom.

    The finite series for whole degrees of freedom is exact (Abramowitz & Stegun, 26.7.3 and 26.7.4).

    Raises:
        ValueError: ``dof`` is below 1.
    """
    if dof < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, not {dof}.")
    theta = math.atan2(abs(t), math.sqrt(dof))
    cosine, sine = math.cos(theta), math.sin(theta)
    # In both series the term in cos^k is the one in cos^(k-2) times cos^2 (k-1)/k.
    if dof % 2:
        term, total = (cosine, cosine) if dof > 1 else (0.0, 0.0)
        for k in range(3, dof - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term = total = 1.0
        for k in range(2, dof - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = sine * total
    return (1 + math.copysign(inside, t)) / 2


@functools.cache
def t_quantile(probability: float, dof: int) -> float:
    """Returns t with P(T <= t) = ``probability`` for 0.5 <= probability < 1, by bisection on :func:`t_cdf`.

    Raises:
        ValueError: ``probability`` or ``dof`` is out of range.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"The probability must be in [0.5, 1), not {probability}.")
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < probability:
        low, high = high, high * 2
    while (middle := (low + high) / 2) not in (low, high):
        if t_cdf(middle, dof) < probability:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Sample:
    """Mean and spread of n numbers.

    Attributes:
        mean: Arithmetic mean.
        sd: Sample standard deviation (n - 1 in the denominator); None for one number.
        n: How many numbers.
    """

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Summarises at least one finite number.

        Raises:
            ValueError: No numbers.
        """
        if not values:
            raise ValueError("There is no mean of no numbers.")
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def lower_bound(self, confidence: float = 0.95) -> float | None:
        """Returns the one-sided lower confidence bound of the mean, or None for one number."""
        if self.sd is None:
            return None
        return self.mean - t_quantile(confidence, self.n - 1) * self.sd / math.sqrt(self.n)

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Returns the two-sided confidence interval of the mean, or None for one number."""
        if self.sd is None:
            return None
        half = t_quantile((1 + confidence) / 2, self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """Writes a number for a reader: a true minus sign, thousands apart, a dash when there is none.

    Args:
        value: Number, or None.
        digits: Digits after the point.
        sign: Write a plus sign too.
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def mean_and_spread(sample: Sample, digits: int = 3) -> str:
    """Writes ``2.214 ± 0.034``; without the spread for one number."""
    spread = "" if sample.sd is None else f" ± {number(sample.sd, digits)}"
    return number(sample.mean, digits) + spread
