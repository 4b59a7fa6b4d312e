"""Search spaces whose sampling law is a product of independent factors, each of which learns from good settings.

A factor draws a value, and moves towards the maximum-likelihood law of an elite: frequencies for choices, mean and
standard deviation for numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev
from typing import Any, Protocol, runtime_checkable

from modelwright.errors import UserError


@runtime_checkable
class Factor(Protocol):
    """One hyperparameter under search. Factors never change: learning returns a new one."""

    def draw(self, uniform: float) -> Any:
        """Returns a value for a uniform number in [0, 1)."""

    def learn(self, elite: Sequence[Any], smoothing: float) -> Factor:
        """Returns ``smoothing`` times the elite's maximum-likelihood law and the rest of this one."""

    def mode(self) -> Any:
        """Returns the value of greatest probability."""

    def entropy(self) -> float:
        """Returns how undecided the law is, from 0 (one value) to 1 (as at the start)."""

    def describe(self) -> dict[str, Any]:
        """Returns the law's parameters (JSON-able)."""

    def outside(self, value: Any) -> str | None:
        """Returns None for a value that could be drawn, or a description of what could."""


@dataclass(frozen=True)
class Choice:
    """One of a few values, in no order.

    Attributes:
        values: The values; JSON-able.
        probabilities: Of each; uniform at the start.
        floor: Least probability, so that no value is lost for good.
    """

    values: tuple[Any, ...]
    probabilities: tuple[float, ...] = ()
    floor: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values or len(set(map(repr, self.values))) != len(self.values):
            raise UserError(f"A choice needs values that differ, not {list(self.values)}.")
        if not 0 <= self.floor <= 1 / len(self.values):
            raise UserError(f"The floor {self.floor} is not between 0 and 1 / {len(self.values)} values.")
        if not self.probabilities:
            object.__setattr__(self, "probabilities", (1 / len(self.values),) * len(self.values))
        many, total = len(self.probabilities), math.fsum(self.probabilities)
        if many != len(self.values) or not min(self.probabilities) >= 0 or not abs(total - 1) < 1e-6:
            raise UserError(f"A choice of {len(self.values)} values needs as many probabilities, with the sum 1.")

    def draw(self, uniform: float) -> Any:
        """See :class:`Factor`."""
        total = 0.0
        for value, probability in zip(self.values, self.probabilities):
            total += probability
            if uniform < total:
                return value
        return self.values[-1]

    def learn(self, elite: Sequence[Any], smoothing: float) -> Choice:
        """See :class:`Factor`."""
        shares = [sum(e == value for e in elite) / len(elite) for value in self.values]
        mixed = [smoothing * new + (1 - smoothing) * old for new, old in zip(shares, self.probabilities)]
        return Choice(self.values, _with_floor(mixed, self.floor), self.floor)

    def mode(self) -> Any:
        """See :class:`Factor`."""
        return self.values[max(range(len(self.values)), key=lambda i: self.probabilities[i])]

    def entropy(self) -> float:
        """See :class:`Factor`."""
        if len(self.values) == 1:
            return 0.0
        return -sum(p * math.log(p) for p in self.probabilities if p > 0) / math.log(len(self.values))

    def describe(self) -> dict[str, Any]:
        """See :class:`Factor`."""
        return {"values": list(self.values), "probabilities": [round(p, 6) for p in self.probabilities]}

    def outside(self, value: Any) -> str | None:
        """See :class:`Factor`."""
        return None if value in self.values else f"one of {list(self.values)}"


def _with_floor(probabilities: Sequence[float], floor: float) -> tuple[float, ...]:
    """Raises what is below the floor to it and scales the rest, so that the sum is 1."""
    low: set[int] = set()
    while True:
        rest = sum(p for i, p in enumerate(probabilities) if i not in low)
        scale = (1 - floor * len(low)) / rest if rest else 0.0
        new = {i for i, p in enumerate(probabilities) if i not in low and p * scale < floor}
        if not new:
            return tuple(floor if i in low else p * scale for i, p in enumerate(probabilities))
        low |= new


