"""Token types by how often they stand in the training corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from modelwright.errors import UserError


@dataclass(frozen=True)
class FrequencyBins:
    """Every type of a vocabulary in one bin of training frequency.

    Bin 0 holds the types that the training corpus does not have: held-out text may. Bin ``k`` from 1 holds counts in
    ``[base ** (k - 1), base ** k)``. The paper bins "by powers of 3"; that edges belong to the bin above is our choice.

    Attributes:
        base: Ratio of the edges.
        counts: (V,) int64, occurrences in the training corpus.
        index: (V,) int64, the bin of each type.
    """

    base: int
    counts: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return int(self.index.max(initial=0)) + 1

    def edges(self, number: int) -> tuple[int, int]:
        """Returns a bin's smallest count and the one that it ends before."""
        return (0, 1) if number == 0 else (self.base ** (number - 1), self.base**number)

    def label(self, number: int) -> str:
        """Returns a bin in words, such as ``[3, 9)``."""
        low, high = self.edges(number)
        return "0" if number == 0 else f"[{low}, {high})"


def frequency_bins(counts: Any, base: int = 3) -> FrequencyBins:
    """Sorts types into bins by training frequency.

    Args:
        counts: (V,) integers, each type's occurrences as a target in the training corpus: a
            :class:`~modelwright.probing.fair_lm.counts.TokenCounts`, an array or a tensor.
        base: Ratio of the bins' edges, at least 2.

    Raises:
        UserError: Counts that are negative, not whole numbers, not one-dimensional or all zero; or a base below 2.
    """
    counts = check_counts(counts)
    if int(base) != base or base < 2:
        raise UserError(f"The base of frequency bins must be a whole number of at least 2, not {base}.")
    if not counts.any():
        raise UserError("The training counts are all zero, so there is no frequency to sort by: count a corpus.")
    edges = [1]  # whole numbers: a logarithm would put 243 below 3 ** 5
    while edges[-1] <= counts.max():
        edges.append(edges[-1] * int(base))
    return FrequencyBins(int(base), counts, np.searchsorted(np.array(edges), counts, side="right").astype(np.int64))


def check_counts(counts: Any) -> np.ndarray:
    """Returns counts as (V,) int64.

    Raises:
        UserError: They are negative, not whole numbers or not one-dimensional.
    """
    found = np.asarray(counts)
    if found.ndim != 1 or not len(found):
        raise UserError(f"Counts must be one number for each token type, not of shape {found.shape}.")
    if not np.issubdtype(found.dtype, np.integer):
        if not np.issubdtype(found.dtype, np.floating) or not np.array_equal(found, np.rint(found)):
            raise UserError("Counts must be whole numbers.")
        found = np.rint(found)
    if found.min() < 0:
        raise UserError(f"Token {int(found.argmin())} has a count of {int(found.min())}: counts cannot be negative.")
    return found.astype(np.int64)
