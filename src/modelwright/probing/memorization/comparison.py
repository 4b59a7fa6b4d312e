"""How well memorisation is predicted, and whether one model predicts it better than another.

All metrics but precision, recall and F1 are of probabilities. Spread is by a true bootstrap over sequences (the
official code's error bars leave out 1% of the rows in turn, which makes them about ten times too small).

Source: section 5 of the paper; Guo et al. 2017 for the calibration error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from modelwright.errors import UserError, did_you_mean

METRICS = ("precision", "recall", "f1", "pr_auc", "roc_auc", "ece", "log_loss")
LOWER_IS_BETTER = ("ece", "log_loss")


def expected_calibration_error(labels: Any, probabilities: Any, bins: int = 10, weights: Any = None) -> float:
    """Returns the mean distance of confidence from accuracy, over bins of confidence.

    Args:
        labels: (n,) truth values.
        probabilities: (n,) of the positive class. Confidence is the larger of the two classes' probabilities, as in the
            official code.
        bins: Bins of equal width from 0 to 1 (10 in the official training, 5 in its tables).
        weights: (n,) how often each counts.
    """
    labels, probabilities = np.asarray(labels).astype(bool), np.asarray(probabilities, dtype=float)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    if not weights.sum():
        return float("nan")
    predicted = probabilities >= 0.5
    confidence = np.where(predicted, probabilities, 1 - probabilities)
    # A confidence of exactly a bin's upper edge belongs to it.
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights * ((predicted == labels) - confidence), minlength=bins)
    return float(np.abs(gap).sum() / weights.sum())


def measure(
    labels: Any, probabilities: Any, metric: str, *, threshold: float = 0.5, bins: int = 10, weights: Any = None
) -> float:
    """Returns one metric; NaN where it is not defined, such as areas where all are of one class.

    Args:
        labels: (n,) truth values.
        probabilities: (n,) float, of memorised.
        metric: One of :data:`METRICS`.
        threshold: For precision, recall and F1.
        bins: For the calibration error.
        weights: (n,) how often each row counts.

    Raises:
        UserError: No such metric.
    """
    if metric not in METRICS:
        raise UserError(f"There is no metric '{metric}': {did_you_mean(metric, METRICS)}")
    labels, probabilities = np.asarray(labels).astype(bool), np.asarray(probabilities, dtype=float)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=float)
    positive, negative = weights[labels].sum(), weights[~labels].sum()
    if metric == "ece":
        return expected_calibration_error(labels, probabilities, bins, weights)
    if metric == "log_loss":
        if not weights.sum():
            return float("nan")
        right = np.clip(np.where(labels, probabilities, 1 - probabilities), 1e-15, 1)
        return float(-(weights * np.log(right)).sum() / weights.sum())
    if metric in ("pr_auc", "roc_auc"):
        if not positive or not negative:
            return float("nan")
        return _area(labels, probabilities, weights, metric)
    predicted = probabilities >= threshold
    hit = weights[predicted & labels].sum()
    called = weights[predicted].sum()
    if metric == "precision":
        return float(hit / called) if called else float("nan")
    if metric == "recall":
        return float(hit / positive) if positive else float("nan")
    return float(2 * hit / (called + positive)) if called + positive else float("nan")


def _area(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, metric: str) -> float:
    """Average precision, or the area under the ROC curve with ties halved."""
    order = np.argsort(-probabilities, kind="stable")
    sorted_probabilities = probabilities[order]
    last = np.append(np.flatnonzero(np.diff(sorted_probabilities)), len(order) - 1)
    true = np.cumsum(weights[order] * labels[order])[last]
    every = np.cumsum(weights[order])[last]
    false = every - true
    if metric == "pr_auc":
        gained = np.diff(true, prepend=0.0)
        precision = np.divide(true, every, out=np.zeros_like(true), where=every > 0)
        return float((gained * precision).sum() / true[-1])
    before = np.concatenate([[0.0], true[:-1]])
    return float((np.diff(false, prepend=0.0) * (true + before) / 2).sum() / (true[-1] * false[-1]))


def scores(
    model: Any, table: pd.DataFrame, metrics: Sequence[str] = METRICS, *, groups: Any = None, bins: int = 10
) -> pd.DataFrame:
    """Measures a fitted model.

    Args:
        model: With ``predict_proba``.
        table: Test rows, with ``memorized``.
        metrics: Of :data:`METRICS`.
        groups: (rows,) labels; each gets a row beside the one of all.
        bins: For the calibration error.

    Returns:
        A row for ``all`` and for each group: ``group``, ``rows``, ``memorized`` and the metrics.
    """
    labels = table["memorized"].to_numpy().astype(bool)
    chances = model.predict_proba(table)[:, 1]
    threshold = getattr(model, "threshold", 0.5)
    found = []
    for name, inside in _grouped(len(table), groups):
        row: dict[str, Any] = {"group": name, "rows": int(inside.sum()), "memorized": int(labels[inside].sum())}
        row |= {m: measure(labels[inside], chances[inside], m, threshold=threshold, bins=bins) for m in metrics}
        found.append(row)
    return pd.DataFrame(found)


def compare(
    base: Any,
    model: Any,
    table: pd.DataFrame,
    metrics: Sequence[str] = ("pr_auc", "f1", "ece"),
    *,
    bootstrap: int = 500,
    groups: Any = None,
    confidence: float = 0.95,
    bins: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Compares two fitted models on the same rows, by resampling the rows with replacement.

    Args:
        base: The baseline, with ``predict_proba``.
        model: The other.
        table: Test rows, with ``memorized``.
        metrics: Of :data:`METRICS`.
        bootstrap: Resamples. Both models are measured on each, so that the difference is paired.
        groups: (rows,) labels; each is compared beside all, with resamples of its own rows.
        confidence: Of the intervals (percentiles).
        bins: For the calibration error.
        seed: Of the resampling.

    Returns:
        A row for each group and metric: ``group``, ``metric``, ``base``, ``model``, ``difference`` (model less base),
        ``low`` and ``high`` of its interval, ``base_sd``, ``model_sd``.

    Raises:
        UserError: No such metric, or fewer than 2 resamples.
    """
    if bootstrap < 2:
        raise UserError(f"bootstrap is {bootstrap}: at least 2 resamples are needed.")
    labels = table["memorized"].to_numpy().astype(bool)
    chances = [m.predict_proba(table)[:, 1] for m in (base, model)]
    thresholds = [getattr(m, "threshold", 0.5) for m in (base, model)]
    rows = []
    for name, inside in _grouped(len(table), groups):
        generator = np.random.default_rng(seed)
        own, both = labels[inside], [c[inside] for c in chances]

        def values(weights: Any, metric: str, own: Any = own, both: Any = both) -> list[float]:
            return [measure(own, c, metric, threshold=t, bins=bins, weights=weights) for c, t in zip(both, thresholds)]

        draws: dict[str, list[list[float]]] = {metric: [] for metric in metrics}
        size = len(own)
        for _ in range(bootstrap if size else 0):
            counts = np.bincount(generator.integers(0, size, size), minlength=size).astype(float)
            for metric in metrics:
                draws[metric].append(values(counts, metric))
        for metric in metrics:
            seen = values(None, metric)
            rows.append({"group": name, "metric": metric, **_summary(seen, draws[metric], confidence)})
    return pd.DataFrame(rows)


def _summary(seen: Sequence[float], draws: list[list[float]], confidence: float) -> Mapping[str, float]:
    table = np.array(draws, dtype=float).reshape(-1, 2)
    table = table[~np.isnan(table).any(1)]
    low = high = base_sd = model_sd = float("nan")
    if len(table) > 1:
        tail = 50 * (1 - confidence)
        low, high = (float(v) for v in np.percentile(table[:, 1] - table[:, 0], [tail, 100 - tail]))
        base_sd, model_sd = (float(v) for v in table.std(0, ddof=1))
    return {
        "base": seen[0], "model": seen[1], "difference": seen[1] - seen[0], "low": low, "high": high,
        "base_sd": base_sd, "model_sd": model_sd,
    }  # fmt: skip


def _grouped(rows: int, groups: Any) -> list[tuple[str, np.ndarray]]:
    found = [("all", np.ones(rows, dtype=bool))]
    if groups is not None:
        labels = np.asarray(groups).astype(object)
        found += [(str(name), labels == name) for name in sorted(set(labels.tolist()), key=str)]
    return found
