"""The unconstrained-features model: what the theory says of its minima."""

import numpy as np
import pytest

from modelwright.errors import UserError
from modelwright.probing.fair_lm import solve_features

pytest.importorskip("scipy")
#: 20 classes, four of each count: 1, 3, 9, 27, 81.
COUNTS = np.repeat(3 ** np.arange(5), 4)


def by_count(values):
    return values.reshape(5, 4).mean(1)


@pytest.fixture(scope="module")
def solved():
    return {decay: solve_features(COUNTS, decay) for decay in (5e-4, 5.5e-4, 4e-3)}


def test_rare_classes_have_larger_losses(solved):
    found = by_count(solved[5e-4].losses)
    assert (np.diff(found) < 0).all()
    spread = solved[5e-4].losses.reshape(5, 4)
    np.testing.assert_allclose(
        spread, spread.mean(1, keepdims=True).repeat(4, 1), rtol=1e-3
    )  # equal counts, equal loss


def test_decay_hurts_rare_classes_most(solved):
    rise = (by_count(solved[5.5e-4].losses) - by_count(solved[5e-4].losses)) / 5e-5
    assert (rise > 0).all()
    assert (np.diff(rise) < 0).all()


def test_the_rarest_classes_collapse_and_then_know_nothing(solved):
    weak, strong = solved[5e-4], solved[4e-3]
    norms = by_count(np.linalg.norm(strong.features, axis=1))
    np.testing.assert_allclose(norms[:2], 0, atol=1e-6)  # minority collapse
    assert norms[2:].min() > 0.5
    np.testing.assert_allclose(by_count(strong.losses)[:2], np.log(20), rtol=1e-6)  # chance
    assert np.linalg.norm(weak.features, axis=1).min() > 0.5


def test_classes_are_orthogonal_and_features_are_not_negative(solved):
    features = solved[5e-4].features
    assert features.min() >= 0
    lengths = np.linalg.norm(features, axis=1)
    cosines = (features / lengths[:, None]) @ (features / lengths[:, None]).T
    np.testing.assert_allclose(cosines, np.eye(20), atol=1e-3)


def test_features_of_one_class_collapse_to_their_mean():
    counts = [1, 2, 4]
    whole = solve_features(counts, 0.02, collapse=False)
    means = solve_features(counts, 0.02)
    assert whole.features.shape == (7, 3)
    for low, high in ((1, 3), (3, 7)):
        np.testing.assert_allclose(
            whole.features[low:high], whole.features[low : low + 1].repeat(high - low, 0), atol=1e-4
        )
    assert whole.objective == pytest.approx(means.objective, rel=1e-8)
    np.testing.assert_allclose(whole.losses, means.losses, atol=1e-5)


def test_equal_counts_and_no_start_that_matters():
    a, b = solve_features([5, 5, 5], 0.01, seed=0), solve_features([5, 5, 5], 0.01, seed=1)
    np.testing.assert_allclose(a.losses, a.losses.mean(), rtol=1e-5)
    assert a.objective == pytest.approx(b.objective, rel=1e-8)
    assert a.gradient < 1e-5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0, 1], 0.1), {}, "at least 1"),
        (([1, 1], 0.0), {}, "greater than 0"),
        (([1, 1], 0.1, -1.0), {}, "greater than 0"),
        (([1, 1], 0.1), {"dimension": 0}, "dimension must be at least 1"),
        (([1, 2, 9], 0.001), {"max_iterations": 1}, "did not converge"),
    ],
)
def test_mistakes_are_sentences(arguments, options, message):
    with pytest.raises(UserError, match=message):
        solve_features(*arguments, **options)
