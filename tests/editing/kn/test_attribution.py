import pytest
import torch

from modelwright.editing.kn.attribution import integrated_gradients, points, refine, strongest


def smooth(weights):
    return lambda rows: torch.sigmoid(torch.tanh(rows @ weights[0]) @ weights[1])


def parts(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    weights = [0.1 * torch.randn(n, 8, generator=generator), 0.1 * torch.randn(8, generator=generator)]
    return smooth(weights), torch.randn(n, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_attributions_sum_to_the_difference(seed):
    probability, activations = parts(seed)
    whole = probability(activations[None]) - probability(torch.zeros_like(activations)[None])
    errors = [float((integrated_gradients(probability, activations, m).sum() - whole).abs()) for m in (20, 200)]
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 5 or errors[0] < 1e-5


def test_a_linear_function_is_attributed_exactly_with_one_point():
    weights = torch.tensor([1.0, -2.0, 3.0])
    activations = torch.tensor([0.5, 1.0, -1.0])
    for rule in ("paper", "official"):
        found = integrated_gradients(lambda rows: rows @ weights, activations, 1, rule)
        assert torch.allclose(found, weights * activations)


def test_points():
    assert points(20).tolist() == pytest.approx([j / 20 for j in range(1, 21)])
    # The defect of the official runs: with one step the gradient is taken at zero activation only.
    assert points(1, "official").tolist() == [0]
    assert points(1).tolist() == [1]


def test_batches_do_not_matter():
    probability, activations = parts()
    one = integrated_gradients(probability, activations, 20, batch_size=1)
    assert torch.allclose(one, integrated_gradients(probability, activations, 20, batch_size=7), atol=1e-6)


def test_strongest_are_above_a_share_of_the_largest():
    assert strongest(torch.tensor([[1.0, 0.2, 0.21], [-3.0, 0.0, 0.5]]), 0.2) == {(0, 0), (0, 2), (1, 2)}
    assert strongest(-torch.ones(2, 2)) == set()


def test_refining_keeps_what_most_prompts_share():
    a, b, c = (0, 1), (1, 1), (2, 2)
    assert refine([{a, b}, {a}, {a, c}, {c}, {a}], 0.4) == [a]
    assert refine([{a, b}, {a}, {a, c}, {c}, {a}], 0.39) == [a, c]
    assert refine([{a, b}]) == [a, b]
