"""The search for the best partition: every ordered pair of thresholds on features, each judged by its predictions.

Source: section 5 of the paper and the official code.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from modelwright.errors import UserError
from modelwright.probing.memorization.comparison import LOWER_IS_BETTER, measure
from modelwright.probing.memorization.features import PREDICTORS, check_features
from modelwright.probing.memorization.partition import Partition
from modelwright.probing.memorization.predictive import TaxonomicMemorizationModel
from modelwright.probing.memorization.splits import split_rows

#: Features of which thresholds are searched (no quartiles of frequencies, no perplexity of prompt or sequence).
SEARCHED = tuple(
    name
    for name in PREDICTORS
    if name not in ("frequency_p25", "frequency_p75", "prompt_perplexity", "sequence_perplexity")
)
QUANTILES = (0.25, 0.5, 0.75)


class PartitionSearch(NamedTuple):
    """What a search found.

    Attributes:
        best: The partition of the best score.
        score: That score.
        candidates: A row for each candidate with its features, quantiles, thresholds and score; NaN where a cell is
            empty or of one class, so that it was skipped.
    """

    best: Partition
    score: float
    candidates: pd.DataFrame


def search_partition(
    table: pd.DataFrame,
    features: Sequence[str] = SEARCHED,
    quantiles: Sequence[float] = QUANTILES,
    *,
    predictors: Sequence[str] = PREDICTORS,
    validation_share: float = 0.2,
    metric: str = "f1",
    workers: int = 1,
    seed: int = 1024,
    **options: Any,
) -> PartitionSearch:
    """Tries every ordered pair of thresholds: 810 with the paper's 10 features and 3 quantiles.

    Each candidate routes a model of three regressions, fitted on one part of the rows and scored on the others.
    Quantiles are those of the memorised rows. The test rows have no place here.

    Args:
        table: Features and ``memorized``.
        features: Features of the thresholds.
        quantiles: Quantiles that are thresholds.
        predictors: Features that the regressions read.
        validation_share: Share of the rows that candidates are scored on.
        metric: Of :data:`~modelwright.probing.memorization.comparison.METRICS`; higher must be better.
        workers: Processes.
        seed: Of the split.
        **options: Of :class:`~modelwright.probing.memorization.predictive.TaxonomicMemorizationModel`.

    Raises:
        UserError: There are too few memorised or other rows, or every candidate leaves a cell without both classes.
    """
    if metric in LOWER_IS_BETTER:
        raise UserError(f"The search takes the largest {metric}, which is the worst: choose another metric.")
    if not 0 < validation_share < 1:
        raise UserError(f"validation_share is {validation_share}: give a share between 0 and 1.")
    check_features(table, [*predictors, *features])
    rows = split_rows(table["memorized"].to_numpy(), [1 - validation_share, validation_share], seed)
    memorized = table[table["memorized"].to_numpy().astype(bool)]
    fitted, scored = table.iloc[rows[0]], table.iloc[rows[1]]
    tried = []
    for first, second in itertools.permutations(features, 2):
        for p, q in itertools.product(quantiles, repeat=2):
            limits = [float(memorized[f].astype(float).quantile(x)) for f, x in ((first, p), (second, q))]
            tried.append((first, p, second, q, Partition(first, limits[0], second, limits[1])))
    calls = [(partition, fitted, scored, tuple(predictors), metric, options) for *_, partition in tried]
    scores = list(_scores(calls, workers))
    candidates = pd.DataFrame(
        [
            (first, p, part.first_threshold, second, q, part.second_threshold, score)
            for (first, p, second, q, part), score in zip(tried, scores, strict=True)
        ],
        columns=["first", "quantile", "threshold", "second", "second_quantile", "second_threshold", "score"],
    )
    if candidates["score"].isna().all():
        raise UserError("Every partition leaves a cell without both classes: there are too few memorised sequences.")
    best = int(np.nanargmax(candidates["score"]))
    return PartitionSearch(tried[best][-1], float(candidates["score"][best]), candidates)


def _scores(calls: Iterable[tuple[Any, ...]], workers: int) -> Iterable[float]:
    if workers == 1:
        return (_score(*call) for call in calls)
    import joblib

    return joblib.Parallel(n_jobs=workers)(joblib.delayed(_score)(*call) for call in calls)


def _score(
    partition: Partition, fitted: pd.DataFrame, scored: pd.DataFrame, predictors: Any, metric: str, options: Any
) -> float:
    cells = partition(fitted)
    memorized = fitted["memorized"].to_numpy().astype(bool)
    if any(len(set(memorized[cells == cell])) < 2 for cell in "ABC"):
        return float("nan")
    model = TaxonomicMemorizationModel(partition=partition, features=predictors, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a candidate that does not converge is judged by its score
        model.fit(fitted)
    return measure(scored["memorized"].to_numpy(), model.predict_proba(scored)[:, 1], metric)
