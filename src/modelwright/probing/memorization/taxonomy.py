"""The taxonomy: recitation, reconstruction, recollection.

It looks at the data alone, so sequences that no model memorised have a category too. Shares of categories are meant
*of the memorised sequences* wherever nothing else is said.

Source: section 4 of the paper.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from modelwright.errors import UserError
from modelwright.probing.memorization.features import check_features

#: In the order in which the rules are tried.
CATEGORIES = ("recitation", "reconstruction", "recollection")
#: Sequences with at least this many exact duplicates are recited (the paper: more than 5).
DUPLICATE_THRESHOLD = 6


def categorize(table: pd.DataFrame, duplicate_threshold: int = DUPLICATE_THRESHOLD) -> pd.Series:
    """Gives each sequence its category.

    At least ``duplicate_threshold`` duplicates make recitation; of the rest, templates make reconstruction; what is
    left is recollection.

    Args:
        table: Features: ``sequence_duplicates`` and ``is_templating`` are read.
        duplicate_threshold: Fewest duplicates of recited sequences.

    Returns:
        Categories of :data:`CATEGORIES`, on the table's index.

    Raises:
        UserError: A column is missing or has gaps.
    """
    check_features(table, ["sequence_duplicates", "is_templating"])
    recited = table["sequence_duplicates"].to_numpy() >= duplicate_threshold
    template = table["is_templating"].to_numpy().astype(bool)
    labels = np.where(recited, CATEGORIES[0], np.where(template, CATEGORIES[1], CATEGORIES[2]))
    return pd.Series(pd.Categorical(labels, categories=CATEGORIES), index=table.index, name="category")


def category_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Counts by category.

    Args:
        table: Rows with ``category`` and ``memorized``.

    Returns:
        A row a category: ``sequences``, ``memorized``, ``share_of_memorized`` (0 if nothing is), ``rate`` (memorised of
        the category's sequences).
    """
    rows = {}
    total = int(table["memorized"].sum())
    for category in CATEGORIES:
        chosen = table["memorized"][table["category"] == category]
        memorized = int(chosen.sum())
        rows[category] = {
            "sequences": len(chosen),
            "memorized": memorized,
            "share_of_memorized": memorized / total if total else 0.0,
            "rate": memorized / len(chosen) if len(chosen) else 0.0,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def divergence_by_duplicates(
    table: pd.DataFrame, *, most: int = 20, bins: int = 20, bootstrap: int = 100, fewest: int = 20, seed: int = 0
) -> pd.DataFrame:
    """Shows where a threshold of duplicates may stand: how unlike memorised and other sequences are at each count.

    For every number of duplicates, the Kullback-Leibler divergence (nats) of the continuation perplexities of memorised
    sequences from those of the others, as histograms of the logarithm with one more in each bin. The paper takes the
    threshold where it is largest. How it was binned is not published; these bins are ours.

    Args:
        table: Rows with ``sequence_duplicates``, ``continuation_perplexity`` and ``memorized``.
        most: Largest number of duplicates looked at.
        bins: Bins of the histograms, equal between the smallest and largest logarithm.
        bootstrap: Resamples of the sequences, for mean and spread.
        fewest: Counts with fewer memorised, or fewer other sequences are left out.
        seed: Of the resampling.

    Returns:
        A row a count: ``duplicates``, ``divergence``, ``sd``, ``memorized``, ``others``. It may be empty.
    """
    check_features(table, ["sequence_duplicates", "continuation_perplexity"])
    if bins < 2 or bootstrap < 1:
        raise UserError("At least 2 bins and 1 resample are needed.")
    generator = np.random.default_rng(seed)
    values = np.log(table["continuation_perplexity"].to_numpy(dtype=float))
    memorized = table["memorized"].to_numpy().astype(bool)
    duplicates = table["sequence_duplicates"].to_numpy()
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    edges = np.linspace(low, max(high, low + 1e-9), bins + 1)
    rows = []
    for count in range(1, most + 1):
        at = duplicates == count
        inside, outside = values[at & memorized], values[at & ~memorized]
        if min(len(inside), len(outside)) < fewest:
            continue
        draws = []
        for _ in range(bootstrap):
            laws = []
            for group in (inside, outside):
                drawn = np.histogram(generator.choice(group, len(group)), bins=edges)[0] + 1.0
                laws.append(drawn / drawn.sum())
            draws.append(float((laws[0] * np.log(laws[0] / laws[1])).sum()))
        spread = float(np.std(draws, ddof=1)) if bootstrap > 1 else 0.0
        rows.append((count, float(np.mean(draws)), spread, len(inside), len(outside)))
    return pd.DataFrame(rows, columns=["duplicates", "divergence", "sd", "memorized", "others"])
