import pytest
import torch

from modelwright.editing.deltas import Dense, LowRank
from modelwright.editing.least_squares import as_delta, least_squares
from modelwright.editing.statistics import KeyStatistics
from modelwright.errors import UserError

D, D_FF, COUNT = 5, 12, 1000


def problem(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(COUNT, D_FF, generator=g) @ torch.randn(D_FF, D_FF, generator=g)
    statistics = KeyStatistics({0: k.T @ k}, COUNT, "model")
    keys = torch.randn(D_FF, n, generator=g, dtype=torch.float64)
    return statistics, keys, torch.randn(D, n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 4, 11, 12, 30])
@pytest.mark.parametrize("weight", [0.01, 1.0, 15_000.0])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_it_is_ridge_regression(n, weight, ridge):
    statistics, keys, residuals = problem(n)
    u, v = least_squares(statistics, 0, keys, residuals, weight=weight, ridge=ridge)
    c = statistics.covariance(0).double()
    c += ridge * c.diagonal().mean() * torch.eye(D_FF, dtype=torch.float64)
    closed = residuals @ keys.T @ torch.linalg.inv(weight * c + keys @ keys.T)
    assert torch.allclose(u @ v, closed, atol=1e-8)
    # The gradient of λ tr(Δ C Δᵀ) + ‖Δ K − R‖² vanishes.
    delta = (u @ v).requires_grad_(True)
    loss = weight * (delta @ c @ delta.T).trace() + (delta @ keys - residuals).square().sum()
    (gradient,) = torch.autograd.grad(loss, delta)
    assert float(gradient.abs().max()) < 1e-8 * (1 + weight)


def test_without_weight_the_keys_are_met_exactly():
    statistics, keys, residuals = problem(8)
    for weight in (0.0, 1e-12):
        u, v = least_squares(statistics, 0, keys, residuals, weight=weight)
        assert torch.allclose(u @ v @ keys, residuals, atol=1e-7)


def test_with_much_weight_nothing_changes():
    statistics, keys, residuals = problem(8)
    u, v = least_squares(statistics, 0, keys, residuals, weight=1e12)
    assert float((u @ v).abs().max()) < 1e-8


def test_the_order_of_facts_does_not_matter():
    statistics, keys, residuals = problem(8)
    order = torch.randperm(8)
    one, other = (
        least_squares(statistics, 0, k, r, weight=3.0)
        for k, r in [(keys, residuals), (keys[:, order], residuals[:, order])]
    )
    assert torch.allclose(one[0] @ one[1], other[0] @ other[1], atol=1e-10)


def test_one_fact_goes_in_romes_direction():
    statistics, keys, residuals = problem(1)
    u, v = least_squares(statistics, 0, keys, residuals, weight=1e-9)
    right = torch.linalg.solve(statistics.covariance(0).double(), keys)
    rome = residuals @ right.T / (keys.T @ right)
    assert torch.allclose(u @ v, rome, atol=1e-8)


def test_bad_problems_are_sentences():
    statistics, keys, residuals = problem(2)
    twice = keys[:, [0, 0]]
    with pytest.raises(UserError, match="depend on each other"):
        least_squares(statistics, 0, twice, residuals, weight=0.0)
    least_squares(statistics, 0, twice, residuals, weight=1.0)
    with pytest.raises(UserError, match="weight of the covariance is -1"):
        least_squares(statistics, 0, keys, residuals, weight=-1)


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_are_kept_while_they_are_smaller(transposed):
    weight = torch.empty((D_FF, D) if transposed else (D, D_FF))
    for n, kind in [(2, LowRank), (9, Dense)]:
        u, v = torch.randn(D, n, dtype=torch.float64), torch.randn(n, D_FF, dtype=torch.float64)
        delta = as_delta(u, v, weight, transposed=transposed)
        assert isinstance(delta, kind)
        assert delta.shape == weight.shape
        assert torch.allclose(delta.dense().T if transposed else delta.dense(), (u @ v).float(), atol=1e-5)
