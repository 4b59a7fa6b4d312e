"""Which types a run learns first: learning speed from losses at several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from modelwright.errors import UserError
from modelwright.probing.fair_lm.bins import FrequencyBins
from modelwright.probing.fair_lm.report import TokenLossReport


@dataclass(frozen=True, eq=False)
class LearningSpeed:
    """Speed in [0, 1] of each type; larger is faster.

    Attributes:
        per_token: (V,) float64, NaN for types that did not occur.
    """

    per_token: np.ndarray

    @property
    def mean(self) -> float:
        """Mean over the types that occurred."""
        return float(np.nanmean(self.per_token))

    def by_bin(self, bins: FrequencyBins) -> dict[int, float]:
        """Returns the mean speed of the types of each bin that has any, from rare to frequent.

        Raises:
            UserError: The bins are of another vocabulary.
        """
        if len(bins.index) != len(self.per_token):
            raise UserError(
                f"The frequency bins are for {len(bins.index)} token types, but the speeds for {len(self.per_token)}."
            )
        known = ~np.isnan(self.per_token)
        present = sorted(set(bins.index[known].tolist()))
        return {number: float(self.per_token[known & (bins.index == number)].mean()) for number in present}

    def gap(self, bins: FrequencyBins) -> float | None:
        """Returns the speed of the most frequent bin minus that of the rarest; None with fewer than two bins."""
        speeds = [speed for number, speed in self.by_bin(bins).items() if number > 0]
        return speeds[-1] - speeds[0] if len(speeds) > 1 else None


def learning_speed(
    reports: Sequence[TokenLossReport],
    method: Literal["auc", "minmax"] = "auc",
    steps: Sequence[float] | None = None,
) -> LearningSpeed:
    """Returns one minus the area under each type's loss curve, where the curve begins at 1 and lasts from 0 to 1.

    With ``r_v(t) = clip(L_v(t) / L_v(0), 0, 1)`` and K intervals,
    ``s_v = 1 - (1 / K) sum_t (r_v(t - 1) + r_v(t)) / 2``: a loss that stays gives 0, one that is 0 from the second
    checkpoint on gives ``1 - 1 / (2 K)``. The paper speaks of a normalised area under the curve; the exact form is not
    known to us, and this is our reading. A type whose loss is 0 at the first checkpoint has nothing to learn: 0.

    Args:
        reports: Losses on the same data at checkpoints 0 to K, oldest first. The first should be of the untrained
            model, which gives all types about ``ln V``: a late first checkpoint hides differences in its norm.
        method: ``auc``, or ``minmax``: ``r_v(t) = (L_v(t) - min L_v) / (L_v(0) - min L_v)``, which asks how early a
            type gets where it gets, not how far.
        steps: Training step of each checkpoint; equally spaced by default.

    Raises:
        UserError: Fewer than two checkpoints, other data or vocabularies among them, or steps that do not grow.
    """
    if len(reports) < 2:
        raise UserError(f"Learning speed needs at least 2 checkpoints, not {len(reports)}.")
    first = reports[0]
    for report in reports[1:]:
        if report.vocab_size != first.vocab_size:
            raise UserError(
                f"Checkpoints of vocabularies of {first.vocab_size} and {report.vocab_size} types cannot be compared."
            )
        if not np.array_equal(report.counts, first.counts):
            raise UserError("The checkpoints were measured on different data: measure all on the same.")
    at = np.arange(len(reports)) if steps is None else np.asarray(steps, np.float64)
    if len(at) != len(reports) or (np.diff(at) <= 0).any():
        raise UserError("Give one step for each checkpoint, each greater than the one before.")
    if method not in ("auc", "minmax"):
        raise UserError(f"There is no learning speed '{method}': known: auc, minmax.")
    losses = np.stack([report.per_token[first.seen] for report in reports])
    floor = losses.min(0) if method == "minmax" else np.zeros(losses.shape[1])
    range_ = losses[0] - floor
    ratio = np.divide(losses - floor, range_, out=np.ones_like(losses), where=range_ > 0).clip(0, 1)
    area = ((ratio[1:] + ratio[:-1]) / 2 * np.diff(at)[:, None]).sum(0) / (at[-1] - at[0])
    speeds = np.full(first.vocab_size, np.nan)
    speeds[first.seen] = 1 - area
    return LearningSpeed(speeds)
