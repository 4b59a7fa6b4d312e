"""What is said of a model's table: counts by category, factors, and predictive models with their tests. Plain JSON."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modelwright.errors import UserError
from modelwright.files import write_json
from modelwright.probing.memorization.comparison import METRICS, compare, scores
from modelwright.probing.memorization.dependence import dependence_tests, sign_flips
from modelwright.probing.memorization.features import PREDICTORS
from modelwright.probing.memorization.predictive import OneClass, TaxonomicMemorizationModel
from modelwright.probing.memorization.search import search_partition
from modelwright.probing.memorization.splits import train_test_split
from modelwright.probing.memorization.taxonomy import (
    CATEGORIES,
    DUPLICATE_THRESHOLD,
    category_shares,
    divergence_by_duplicates,
)

#: Memorised, and other, sequences in the sample without which no model is fitted.
FEWEST = 20


@dataclass
class MemorizationReport:
    """An audit's findings.

    Attributes:
        models: Name to findings, in the order given: see :func:`summarise`.
        settings: How they were made.
    """

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def shares(self) -> pd.DataFrame:
        """Returns a row a model: how many sequences it memorised, and each category's share of them.

        The number of sequences memorised is of all that were read; the axis of sizes or checkpoints is the order of
        rows.
        """
        rows = []
        for name, found in self.models.items():
            shares = {c: found["categories"][c]["share_of_memorized"] for c in CATEGORIES}
            rows.append({"model": name, "sequences": found["sequences"], "memorized": found["memorized"], **shares})
        return pd.DataFrame(rows)

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON; numbers that are none become null."""
        return {"settings": _plain(self.settings), "models": _plain(self.models)}

    def save(self, path: str | Path, force: bool = True) -> None:
        """Writes JSON."""
        write_json(path, self.as_json(), force)


def summarise(
    table: pd.DataFrame,
    *,
    sequences: int | None = None,
    duplicate_threshold: int = DUPLICATE_THRESHOLD,
    bootstrap: int = 500,
    search: bool = False,
    workers: int = 1,
    seed: int = 1024,
) -> dict[str, Any]:
    """Summarises one model.

    Args:
        table: Features with ``memorized``, ``category``, ``in_sample``.
        sequences: How many sequences were read; None takes the rows of the table.
        duplicate_threshold: Of the taxonomy.
        bootstrap: Resamples of the comparison.
        search: Search the best partition as well (minutes).
        workers: Processes of the search.
        seed: Of splits and resamples.

    Returns:
        ``sequences``, ``memorized``, ``categories`` (of the memorised), ``sample_categories`` (with rates),
        ``factors`` (medians of memorised and other sequences by category), ``dependence``, ``sign_flips``,
        ``divergence``, and ``prediction`` (None with the reason under ``prediction_refused`` where there are too few
        sequences of either kind).
    """
    sample = table[table["in_sample"]]
    tests = dependence_tests(sample, seed=seed)
    found: dict[str, Any] = {
        "sequences": len(table) if sequences is None else sequences,
        "memorized": int(table["memorized"].sum()),
        # Every memorised sequence is in the table, and of the others only the sample's: rates are the sample's alone.
        "categories": category_shares(table)[["memorized", "share_of_memorized"]].to_dict("index"),
        "sample_categories": category_shares(sample).to_dict("index"),
        "factors": _factors(table),
        "dependence": tests.to_dict("records"),
        "sign_flips": sign_flips(tests).to_dict("records"),
        "divergence": divergence_by_duplicates(table, bootstrap=100, seed=seed).to_dict("records"),
        "prediction": None,
        "prediction_refused": None,
    }
    memorized = int(sample["memorized"].sum())
    if min(memorized, len(sample) - memorized) < FEWEST:
        found["prediction_refused"] = (
            f"Of the {len(sample)} sequences of the random sample {memorized} are memorised; regressions need "
            f"{FEWEST} of either kind."
        )
        return found
    found["prediction"] = predict(
        table, duplicate_threshold=duplicate_threshold, bootstrap=bootstrap, search=search, workers=workers, seed=seed
    )
    return found


def predict(
    table: pd.DataFrame,
    *,
    duplicate_threshold: int = DUPLICATE_THRESHOLD,
    bootstrap: int = 500,
    search: bool = False,
    workers: int = 1,
    seed: int = 1024,
) -> dict[str, Any]:
    """Fits the generic and the taxonomic model and compares them on test rows.

    Args:
        table: See :func:`summarise`.
        duplicate_threshold: Of the taxonomy.
        bootstrap: Resamples of the comparison.
        search: Search the best partition as well, on the training rows.
        workers: Processes of the search.
        seed: Of splits and resamples.

    Returns:
        ``rows``, ``scores`` (model to rows of metrics), ``comparison``, ``coefficients`` (with Wald tests),
        ``likelihood_ratio``, ``fallbacks``, ``search``.
    """
    split = train_test_split(table["memorized"], table["in_sample"], table["category"], seed=seed)
    train, test = table.iloc[split.train], table.iloc[split.test]
    base = TaxonomicMemorizationModel(partition=None).fit(train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OneClass)  # said in the report
        model = TaxonomicMemorizationModel(duplicate_threshold=duplicate_threshold).fit(train)
    models: dict[str, Any] = {"generic": base, "taxonomic": model}
    searched: dict[str, Any] | None = None
    if search:
        try:
            best = search_partition(train, workers=workers, seed=seed)
        except UserError as error:
            searched = {"refused": str(error)}
        else:
            models["best partition"] = TaxonomicMemorizationModel(partition=best.best).fit(train)
            searched = {"partition": str(best.best), "validation_f1": best.score, "tried": len(best.candidates)}
    groups = test["category"]
    compared = compare(base, model, test, METRICS, bootstrap=bootstrap, groups=groups, seed=seed)
    wald = pd.concat([base.wald_test(), model.wald_test()], ignore_index=True)
    return {
        "rows": {"train": len(train), "test": len(test)},
        "scores": {name: scores(m, test, groups=groups).to_dict("records") for name, m in models.items()},
        "comparison": compared.to_dict("records"),
        "coefficients": wald.to_dict("records"),
        "likelihood_ratio": model.likelihood_ratio_test(train).to_dict("records"),
        "fallbacks": model.fallbacks_,
        "calibration": {name: _reliability(m, test) for name, m in models.items()},
        "search": searched,
    }


def _reliability(model: Any, test: pd.DataFrame, bins: int = 10) -> list[dict[str, float]]:
    """Mean probability of memorised, and the share that is, in bins of equal width."""
    chances, labels = model.predict_proba(test)[:, 1], test["memorized"].to_numpy().astype(float)
    place = np.clip((chances * bins).astype(int), 0, bins - 1)
    return [
        {
            "predicted": float(chances[place == b].mean()),
            "seen": float(labels[place == b].mean()),
            "rows": int((place == b).sum()),
        }
        for b in range(bins)
        if (place == b).any()
    ]


def _factors(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for category in CATEGORIES:
        inside = table["category"] == category
        both = [table[inside & (table["memorized"] == m)] for m in (True, False)]
        if not any(map(len, both)):
            continue
        for feature in PREDICTORS:
            values = [float(part[feature].astype(float).median()) if len(part) else float("nan") for part in both]
            rows.append({"category": category, "feature": feature, "memorized": values[0], "others": values[1]})
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
