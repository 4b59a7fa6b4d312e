import pytest
import torch

from modelwright.editing.serac.scope import log_mixture, scope_scores


def test_an_identical_embedding_scores_one_and_a_far_one_nothing():
    memory = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    scores = scope_scores(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), memory)
    assert scores[0, 0] == 1
    assert scores[1, 0] == pytest.approx(float(torch.tensor(-1.0).exp()))
    assert scores[0, 1] == pytest.approx(float(torch.tensor(-10.0).exp()))
    assert ((scores >= 0) & (scores <= 1)).all()


def test_the_mixture_is_a_distribution_and_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 3, 7, generator=generator).log_softmax(-1)
    small = torch.randn(2, 3, 7, generator=generator).log_softmax(-1)
    scores = torch.tensor([0.25, 0.9])
    mixed = log_mixture(base, small, scores).exp()
    assert torch.allclose(mixed.sum(-1), torch.ones(2, 3), atol=1e-5)
    s = scores[:, None, None]
    assert torch.allclose(mixed, (1 - s) * base.exp() + s * small.exp(), atol=1e-6)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_its_gradient_is_finite_at_the_ends(score):
    scores = torch.tensor([score], requires_grad=True)
    base = torch.randn(1, 2, 5).log_softmax(-1).requires_grad_()
    log_mixture(base, torch.randn(1, 2, 5).log_softmax(-1), scores).exp().square().sum().backward()
    assert torch.isfinite(base.grad).all()
