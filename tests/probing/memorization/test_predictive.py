import warnings

import numpy as np
import pytest
import statsmodels.api as sm
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from modelwright.errors import UserError
from modelwright.probing.memorization import TaxonomicMemorizationModel, categorize
from modelwright.probing.memorization.features import BINARY, CONTINUOUS, PREDICTORS
from modelwright.probing.memorization.predictive import OneClass
from probing.memorization.simulated import simulated

FEW = ("sequence_duplicates", "frequency_mean", "continuation_perplexity")
EXACT = {"C": float("inf"), "class_weight": None, "features": FEW}


@pytest.fixture(scope="module")
def table():
    return simulated()


def standardised(table, names):
    values = table[list(names)].to_numpy(dtype=float)
    return (values - values.mean(0)) / values.std(0)


def test_one_category_is_scikit_learns_regression(table):
    model = TaxonomicMemorizationModel(partition=None).fit(table)
    scaled = np.column_stack(
        [StandardScaler().fit_transform(table[list(CONTINUOUS)]), table[list(BINARY)].astype(float)]
    )
    theirs = LogisticRegression(class_weight="balanced", max_iter=10_000, tol=1e-6).fit(scaled, table["memorized"])
    assert model.predict_proba(table) == pytest.approx(theirs.predict_proba(scaled), abs=1e-5)
    found = model.coef_frame()["coefficient"].to_numpy()
    assert found == pytest.approx([theirs.intercept_[0], *theirs.coef_[0]], abs=1e-4)
    assert (model.predict(table) == theirs.predict(scaled)).all()


def test_each_category_is_a_regression_of_its_own_rows(table):
    model = TaxonomicMemorizationModel(features=FEW).fit(table)
    scaled, cells = standardised(table, FEW), categorize(table).to_numpy()
    for cell in np.unique(cells):
        inside = cells == cell
        theirs = LogisticRegression(class_weight="balanced", tol=1e-6).fit(scaled[inside], table["memorized"][inside])
        assert model.predict_proba(table[inside]) == pytest.approx(theirs.predict_proba(scaled[inside]), abs=1e-5)
    signs = model.coef_frame().set_index(["category", "feature"])["coefficient"]
    assert signs["recitation", "continuation_perplexity"] > 0 > signs["reconstruction", "continuation_perplexity"]


def test_wald_tests_are_those_of_statsmodels(table):
    model = TaxonomicMemorizationModel(partition=None, **EXACT).fit(table)
    theirs = sm.Logit(table["memorized"].astype(float), sm.add_constant(standardised(table, FEW))).fit(disp=0)
    ours = model.wald_test()
    assert ours["coefficient"].to_numpy() == pytest.approx(theirs.params.to_numpy(), abs=1e-4)
    assert ours["standard_error"].to_numpy() == pytest.approx(theirs.bse.to_numpy(), rel=1e-4)
    assert ours["wald"].to_numpy() == pytest.approx(theirs.tvalues.to_numpy() ** 2, rel=1e-3, abs=1e-4)
    assert ours["p_value"].to_numpy() == pytest.approx(theirs.pvalues.to_numpy(), rel=1e-3, abs=1e-6)


def test_likelihood_ratios_are_those_of_statsmodels(table):
    found = TaxonomicMemorizationModel(features=FEW).fit(table).likelihood_ratio_test(table).set_index("category")
    design, labels = sm.add_constant(standardised(table, FEW)), table["memorized"].astype(float).to_numpy()
    cells = categorize(table).to_numpy()
    own = {c: sm.Logit(labels[cells == c], design[cells == c]).fit(disp=0).llf for c in np.unique(cells)}
    generic = sm.Logit(labels, design).fit(disp=0).llf
    for cell, value in own.items():
        assert found.loc[cell, "log_likelihood"] == pytest.approx(value, abs=1e-4)
        assert found.loc[cell, "df"] == 4
    assert found.loc["all", "statistic"] == pytest.approx(2 * (sum(own.values()) - generic), abs=1e-3)
    assert found.loc["all", "df"] == 8
    assert found["statistic"].drop("all").sum() == pytest.approx(found.loc["all", "statistic"])
    assert found.loc["all", "p_value"] < 1e-10


