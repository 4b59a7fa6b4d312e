"""What a claim is. A method's ``claim.py`` defines ``CLAIM``, and `modelwright verify` runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Scale = Literal["cpu", "gpu", "miniature"]
#: Variant (the method or a baseline) to metric to value, for one seed.
Measurements = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A quantity that a claim measures.

    Attributes:
        name: Column heading.
        unit: Unit, such as ``bits per byte``; empty for pure numbers.
        better: Which direction is better, or None when neither is.
        digits: Digits after the point in tables.
    """

    name: str
    unit: str = ""
    better: Literal["lower", "higher"] | None = "lower"
    digits: int = 3


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One thing that must be seen for the claim to hold, fixed before the experiment is run.

    It compares ``method`` with ``baseline`` on the same seeds. ``gain`` is the paired difference in the metric's
    better direction (positive = the method is better). The bar is met when the one-sided 95% lower confidence bound
    (Student's t over seeds) of the mean gain is at least ``margin``.

    Attributes:
        statement: The sentence that is true if the bar is met.
        method: Variant that should win.
        baseline: Variant it is compared with.
        metric: Key of :attr:`Claim.metrics`.
        margin: Smallest gain that counts, in the metric's unit. A negative margin states "at most this much worse".
    """

    statement: str
    method: str
    baseline: str
    metric: str
    margin: float = 0.0


class Context(Protocol):
    """What a running claim may use."""

    scale: Scale
    device: str
    #: Scratch folder of this run; removed afterwards.
    folder: Path

    def report(self, message: str) -> None:
        """Shows a line of progress."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An experiment that measures a method against its baselines.

    Attributes:
        method: Name of the method's card.
        statement: What is claimed, in a sentence.
        paper: The paper's number and setting.
        metrics: Metrics by key.
        variants: Variant key to its label; the first is the method, the rest its baselines and controls.
        bars: What must be seen.
        run: ``run(context, seed, prepared) -> Measurements``, for one seed. Must be deterministic given its arguments.
        prepare: Optional ``prepare(context) -> JSON-able dict``, run once before the seeds on a seed that is not
            among them: hyperparameter search with the same budget for every variant. Kept with the results.
        seeds: Seeds for each scale.
        notes: What this scale does not show, printed under the table.
    """

    method: str
    statement: str
    paper: str
    metrics: Mapping[str, Metric]
    variants: Mapping[str, str]
    bars: tuple[Bar, ...]
    run: Callable[[Context, int, Mapping[str, Any]], Measurements]
    prepare: Callable[[Context], Mapping[str, Any]] | None = None
    seeds: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"cpu": (0, 1, 2, 3, 4), "gpu": (0, 1, 2), "miniature": (0, 1)}
    )
    notes: str = ""
