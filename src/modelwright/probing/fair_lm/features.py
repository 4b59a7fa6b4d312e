"""The unconstrained-features model behind the paper's theory: no training noise, a solution in seconds.

Features of every occurrence are free variables instead of a network's output:

    minimise over W (V, d), H (d, N) >= 0:  (1 / N) sum_i CE(W h_i, y_i) + (lambda_W / 2) |W|^2 + (lambda_H / 2) |H|^2

At a minimum the features of one class are equal (the loss is convex in each), so only their means (V, d) are solved
for, each weighing ``n_v`` times; ``collapse=False`` solves for all N. With ``d >= V``, which no real language model
has, classes are orthogonal and a class's margin depends on its count and on lambda alone; a class that is too rare for
its lambda has no feature left, and chance-level loss. It is intuition, not proof.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modelwright.errors import UserError, require
from modelwright.probing.fair_lm.bins import check_counts


@dataclass(frozen=True, eq=False)
class FeatureSolution:
    """A minimum of the unconstrained-features model.

    Attributes:
        losses: (V,) float64, mean loss of each class in nats.
        weights: (V, d) float64.
        features: (V, d) float64, of each class, or (N, d) in the order of the classes without ``collapse``.
        objective: Value of what was minimised.
        gradient: Largest entry of the projected gradient there.
    """

    losses: np.ndarray
    weights: np.ndarray
    features: np.ndarray
    objective: float
    gradient: float


def solve_features(
    counts: Any,
    weight_decay: float,
    feature_decay: float | None = None,
    *,
    dimension: int | None = None,
    collapse: bool = True,
    seed: int = 0,
    max_iterations: int = 20_000,
) -> FeatureSolution:
    """Minimises by L-BFGS with bounds, in float64, from several starts, and returns the lowest minimum.

    A class without a feature is a minimum for that class whatever the others do, so one start is not enough. With
    ``d >= V`` each start gives the classes from some count on a direction of their own and leaves the rarer ones near
    zero; otherwise the starts are random.

    Args:
        counts: (V,) occurrences of each class, at least 1.
        weight_decay: lambda_W.
        feature_decay: lambda_H; that of the weights by default.
        dimension: d; V by default.
        collapse: Whether all features of a class are one variable.
        seed: Seed of the start.
        max_iterations: Iterations at most.

    Raises:
        UserError: A count below 1, a decay that is not positive, a dimension below 1, no convergence, or scipy missing.
    """
    optimize = require("scipy.optimize", "probing", "the unconstrained-features model")
    counts = check_counts(counts)
    classes, width = len(counts), dimension if dimension is not None else len(counts)
    feature_decay = weight_decay if feature_decay is None else feature_decay
    if counts.min() < 1:
        raise UserError("Every class of the unconstrained-features model needs a count of at least 1.")
    if not (weight_decay > 0 and feature_decay > 0):
        raise UserError(f"The decays must be greater than 0, not {weight_decay} and {feature_decay}.")
    if width < 1:
        raise UserError(f"The dimension must be at least 1, not {width}.")
    labels = np.arange(classes) if collapse else np.repeat(np.arange(classes), counts)
    targets = torch.from_numpy(labels)
    weigh = torch.from_numpy(counts if collapse else np.ones(len(targets))).double()
    total = float(counts.sum())

    def losses_of(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(features @ weights.T, targets, reduction="none")

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).requires_grad_()
        weights, features = x[: classes * width].view(classes, width), x[classes * width :].view(-1, width)
        value = (weigh * losses_of(weights, features)).sum() / total
        value = value + weight_decay / 2 * weights.square().sum()
        value = value + feature_decay / 2 * (weigh * features.square().sum(1)).sum()
        value.backward()
        assert x.grad is not None
        return float(value.detach()), x.grad.numpy()

    starts = list(_starts(counts, labels, width, seed))
    bounds = [(None, None)] * (classes * width) + [(0.0, None)] * (len(targets) * width)
    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
    solved = [
        optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for start in starts
    ]
    found = min(solved, key=lambda one: one.fun)
    value, gradient = objective(found.x)
    weights, features = (
        found.x[: classes * width].reshape(classes, width),
        found.x[classes * width :].reshape(-1, width),
    )
    # At a bound only a descent into the allowed side counts.
    gradient[classes * width :][(features.ravel() <= 0) & (gradient[classes * width :] > 0)] = 0
    if np.abs(gradient).max() > 1e-5:
        raise UserError(
            f"The unconstrained-features model did not converge in {found.nit} iterations (gradient "
            f"{np.abs(gradient).max():.1e}): allow more max_iterations."
        )
    with torch.no_grad():
        each = losses_of(torch.from_numpy(weights), torch.from_numpy(features))
    mean = torch.zeros(classes, dtype=torch.float64).index_add_(0, targets, each)
    mean /= torch.bincount(targets, minlength=classes)
    return FeatureSolution(mean.numpy(), weights, features, value, float(np.abs(gradient).max()))


def _starts(counts: np.ndarray, labels: np.ndarray, width: int, seed: int) -> Iterator[np.ndarray]:
    """Yields starts: weights (V, d) and features (one for each label, d), flat, one after the other."""
    generator = np.random.default_rng(seed)
    for least in [*np.unique(counts), counts.max() + 1]:
        weights = generator.normal(0, 1e-3, (len(counts), width))
        if width >= len(counts):
            kept = np.flatnonzero(counts >= least)
            weights[kept, kept] += 2.0
        else:
            weights = generator.normal(0, 1.0, (len(counts), width))
        features = weights[labels].clip(0) + generator.uniform(0, 1e-3, (len(labels), width))
        yield np.concatenate([weights.ravel(), features.ravel()])
