"""A partition of sequences into three by two thresholds on features.

Source: section 5 of the paper (the optimal partition) and the official code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from modelwright.probing.memorization.features import check_features

#: Table to a label a row.
Route = Callable[[pd.DataFrame], Any]


@dataclass(frozen=True)
class Partition:
    """Two thresholds: A if the first feature reaches the first, else B if the second reaches the second, else C.

    Attributes:
        first: Name of the first feature.
        first_threshold: Least value of A.
        second: Name of the second feature.
        second_threshold: Least value of B.
    """

    first: str
    first_threshold: float
    second: str
    second_threshold: float

    def __call__(self, table: pd.DataFrame) -> np.ndarray:
        """Returns (rows,) ``A``, ``B`` or ``C``."""
        check_features(table, [self.first, self.second])
        first = table[self.first].to_numpy(dtype=float) >= self.first_threshold
        second = table[self.second].to_numpy(dtype=float) >= self.second_threshold
        return np.where(first, "A", np.where(second, "B", "C"))

    def __str__(self) -> str:
        return f"{self.first} >= {self.first_threshold:.4g}, else {self.second} >= {self.second_threshold:.4g}"