@dataclass(frozen=True)
class Normal:
    """A number between bounds, drawn from a normal law cut off at them.

    Attributes:
        low: Least value.
        high: Greatest value.
        whole: Round to whole numbers.
        log: The normal law is that of the logarithm.
        mean: Of the (logarithm of the) value before the cut; the middle at the start.
        std: Its standard deviation; half the range at the start, which is nearly uniform.
        least_std: The floor of ``std``; a hundredth of the range by default.
    """

    low: float
    high: float
    whole: bool = False
    log: bool = False
    mean: float | None = None
    std: float | None = None
    least_std: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"A range needs low < high, not {self.low} and {self.high}.")
        if self.whole and (self.low != round(self.low) or self.high != round(self.high)):
            raise UserError(f"A range of whole numbers needs whole bounds, not {self.low} and {self.high}.")
        if self.log and self.low <= 0:
            raise UserError(f"A range on a logarithmic scale begins above 0, not at {self.low}.")
        low, high = self._line(self.low), self._line(self.high)
        for name, value in (("mean", (low + high) / 2), ("std", (high - low) / 2), ("least_std", (high - low) / 100)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for deviation in (self.std, self.least_std):
            if deviation is None or not 0 < deviation < math.inf:
                raise UserError(f"The standard deviation of a range, and its least, are above 0, not {deviation}.")

    def _line(self, value: float) -> float:
        return math.log(value) if self.log else float(value)

    def _value(self, point: float) -> float | int:
        value = math.exp(point) if self.log else point
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value

    def draw(self, uniform: float) -> float | int:
        """See :class:`Factor`."""
        law = NormalDist(self.mean, self.std)  # type: ignore[arg-type]
        low, high = law.cdf(self._line(self.low)), law.cdf(self._line(self.high))
        share = low + uniform * (high - low)
        return self._value(law.inv_cdf(min(max(share, 1e-15), 1 - 1e-15)))

    def learn(self, elite: Sequence[float], smoothing: float) -> Normal:
        """See :class:`Factor`."""
        points = [self._line(value) for value in elite]
        assert self.mean is not None
        assert self.std is not None
        assert self.least_std is not None
        mean = smoothing * fmean(points) + (1 - smoothing) * self.mean
        std = smoothing * pstdev(points) + (1 - smoothing) * self.std
        return Normal(self.low, self.high, self.whole, self.log, mean, max(std, self.least_std), self.least_std)

    def mode(self) -> float | int:
        """See :class:`Factor`."""
        assert self.mean is not None
        return self._value(min(max(self.mean, self._line(self.low)), self._line(self.high)))

    def entropy(self) -> float:
        """See :class:`Factor`; the standard deviation over that at the start."""
        assert self.std is not None
        return min(1.0, 2 * self.std / (self._line(self.high) - self._line(self.low)))

    def describe(self) -> dict[str, Any]:
        """See :class:`Factor`."""
        assert self.std is not None
        spread = "std_of_log" if self.log else "std"
        return {"low": self.low, "high": self.high, "mode": self.mode(), spread: round(self.std, 6)}

    def outside(self, value: Any) -> str | None:
        """See :class:`Factor`."""
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high
        if fine and not (self.whole and value != round(value)):
            return None
        return f"a {'whole ' if self.whole else ''}number from {self.low} to {self.high}"


def log_normal(low: float, high: float, *, whole: bool = False) -> Normal:
    """Returns a number between bounds whose logarithm is drawn from a normal law: a learning rate, a width."""
    return Normal(low, high, whole, log=True)


Space = Mapping[str, Factor]


def check_space(space: Space) -> None:
    """Checks that a space is one.

    Raises:
        UserError: It is empty, or a factor is not one.
    """
    if not space:
        raise UserError("The search space is empty: name at least one hyperparameter.")
    for name, factor in space.items():
        if not isinstance(factor, Factor):
            raise UserError(f"The hyperparameter '{name}' is {factor!r}: give a Choice, a Normal or log_normal(...).")
