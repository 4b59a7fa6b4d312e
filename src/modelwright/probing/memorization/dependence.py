"""Whether a feature and memorisation depend on each other, in every category and in all, and where the sign flips.

A feature may help memorisation in each category and hurt it in all together (Simpson's paradox): that is what a single
regression cannot say.

Source: section 5 of the paper; Chatterjee 2021 (A new coefficient of correlation) for xi.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from modelwright.errors import require
from modelwright.probing.memorization.features import PREDICTORS, check_features

ALL = "all"


def dependence_tests(
    table: pd.DataFrame, features: Sequence[str] = PREDICTORS, *, groups: Any = None, seed: int = 0
) -> pd.DataFrame:
    """Computes Pearson's r, Spearman's rho and Chatterjee's xi of each feature with memorisation.

    Args:
        table: Features and ``memorized``.
        features: Columns.
        groups: (rows,) labels, such as categories; each is tested beside all. None takes the column ``category``, if
            there is one.
        seed: Breaks ties of the feature, for xi.

    Returns:
        A row for each group and feature: ``group``, ``feature``, ``rows``, ``pearson``, ``pearson_p``, ``spearman``,
        ``spearman_p``, ``xi``, ``xi_p``; NaN where feature or label are constant.
    """
    stats = require("scipy.stats", "probing", "tests of dependence")
    check_features(table, features)
    if groups is None and "category" in table.columns:
        groups = table["category"]
    labels = table["memorized"].to_numpy().astype(float)
    sets = [(ALL, np.ones(len(table), dtype=bool))]
    if groups is not None:
        names = np.asarray(groups).astype(object)
        sets += [(str(name), names == name) for name in sorted(set(names.tolist()), key=str)]
    rows = []
    for name, inside in sets:
        own = labels[inside]
        for feature in features:
            values = table[feature].to_numpy(dtype=float)[inside]
            found = [float("nan")] * 6
            if len(own) > 2 and np.ptp(values) > 0 and np.ptp(own) > 0:
                pearson, spearman = stats.pearsonr(values, own), stats.spearmanr(values, own)
                found = [*map(float, pearson), *map(float, spearman), *xi_test(values, own, seed=seed)]
            rows.append((name, feature, len(own), *found))
    columns = ["group", "feature", "rows", "pearson", "pearson_p", "spearman", "spearman_p", "xi", "xi_p"]
    return pd.DataFrame(rows, columns=columns)


def sign_flips(tests: pd.DataFrame, *, statistic: str = "spearman", level: float = 0.05) -> pd.DataFrame:
    """Finds features whose sign in a group is the opposite of their sign in all, both below a level.

    Args:
        tests: From :func:`dependence_tests`.
        statistic: ``pearson`` or ``spearman``.
        level: Largest p-value of either.

    Returns:
        A row a flip: ``feature``, ``group``, ``in_group``, ``in_all``.
    """
    whole = tests[tests["group"] == ALL].set_index("feature")
    rows = []
    for row in tests[tests["group"] != ALL].to_dict("records"):
        pooled = whole.loc[row["feature"]]
        if max(row[f"{statistic}_p"], pooled[f"{statistic}_p"]) > level:
            continue
        if row[statistic] * pooled[statistic] < 0:
            rows.append((row["feature"], row["group"], row[statistic], float(pooled[statistic])))
    return pd.DataFrame(rows, columns=["feature", "group", "in_group", "in_all"])


def xi_test(x: Any, y: Any, *, seed: int = 0) -> tuple[float, float]:
    """Returns Chatterjee's xi of y on x, and the one-sided p-value of independence (normal approximation).

    Xi is near 0 where y does not depend on x, and near 1 where it is a function of it, rising or not. Ties of y are
    allowed for; ties of x are broken at random.

    Args:
        x: (n,) numbers.
        y: (n,) numbers.
        seed: Breaks the ties.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n = len(x)
    order = np.lexsort((np.random.default_rng(seed).random(n), x))
    values = y[order]
    ascending = np.sort(y)
    below = np.searchsorted(ascending, values, "right").astype(float)  # how many are at most this
    above = n - np.searchsorted(ascending, values, "left").astype(float)  # how many are at least this
    spread = float((above * (n - above)).sum())
    if not spread:
        return float("nan"), float("nan")
    xi = 1 - n * float(np.abs(np.diff(below)).sum()) / (2 * spread)
    # The variance under independence, Theorem 2.2 of Chatterjee 2021.
    u = np.sort(below)
    v = np.cumsum(u)
    i = np.arange(1, n + 1)
    a = float(((2 * n - 2 * i + 1) * u**2).sum()) / n**4
    b = float(((v + (n - i) * u) ** 2).sum()) / n**5
    c = float(((2 * n - 2 * i + 1) * u).sum()) / n**3
    d = spread / n**3
    deviation = math.sqrt(max(a - 2 * b + c**2, 0.0)) / d
    return xi, 0.5 * math.erfc(math.sqrt(n) * xi / deviation / math.sqrt(2)) if deviation else float("nan")
