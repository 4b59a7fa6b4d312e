import numpy as np
import pytest

from modelwright.errors import UserError
from modelwright.probing.memorization import Partition, TaxonomicMemorizationModel, search_partition, train_test_split
from modelwright.probing.memorization.comparison import measure
from modelwright.probing.memorization.search import QUANTILES, SEARCHED
from modelwright.probing.memorization.splits import split_rows
from probing.memorization.simulated import simulated

FEW = ("sequence_duplicates", "frequency_mean", "continuation_perplexity")


def test_thresholds_are_tried_in_order():
    table = simulated(200)
    found = Partition("sequence_duplicates", 6, "is_templating", 1)(table)
    recited = table["sequence_duplicates"] >= 6
    assert (found == np.where(recited, "A", np.where(table["is_templating"], "B", "C"))).all()
    assert str(Partition("a", 1.5, "b", 2)) == "a >= 1.5, else b >= 2"


def test_the_papers_search_has_810_candidates():
    assert len(SEARCHED) * (len(SEARCHED) - 1) * len(QUANTILES) ** 2 == 810


def test_the_search_finds_the_categories_that_matter():
    table = simulated(2500, 0, effect=2.5)
    found = search_partition(
        table,
        ["sequence_duplicates", "is_templating", "frequency_max"],
        [0.4, 0.7],
        predictors=FEW,
        metric="roc_auc",
    )
    assert len(found.candidates) == 24
    assert {found.best.first, found.best.second} == {"sequence_duplicates", "is_templating"}
    assert found.score == found.candidates["score"].max()
    # A threshold that all rows reach leaves a cell empty, so the candidate is skipped.
    always = found.candidates[(found.candidates["first"] == "is_templating") & (found.candidates["threshold"] == 0)]
    assert len(always)
    assert always["score"].isna().all()
    rows = split_rows(table["memorized"].to_numpy(), [0.8, 0.2], 1024)
    model = TaxonomicMemorizationModel(partition=found.best, features=FEW).fit(table.iloc[rows[0]])
    scored = table.iloc[rows[1]]
    assert measure(scored["memorized"], model.predict_proba(scored)[:, 1], "roc_auc") == pytest.approx(found.score)


def test_a_search_that_cannot_succeed_says_so():
    table = simulated(60)
    table["memorized"] = np.arange(60) < 2
    with pytest.raises(UserError, match="too few memorised"):
        search_partition(table, ["frequency_max", "frequency_min"], predictors=FEW)
    with pytest.raises(UserError, match="choose another metric"):
        search_partition(table, metric="ece")
    with pytest.raises(UserError, match="between 0 and 1"):
        search_partition(table, validation_share=1.0)


def test_parts_share_nothing_and_strata_keep_their_shares():
    table = simulated(1000)
    memorized = table["memorized"].to_numpy()
    in_sample = ~memorized | (np.arange(1000) % 3 == 0)
    cells = np.where(table["is_templating"], "b", "a")
    split = train_test_split(memorized, in_sample, cells)
    assert sorted([*split.train, *split.test]) == list(range(1000))
    assert in_sample[split.test].all()
    assert len(split.test) == pytest.approx(0.2 * in_sample.sum(), abs=3)
    for label in (True, False):
        for cell in "ab":
            inside = in_sample & (memorized == label) & (cells == cell)
            assert inside[split.test].sum() == pytest.approx(0.2 * inside.sum(), abs=1)


def test_splits_of_nothing_are_sentences():
    with pytest.raises(UserError, match="neither of the random sample nor memorised"):
        train_test_split([True, False], [True, False])
    with pytest.raises(UserError, match="between 0 and 1"):
        train_test_split([True, False], [True, True], test_share=0)
    with pytest.raises(UserError, match="too small"):
        train_test_split([True, False], [True, True])
