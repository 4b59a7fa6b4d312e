import numpy as np
import pandas as pd
import pytest
from scipy import stats

from modelwright.probing.memorization import dependence_tests, sign_flips, xi_test


def test_xi_is_scipys():
    generator = np.random.default_rng(0)
    x = generator.normal(size=400)
    for y in (generator.integers(0, 2, 400), (x > 0).astype(int), np.round(x**2)):
        if not hasattr(stats, "chatterjeexi"):
            pytest.skip("this scipy has no xi")
        theirs = stats.chatterjeexi(x, y, y_continuous=False)
        assert xi_test(x, y) == pytest.approx((theirs.statistic, theirs.pvalue), abs=1e-9)


def test_xi_sees_what_rises_and_falls():
    x = np.linspace(-1, 1, 400)
    assert xi_test(x, x**2)[0] > 0.95
    assert xi_test(np.random.default_rng(0).permutation(x), x**2)[1] > 0.01
    assert np.isnan(xi_test(x, np.ones(400))[0])


@pytest.fixture(scope="module")
def paradox():
    generator = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 400)
    feature = generator.normal(size=1200) + 3 * group
    # Within each group the feature hurts; from group to group it seems to help.
    logits = -1.5 * (feature - 3 * group) + 2.5 * (group - 1)
    return pd.DataFrame(
        {"x": feature, "flat": 1.0, "memorized": generator.random(1200) < 1 / (1 + np.exp(-logits)), "category": group}
    )


def test_signs_that_flip_are_found(paradox):
    tests = dependence_tests(paradox, ["x", "flat"])
    assert set(tests["group"]) == {"all", "0", "1", "2"}
    flips = sign_flips(tests)
    assert flips[["feature", "group"]].to_numpy().tolist() == [["x", "0"], ["x", "1"], ["x", "2"]]
    assert (flips["in_all"] > 0).all()
    assert (flips["in_group"] < 0).all()
    assert sign_flips(tests, level=0.0).empty


def test_numbers_are_scipys_and_constants_have_none(paradox):
    tests = dependence_tests(paradox, ["x", "flat"]).set_index(["group", "feature"])
    own = paradox[paradox["category"] == 1]
    assert tests.loc[("1", "x"), "pearson"] == pytest.approx(stats.pearsonr(own["x"], own["memorized"])[0])
    assert tests.loc[("1", "x"), "spearman_p"] == pytest.approx(stats.spearmanr(own["x"], own["memorized"])[1])
    assert tests.loc[("all", "flat")].isna().sum() == 6
