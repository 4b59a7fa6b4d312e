"""Laws of participation and draws from them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelwright.attention.prflash import Participation, ProbFlashConfig, draw_blocks, fixed_blocks
from modelwright.errors import UserError

LAWS = {
    "harmonic": Participation(),
    "exponential": Participation(law="exponential", rate=0.4),
    "linear": Participation(law="linear", reach=5.0),
    "uniform": Participation(law="uniform", share=0.3),
    "table": Participation(law="table", table=(1.0, 0.7, 0.7, 0.1)),
}


def test_the_laws():
    def of(name):
        return LAWS[name].probabilities(6).tolist()

    assert of("harmonic") == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])
    assert of("exponential") == pytest.approx([math.exp(-0.4 * n) for n in range(6)])
    assert of("linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert of("uniform") == pytest.approx([1, 0.3, 0.3, 0.3, 0.3, 0.3])
    assert of("table") == pytest.approx([1, 0.7, 0.7, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("name", LAWS)
def test_each_is_a_probability_that_falls_from_1(name):
    LAWS[name].check()
    pi = LAWS[name].probabilities(40)
    assert pi[0] == 1
    assert bool(((pi >= 0) & (pi <= 1)).all())
    assert bool((pi.diff() <= 0).all())


@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("name", LAWS)
def test_the_density_of_draws_is_the_mean_of_pi(name, mode):
    blocks, draws = 12, 2000
    generator = torch.Generator().manual_seed(0)
    kept = draw_blocks(LAWS[name].probabilities(blocks), torch.arange(blocks), blocks, mode, generator, draws)
    shares = kept.double().sum((1, 2)) / (blocks * (blocks + 1) / 2)
    error = float(shares.std()) / draws**0.5
    assert abs(float(shares.mean()) - LAWS[name].density(blocks)) < 5 * error + 1e-12
    # And by distance, which a mean could hide.
    pi = LAWS[name].probabilities(blocks)
    for distance in range(blocks):
        found = kept.diagonal(-distance, 1, 2).double().mean()
        many = draws * (1 if mode == "shared" else blocks - distance)
        assert abs(float(found - pi[distance])) <= 5 * float((pi[distance] * (1 - pi[distance]) / many) ** 0.5) + 1e-12


@given(
    st.integers(1, 9),
    st.integers(0, 4),
    st.sampled_from(["shared", "independent"]),
    st.integers(0, 99),
    st.integers(1, 3),
)
def test_a_draw(blocks, skipped, mode, seed, heads):
    pi = LAWS["harmonic"].probabilities(blocks)
    rows = torch.arange(min(skipped, blocks - 1), blocks)

    def draw(which):
        return draw_blocks(pi, which, blocks, mode, torch.Generator().manual_seed(seed), heads)

    kept, every = draw(rows), draw(torch.arange(blocks))
    assert torch.equal(kept, every[:, rows])  # a row's draw is its own
    assert torch.equal(every, draw(torch.arange(blocks)))
    assert bool(every.diagonal(0, 1, 2).all())
    assert not bool(every.triu(1).any())
    if mode == "shared":
        for distance in range(blocks):
            assert len(set(every[0].diagonal(-distance).tolist())) == 1


def test_fixed_distances():
    found = fixed_blocks((0, 2), torch.arange(2, 5), 5)[0]
    assert found.int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]


def test_a_certain_block_is_always_there():
    config = ProbFlashConfig(law="uniform", share=1.0)
    assert bool((config.kept(torch.arange(9), 9, 1, True, seed=3)[0] == torch.ones(9, 9).tril().bool()).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"law": "exponential", "rate": -1.0}, "rate is -1.0"),
        ({"law": "exponential", "rate": math.inf}, "rate is inf"),
        ({"law": "linear", "reach": 0.0}, "reach is 0.0"),
        ({"law": "uniform", "share": 1.5}, "share is 1.5"),
        ({"law": "uniform", "share": -0.1}, "share is -0.1"),
        ({"law": "table"}, "needs a table"),
        ({"law": "table", "table": (0.9, 0.5)}, "begins with 0.9"),
        ({"law": "table", "table": (1.0, 1.2)}, "no probability"),
        ({"law": "table", "table": (1.0, -0.2)}, "no probability"),
        ({"law": "table", "table": (1.0, 0.2, 0.4)}, "increases"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 1.5}, "block_size is 1.5"),
        ({"keep": (1, 2)}, "0, the diagonal"),
        ({"keep": (0, -1)}, "at least 0"),
    ],
)
def test_laws_and_options_that_make_no_sense(options, words):
    with pytest.raises(UserError, match=words):
        ProbFlashConfig(**options)


def test_the_correction_is_nothing_where_no_block_is_ever_kept():
    bias = ProbFlashConfig(law="linear", reach=2.0).bias(4)
    assert bias.tolist() == pytest.approx([0, math.log(2), 0, 0])
