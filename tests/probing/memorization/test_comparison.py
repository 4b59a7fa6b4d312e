import numpy as np
import pytest
from sklearn import metrics as sk

from modelwright.errors import UserError
from modelwright.probing.memorization import TaxonomicMemorizationModel, categorize, compare, scores
from modelwright.probing.memorization.comparison import METRICS, expected_calibration_error, measure
from probing.memorization.simulated import simulated

SKLEARN = {
    "precision": lambda y, p, w: sk.precision_score(y, p >= 0.5, sample_weight=w),
    "recall": lambda y, p, w: sk.recall_score(y, p >= 0.5, sample_weight=w),
    "f1": lambda y, p, w: sk.f1_score(y, p >= 0.5, sample_weight=w),
    "pr_auc": lambda y, p, w: sk.average_precision_score(y, p, sample_weight=w),
    "roc_auc": lambda y, p, w: sk.roc_auc_score(y, p, sample_weight=w),
    "log_loss": lambda y, p, w: sk.log_loss(y, p, sample_weight=w),
}


@pytest.mark.parametrize("digits", [1, 8])
@pytest.mark.parametrize("metric", SKLEARN)
def test_metrics_are_scikit_learns_ties_and_weights_included(metric, digits):
    generator = np.random.default_rng(0)
    chances = np.clip(generator.random(300).round(digits), 0.01, 0.99)
    labels = generator.random(300) < chances
    weights = generator.integers(0, 4, 300).astype(float)
    assert measure(labels, chances, metric, weights=weights) == pytest.approx(SKLEARN[metric](labels, chances, weights))
    assert measure(labels, chances, metric) == pytest.approx(SKLEARN[metric](labels, chances, None))


def test_the_calibration_error_of_a_calibrated_predictor_tends_to_0():
    generator = np.random.default_rng(0)
    errors = []
    for size in (1_000, 10_000, 1_000_000):
        chances = generator.random(size)
        errors.append(expected_calibration_error(generator.random(size) < chances, chances))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_the_calibration_error_by_hand():
    # Confidence .9 with accuracy .5, and .6 with accuracy 1.
    assert expected_calibration_error([True, False, False], [0.9, 0.9, 0.4]) == pytest.approx((0.8 + 0.4) / 3)
    assert expected_calibration_error([True, False], [1.0, 0.0]) == 0
    assert np.isnan(expected_calibration_error([], []))


def test_areas_of_one_class_are_not_defined():
    assert np.isnan(measure([True, True], [0.1, 0.9], "roc_auc"))
    assert np.isnan(measure([False, False], [0.1, 0.9], "pr_auc"))
    with pytest.raises(UserError, match="did you mean .*'roc_auc'"):
        measure([True], [0.5], "roc-auc")


@pytest.fixture(scope="module")
def fitted():
    table, test = simulated(4000, 0), simulated(1500, 1)
    models = [TaxonomicMemorizationModel(partition=p).fit(table) for p in (None, "taxonomy")]
    return *models, test


def test_the_routed_model_wins_where_signs_differ(fitted):
    base, model, test = fitted
    found = compare(base, model, test, METRICS, bootstrap=60).set_index("metric")
    assert found.loc["pr_auc", "low"] > 0
    assert found.loc["log_loss", "high"] < 0
    assert (found["low"] <= found["high"]).all()
    assert found.loc["roc_auc", "model"] == pytest.approx(
        sk.roc_auc_score(test["memorized"], model.predict_proba(test)[:, 1])
    )


def test_a_model_does_not_differ_from_itself(fitted):
    _, model, test = fitted
    found = compare(model, model, test, bootstrap=20)
    assert (found[["difference", "low", "high"]] == 0).all().all()


def test_the_spread_is_that_of_new_samples(fitted):
    _, model, _ = fitted
    tests = [simulated(800, 10 + seed) for seed in range(40)]
    true = np.std([sk.roc_auc_score(t["memorized"], model.predict_proba(t)[:, 1]) for t in tests], ddof=1)
    found = compare(model, model, tests[0], ["roc_auc"], bootstrap=200)
    assert 0.6 < found["model_sd"][0] / true < 1.7


def test_groups_are_measured_beside_all(fitted):
    _, model, test = fitted
    cells = categorize(test)
    found = scores(model, test, ["roc_auc"], groups=cells).set_index("group")
    inside = (cells == "recollection").to_numpy()
    assert found.loc["recollection", "roc_auc"] == pytest.approx(
        sk.roc_auc_score(test["memorized"][inside], model.predict_proba(test[inside])[:, 1])
    )
    assert found.loc["all", "rows"] == len(test)
    compared = compare(model, model, test, ["f1"], bootstrap=5, groups=cells)
    assert compared["group"].tolist() == ["all", "recitation", "recollection", "reconstruction"]
    with pytest.raises(UserError, match="at least 2"):
        compare(model, model, test, bootstrap=1)
