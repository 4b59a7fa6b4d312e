"""Splits of the sequences: test rows come from the random sample alone, and are in no other part.

Source: section 5 of the paper. The official code may leave memorised test rows in the training set's scaler; here parts
share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from modelwright.errors import UserError


class Split(NamedTuple):
    """Rows of a table, ascending. ``train`` and ``test`` have none in common."""

    train: np.ndarray
    test: np.ndarray


def train_test_split(
    memorized: Any, in_sample: Any, categories: Any = None, *, test_share: float = 0.2, seed: int = 1024
) -> Split:
    """Splits as the paper does: tests on a part of the sample, trains on its rest and on all memorised sequences.

    Args:
        memorized: (rows,) truth values.
        in_sample: (rows,) whether the row is of the random sample; the others must be memorised sequences.
        categories: (rows,) labels; the sample is split alike in every category and class.
        test_share: Of the sample.
        seed: Of the split.

    Raises:
        UserError: A row is neither in the sample nor memorised, or the share leaves a part empty.
    """
    memorized, in_sample = np.asarray(memorized).astype(bool), np.asarray(in_sample).astype(bool)
    if (~memorized & ~in_sample).any():
        raise UserError("A row is neither of the random sample nor memorised, so it belongs to no part.")
    if not 0 < test_share < 1:
        raise UserError(f"test_share is {test_share}: give a share between 0 and 1.")
    sample = np.flatnonzero(in_sample)
    strata = memorized[sample].astype(int).astype(str)
    if categories is not None:
        strata = np.char.add(np.char.add(strata, "/"), np.asarray(categories).astype(str)[sample])
    rest, test = (sample[rows] for rows in split_rows(strata, [1 - test_share, test_share], seed))
    if not len(test) or not len(rest):
        raise UserError(f"A sample of {len(sample)} sequences is too small to be split into training and test rows.")
    return Split(np.sort(np.concatenate([rest, np.flatnonzero(memorized & ~in_sample)])), test)


def split_rows(labels: Any, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Splits rows at random, with nearly the same shares of every label in each part.

    Args:
        labels: (rows,) of any kind.
        shares: Of the parts; they add up to 1.
        seed: Of the order.

    Returns:
        The rows of each part, in ascending order.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    labels = np.asarray(labels)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(shares) * len(rows)).astype(int)[:-1]
        for part, chosen in zip(parts, np.split(rows, ends), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) if part else np.zeros(0, dtype=int) for part in parts]
