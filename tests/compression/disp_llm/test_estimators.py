from __future__ import annotations

import math

import pytest
import torch

from modelwright.compression.disp_llm.estimators import draw, on_probability
from modelwright.compression.disp_llm.search import ratio_loss


def expected_gradient(estimator: str, p: float, a: float, b: float, c: float) -> tuple[float, float]:
    """E over s of the estimator for f(s) = a s^2 + b s + c, and d/dl E f, both by enumeration, in float64."""
    logit = torch.tensor([math.log(p / (1 - p))], dtype=torch.float64, requires_grad=True)
    total = 0.0
    for uniform, weight in ((0.0, p), (1.0, 1 - p)):  # drawn as 1, and as 0
        s = draw(logit, torch.tensor([uniform], dtype=torch.float64), estimator, "logistic", 0.4)
        assert s.item() == float(uniform < p)
        (gradient,) = torch.autograd.grad((a * s**2 + b * s + c).sum(), logit)
        total += weight * gradient.item()
    exact = ((a + b + c) - c) * p * (1 - p)
    return total, exact


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("f", [(1.0, 0.0, 0.0), (-2.0, 0.7, 3.0), (0.5, -1.3, 0.2)])
def test_reinmax_is_exact_for_quadratics(p, f):
    found, exact = expected_gradient("reinmax", p, *f)
    assert found == pytest.approx(exact, abs=1e-12)


def test_straight_through_is_exact_for_lines_only():
    found, exact = expected_gradient("straight_through", 0.3, 0.0, 1.7, 0.2)
    assert found == pytest.approx(exact, abs=1e-12)
    found, exact = expected_gradient("straight_through", 0.05, 1.0, 0.0, 0.0)
    assert abs(found - exact) > 0.01


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("s", [0.0, 1.0])
def test_reinmax_is_the_general_formula(p, s):
    logit = torch.tensor([math.log(p / (1 - p))], dtype=torch.float64, requires_grad=True)
    drawn = draw(logit, torch.tensor([1.0 - s], dtype=torch.float64), "reinmax", "logistic", 1.0)
    assert drawn.item() == s
    (gradient,) = torch.autograd.grad(drawn.sum(), logit)
    q = (p + s) / 2
    assert gradient.item() == pytest.approx(2 * q * (1 - q) - p * (1 - p) / 2, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.4, 2.0])
@pytest.mark.parametrize(
    ("estimator", "noise"),
    [
        ("reinmax", "logistic"),
        ("straight_through", "logistic"),
        ("gumbel_sigmoid", "logistic"),
        ("gumbel_sigmoid", "gumbel"),
    ],
)
def test_gates_are_on_as_often_as_said_at_any_temperature(estimator, noise, temperature):
    count, statistic = 40_000, 0.0
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.5])
    for logit in logits:
        drawn = draw(logit.expand(count), torch.rand(count, generator=generator), estimator, noise, temperature)
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}
        p = on_probability(logit, estimator, noise).item()
        statistic += (drawn.sum().item() - count * p) ** 2 / (count * p * (1 - p))
    assert statistic < 20.5  # chi-square, 5 degrees of freedom, 0.999


def test_laws_of_the_noises():
    logits = torch.linspace(-4, 4, 9)
    assert torch.allclose(on_probability(logits, "reinmax", "gumbel"), logits.sigmoid())
    assert torch.allclose(on_probability(logits, "gumbel_sigmoid", "gumbel"), 1 - torch.exp(-logits.exp()), atol=1e-6)
    # The release's threshold of a half.
    assert on_probability(torch.tensor(-0.36651), "gumbel_sigmoid", "gumbel").item() == pytest.approx(0.5, abs=1e-5)


def test_the_gumbel_sigmoid_passes_the_soft_gradient():
    logits = torch.tensor([0.3, -1.0], requires_grad=True)
    uniform = torch.tensor([0.7, 0.2])
    (draw(logits, uniform, "gumbel_sigmoid", "logistic", 0.4) * torch.tensor([2.0, 5.0])).sum().backward()
    u = ((logits.detach() + uniform.log() - (1 - uniform).log()) / 0.4).sigmoid()
    assert torch.allclose(logits.grad, torch.tensor([2.0, 5.0]) * u * (1 - u) / 0.4, atol=1e-5)


def test_the_loss_of_the_ratio():
    def at(share):
        x = torch.tensor(share, requires_grad=True)
        loss = ratio_loss(x, 0.4)
        loss.backward()
        return loss.item(), x.grad.item()

    assert at(0.4)[0] == 0
    assert at(0.8)[0] == pytest.approx(at(0.2)[0]) == pytest.approx(math.log(2))
    assert at(0.8)[1] > 0 > at(0.2)[1]
    assert math.isfinite(at(0.0)[0])
