"""Learning speed: its extremes, and what does not change it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.probing.fair_lm import TokenLossReport, frequency_bins, learning_speed


def reports(losses):
    """(K + 1, V) mean losses of types that occur 3 times each."""
    return [TokenLossReport(3.0 * np.asarray(row, float), np.full(len(row), 3)) for row in losses]


@pytest.mark.parametrize("method", ["auc", "minmax"])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_extremes(method, k):
    constant = [[5.0]] * (k + 1)
    drop = [[5.0]] + [[0.0]] * k
    assert learning_speed(reports(constant), method).per_token.tolist() == [0]
    assert learning_speed(reports(drop), method).per_token == pytest.approx([1 - 1 / (2 * k)])
    assert learning_speed(reports([[0.0]] * 3)).per_token.tolist() == [0]  # nothing to learn
    assert learning_speed(reports([[1.0], [3.0]])).per_token.tolist() == [0]  # worse is not slower than not at all


def test_linear_fall_and_the_floor_of_minmax():
    falling = [[4.0], [3.0], [2.0]]
    assert learning_speed(reports(falling)).per_token == pytest.approx([1 - (0.875 + 0.625) / 2])
    assert learning_speed(reports(falling), "minmax").per_token == pytest.approx([0.5])
    steps = learning_speed(reports(falling), "auc", steps=[0, 1, 4]).per_token
    assert steps == pytest.approx([1 - (0.875 * 1 + 0.625 * 3) / 4])


@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from(["auc", "minmax"]))
def test_a_constant_factor_changes_nothing_and_speed_is_a_share(seed, factor, method):
    losses = np.random.default_rng(seed).exponential(1, (5, 4))
    found = learning_speed(reports(losses), method).per_token
    scaled = learning_speed(reports(losses * [factor, 1, 1, 1]), method).per_token
    np.testing.assert_allclose(scaled, found, rtol=1e-9, atol=1e-12)
    assert ((found >= 0) & (found <= 1)).all()


def test_bins_and_gap():
    losses = [[4, 4, 4, 4], [4, 2, 2, 0], [4, 2, 2, 0]]
    speed = learning_speed(reports(losses))
    bins = frequency_bins([0, 1, 2, 100])
    assert speed.by_bin(bins) == pytest.approx({0: 0.0, 1: 0.375, 5: 0.75})
    assert speed.gap(bins) == pytest.approx(0.375)
    assert learning_speed(reports([[1], [1]])).gap(frequency_bins([4])) is None
    with pytest.raises(UserError, match="for 1 token types"):
        speed.by_bin(frequency_bins([4]))


def test_types_that_never_occur_have_no_speed():
    pair = [TokenLossReport(np.array([0.0, 2.0 - t]), np.array([0, 1])) for t in range(2)]
    assert np.isnan(learning_speed(pair).per_token[0])
    assert learning_speed(pair).mean == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("given_", "options", "message"),
    [
        (reports([[1]]), {}, "at least 2 checkpoints, not 1"),
        ([], {}, "at least 2 checkpoints, not 0"),
        ([*reports([[1]]), *reports([[1, 2]])], {}, "vocabularies of 1 and 2"),
        ([*reports([[1]]), TokenLossReport(np.ones(1), np.array([9]))], {}, "different data"),
        (reports([[1], [1]]), {"steps": [1, 1]}, "each greater"),
        (reports([[1], [1]]), {"steps": [1]}, "each greater"),
        (reports([[1], [1]]), {"method": "area"}, "no learning speed 'area'"),
    ],
)
def test_mistakes_are_sentences(given_, options, message):
    with pytest.raises(UserError, match=message):
        learning_speed(given_, **options)
