"""Logistic regressions that predict memorisation: one for all, or one for each category; and tests of their weights.

Source: section 5 of the paper. Of the official code two errors are mended: its likelihood-ratio test is fed hard
predictions with one degree of freedom, and its scaler sees the test rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from modelwright.errors import UserError, require
from modelwright.probing.memorization.features import CONTINUOUS, PREDICTORS, check_features
from modelwright.probing.memorization.partition import Route
from modelwright.probing.memorization.taxonomy import DUPLICATE_THRESHOLD, categorize

require("sklearn", "probing", "predicting memorisation")

from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

#: Name of the only cell of the generic model.
EVERYTHING = "all"
INTERCEPT = "intercept"


class OneClass(UserWarning):
    """A category has memorised sequences only, or none."""


@dataclass(frozen=True)
class Cell:
    """The regression of one category.

    Attributes:
        features: Those that are not constant in the category.
        coefficients: (features + 1,) float64, the intercept first.
        covariance: (features + 1, features + 1): inverse of ``X' diag(p (1 - p)) X``, with the intercept's column.
        rows: Rows it was fitted on.
        memorized: How many of them are memorised.
    """

    features: tuple[str, ...]
    coefficients: np.ndarray
    covariance: np.ndarray
    rows: int
    memorized: int

    def logits(self, table: pd.DataFrame) -> np.ndarray:
        """Returns (rows,) float64 from a standardised table."""
        return self.coefficients[0] + table[list(self.features)].to_numpy(dtype=float) @ self.coefficients[1:]


class TaxonomicMemorizationModel(ClassifierMixin, BaseEstimator):
    """Predicts memorisation by a logistic regression for each category; an estimator of scikit-learn on tables.

    Continuous features are standardised by the mean and deviation of all rows of :meth:`fit`, the same for every
    category, so that coefficients compare. A category in which all rows are of one class cannot be fitted: it is warned
    of, is named in ``fallbacks_``, and is predicted by the regression on all rows; so are labels never seen.

    Args:
        partition: ``taxonomy``, None for the generic model, or a function from a table to a label a row, such as a
            :class:`~modelwright.probing.memorization.partition.Partition`.
        features: Columns that are read.
        C: Inverse strength of the L2 penalty, which spares the intercept.
        class_weight: As in scikit-learn.
        max_iter: Most iterations of the solver.
        threshold: Probability from which on a sequence is predicted as memorised.
        duplicate_threshold: Of the taxonomy.
        random_state: As in scikit-learn.

    Attributes:
        classes_: False and True.
        cells_: The regressions by category.
        base_: The regression on all rows.
        fallbacks_: Category to the reason why it has no regression of its own.
    """

    def __init__(
        self,
        partition: str | Route | None = "taxonomy",
        features: Sequence[str] = PREDICTORS,
        C: float = 1.0,
        class_weight: Any = "balanced",
        max_iter: int = 10_000,
        threshold: float = 0.5,
        duplicate_threshold: int = DUPLICATE_THRESHOLD,
        random_state: int | None = 1024,
    ) -> None:
        self.partition = partition
        self.features = features
        self.C = C
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.threshold = threshold
        self.duplicate_threshold = duplicate_threshold
        self.random_state = random_state

    def fit(self, table: pd.DataFrame, y: Any = None) -> TaxonomicMemorizationModel:
        """Fits.

        Args:
            table: Features; and ``memorized``, unless ``y`` is given.
            y: (rows,) truth values.

        Raises:
            UserError: A feature is missing or has NaN, or all rows are of one class.
        """
        labels = self._labels(table, y)
        check_features(table, self.features)
        if len(np.unique(labels)) < 2:
            what = "memorised" if len(labels) and labels[0] else "not memorised"
            raise UserError(f"All {len(labels)} sequences are {what}: there is nothing to predict.")
        continuous = [name for name in self.features if name in CONTINUOUS or not _binary(table[name])]
        values = table[continuous].to_numpy(dtype=float)
        scale = values.std(0)
        self.scaler_ = pd.DataFrame({"mean": values.mean(0), "scale": np.where(scale > 0, scale, 1.0)}, continuous)
        self.classes_ = np.array([False, True])
        self.n_features_in_ = len(self.features)
        scaled = self._scaled(table)
        self.base_ = self._fit_cell(scaled, labels)
        self.cells_: dict[str, Cell] = {}
        self.fallbacks_: dict[str, str] = {}
        routes = self.route(table)
        for cell in pd.unique(routes):
            inside = routes == cell
            found = labels[inside]
            if inside.all():
                self.cells_[cell] = self.base_
            elif len(np.unique(found)) < 2:
                reason = f"all {len(found)} training sequences are {'' if found[0] else 'not '}memorised"
                self.fallbacks_[cell] = reason
                warnings.warn(
                    f"The category '{cell}' has no model of its own, since {reason}: the model of all is used for it.",
                    OneClass,
                    stacklevel=2,
                )
            else:
                self.cells_[cell] = self._fit_cell(scaled[inside], found)
        self.cells_ = dict(sorted(self.cells_.items()))
        return self

    def predict_proba(self, table: pd.DataFrame) -> np.ndarray:
        """Returns (rows, 2) float64: probabilities of not memorised, and of memorised.

        Raises:
            UserError: A feature is missing or has NaN.
        """
        self._check_fitted()
        check_features(table, self.features)
        scaled, routes = self._scaled(table), self.route(table)
        logits = np.empty(len(table))
        for label in pd.unique(routes):
            inside = routes == label
            logits[inside] = self.cells_.get(label, self.base_).logits(scaled[inside])
        memorized = _sigmoid(logits)
        return np.stack([1 - memorized, memorized], axis=1)

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Returns (rows,) bool: whether the probability of memorised reaches the threshold."""
        return self.predict_proba(table)[:, 1] >= self.threshold

    def route(self, table: pd.DataFrame) -> np.ndarray:
        """Returns (rows,) of strings: the category whose regression is asked."""
        if self.partition is None:
            return np.full(len(table), EVERYTHING, dtype=object)
        if isinstance(self.partition, str):
            if self.partition != "taxonomy":
                raise UserError(f"The partition is '{self.partition}': use 'taxonomy', None, or a function.")
            return categorize(table, self.duplicate_threshold).to_numpy().astype(object)
        labels = np.asarray(self.partition(table), dtype=object)
        if labels.shape != (len(table),):
            raise UserError(f"The partition gave labels of shape {labels.shape} for {len(table)} sequences.")
        return labels

    def coef_frame(self) -> pd.DataFrame:
        """Returns a row for each category and feature: ``category``, ``feature``, ``coefficient``.

        Coefficients are per standard deviation. Features that are constant in a category have 0 there.
        """
        self._check_fitted()
        rows = []
        for name, cell in self.cells_.items():
            known = dict(zip((INTERCEPT, *cell.features), cell.coefficients, strict=True))
            rows += [(name, feature, known.get(feature, 0.0)) for feature in (INTERCEPT, *self.features)]
        return pd.DataFrame(rows, columns=["category", "feature", "coefficient"])

    def wald_test(self) -> pd.DataFrame:
        """Tests each coefficient against 0.

        ``W = (coefficient / se)^2`` is compared with chi-squared with one degree of freedom. Standard errors are from
        the inverse of ``X' diag(p (1 - p)) X`` with the intercept, without constant features. That is maximum
        likelihood's; with a penalty or class weights (the paper's choice, and the default) they are an approximation.
        For exact tests fit with ``C=float("inf"), class_weight=None``.

        Returns:
            ``category``, ``feature``, ``coefficient``, ``standard_error``, ``wald``, ``p_value``.
        """
        from scipy.stats import chi2

        self._check_fitted()
        rows = []
        for name, cell in self.cells_.items():
            errors = np.sqrt(np.clip(np.diag(cell.covariance), 0, None))
            for feature, value, error in zip((INTERCEPT, *cell.features), cell.coefficients, errors, strict=True):
                wald = (value / error) ** 2 if error > 0 else float("nan")
                rows.append((name, feature, value, error, wald, float(chi2.sf(wald, 1))))
        columns = ["category", "feature", "coefficient", "standard_error", "wald", "p_value"]
        return pd.DataFrame(rows, columns=columns)

    def likelihood_ratio_test(self, table: pd.DataFrame, y: Any = None) -> pd.DataFrame:
        """Tests whether regressions of their own explain the categories better than one regression for all.

        Both are fitted anew to the rows, by maximum likelihood (no penalty, no weights), from probabilities. The row
        ``all`` is the test of the whole: the generic model is the one whose categories have equal coefficients, so
        twice the gain in log-likelihood is compared with chi-squared, with as many degrees of freedom as there are
        coefficients more. The rows of the categories split that gain; they take the generic model as given, so their
        degrees of freedom are all coefficients of the category, which errs on the side of caution.
        Where features part the classes without a rest, likelihood has no maximum and the test no meaning.

        Args:
            table: The rows that were fitted.
            y: (rows,) truth values; None takes ``memorized``.

        Returns:
            ``category``, ``log_likelihood``, ``generic_log_likelihood``, ``statistic``, ``df``, ``p_value``.
        """
        from scipy.stats import chi2

        options = self.get_params() | {"C": float("inf"), "class_weight": None}
        labels = self._labels(table, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OneClass)  # told when the model was fitted
            own = TaxonomicMemorizationModel(**options).fit(table, labels)
        scaled, routes = own._scaled(table), own.route(table)
        rows, total, parameters = [], np.zeros(2), 0
        for name in own.cells_:
            inside = routes == name
            cell = own.cells_[name]
            both = np.array([_log_likelihood(c.logits(scaled[inside]), labels[inside]) for c in (cell, own.base_)])
            df = len(cell.coefficients)
            rows.append((name, *both, 2 * (both[0] - both[1]), df))
            total, parameters = total + both, parameters + df
        if not own.fallbacks_:
            rows.append((EVERYTHING, *total, 2 * (total[0] - total[1]), parameters - len(own.base_.coefficients)))
        columns = ["category", "log_likelihood", "generic_log_likelihood", "statistic", "df"]
        found = pd.DataFrame(rows, columns=columns)
        found["p_value"] = chi2.sf(found["statistic"].clip(lower=0), found["df"].clip(lower=1))
        return found

    def _fit_cell(self, scaled: pd.DataFrame, labels: np.ndarray) -> Cell:
        names = tuple(n for n in self.features if np.ptp(scaled[n].to_numpy(dtype=float)) > 0)
        values = scaled[list(names)].to_numpy(dtype=float)
        design = np.column_stack([np.ones(len(values)), values])
        if names:
            regression = LogisticRegression(
                C=self.C,
                class_weight=self.class_weight,
                max_iter=self.max_iter,
                random_state=self.random_state,
                # At lbfgs's usual tolerance the tests would differ from other programs' in the fourth digit.
                tol=1e-6,
            ).fit(values, labels)
            coefficients = np.concatenate([regression.intercept_, regression.coef_[0]])
        else:
            share = 0.5 if self.class_weight == "balanced" else labels.mean()
            coefficients = np.array([np.log(share / (1 - share))])
        chances = _sigmoid(design @ coefficients)
        information = design.T @ (design * (chances * (1 - chances))[:, None])
        return Cell(names, coefficients, np.linalg.pinv(information), len(labels), int(labels.sum()))

    def _scaled(self, table: pd.DataFrame) -> pd.DataFrame:
        scaled = table[list(self.features)].astype(float)
        names = list(self.scaler_.index)
        scaled[names] = (scaled[names] - self.scaler_["mean"]) / self.scaler_["scale"]
        return scaled

    def _labels(self, table: pd.DataFrame, y: Any) -> np.ndarray:
        if y is None and "memorized" not in table.columns:
            raise UserError("The table has no column 'memorized': give y.")
        labels = np.asarray(table["memorized"] if y is None else y)
        if labels.shape != (len(table),) or not set(np.unique(labels).tolist()) <= {0, 1}:
            raise UserError(f"Labels must be a truth value for each of the {len(table)} sequences.")
        return labels.astype(bool)

    def _check_fitted(self) -> None:
        if not hasattr(self, "cells_"):
            raise UserError("The model has not been fitted: call fit first.")


def _binary(column: pd.Series) -> bool:
    return set(np.unique(column.to_numpy())) <= {0, 1}


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # By tanh, which does not overflow.
    return 0.5 * (1 + np.tanh(logits / 2))


def _log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.logaddexp(0, np.where(labels, -logits, logits)).sum())