def test_the_likelihood_ratio_of_categories_that_do_not_matter_is_chi_squared():
    statistics = []
    for seed in range(12):
        table = simulated(600, seed, effect=0.0)
        model = TaxonomicMemorizationModel(features=("frequency_mean",)).fit(table)
        statistics.append(model.likelihood_ratio_test(table).set_index("category").loc["all", "p_value"])
    assert 0.15 < np.mean(statistics) < 0.85
    assert min(statistics) > 1e-3


def test_the_order_of_rows_changes_nothing(table):
    mixed = table.sample(frac=1, random_state=3)
    one, other = (TaxonomicMemorizationModel(features=FEW).fit(t) for t in (table, mixed))
    assert one.predict_proba(table) == pytest.approx(other.predict_proba(table), abs=1e-5)


def test_a_category_of_one_class_falls_back_to_the_model_of_all(table):
    table = table.copy()
    template = table["is_templating"] & (table["sequence_duplicates"] < 6)
    table.loc[template, "memorized"] = True
    with pytest.warns(OneClass, match="'reconstruction' has no model of its own"):
        model = TaxonomicMemorizationModel().fit(table)
    assert set(model.cells_) == {"recitation", "recollection"}
    assert "all" in model.fallbacks_["reconstruction"]
    generic = TaxonomicMemorizationModel(partition=None).fit(table)
    rows = table[template]
    assert model.predict_proba(rows) == pytest.approx(generic.predict_proba(rows), abs=1e-9)
    assert "all" not in set(model.likelihood_ratio_test(table)["category"])


def test_a_label_never_seen_is_predicted_by_the_model_of_all(table):
    known = table[table["sequence_duplicates"] < 6]
    model = TaxonomicMemorizationModel().fit(known)
    generic = TaxonomicMemorizationModel(partition=None).fit(known)
    rows = table[table["sequence_duplicates"] >= 6]
    assert model.predict_proba(rows) == pytest.approx(generic.predict_proba(rows))


def test_constant_features_have_no_weight_and_no_test(table):
    model = TaxonomicMemorizationModel().fit(table)
    frame = model.coef_frame().set_index(["category", "feature"])["coefficient"]
    assert frame["reconstruction", "is_templating"] == 0
    assert frame["recollection", "is_templating"] == 0
    tested = model.wald_test()
    assert not ((tested["category"] == "recollection") & (tested["feature"] == "is_templating")).any()


def test_it_is_an_estimator(table):
    model = clone(TaxonomicMemorizationModel(C=2.0, features=FEW))
    assert model.get_params()["C"] == 2.0
    labels = table["memorized"].to_numpy()
    assert model.fit(table.drop(columns="memorized"), labels).score(table, labels) > 0.6


def test_bad_input_is_a_sentence(table):
    broken = table.copy()
    broken.loc[17, "frequency_mean"] = np.nan
    with pytest.raises(UserError, match="'frequency_mean' of row 17 is nan"):
        TaxonomicMemorizationModel().fit(broken)
    fitted = TaxonomicMemorizationModel().fit(table)
    with pytest.raises(UserError, match="'frequency_mean' of row 17"):
        fitted.predict(broken)
    with pytest.raises(UserError, match="no column 'frequency_mean'"):
        TaxonomicMemorizationModel().fit(table.drop(columns="frequency_mean"))
    with pytest.raises(UserError, match="All 10 sequences are not memorised"):
        TaxonomicMemorizationModel().fit(table[~table["memorized"]].head(10))
    with pytest.raises(UserError, match="call fit first"):
        TaxonomicMemorizationModel().predict(table)
    with pytest.raises(UserError, match="use 'taxonomy', None"):
        TaxonomicMemorizationModel(partition="best").fit(table)
    with pytest.raises(UserError, match="truth value"):
        TaxonomicMemorizationModel().fit(table, np.full(len(table), 2))
    with pytest.raises(UserError, match="gave labels of shape"):
        TaxonomicMemorizationModel(partition=lambda t: ["A"]).fit(table)


def test_no_warning_where_all_is_well(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaxonomicMemorizationModel(features=PREDICTORS).fit(table)
