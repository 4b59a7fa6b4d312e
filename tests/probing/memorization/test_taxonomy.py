import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.probing.memorization import categorize, category_shares, divergence_by_duplicates
from modelwright.probing.memorization.taxonomy import CATEGORIES
from probing.memorization.simulated import simulated

ROWS = st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=30)


def rows(made):
    return pd.DataFrame(made, columns=["sequence_duplicates", "is_templating"])


@given(ROWS)
def test_categories_are_a_partition_by_the_rules(made):
    table = rows(made)
    found = categorize(table)
    for (duplicates, template), category in zip(made, found):
        expected = "recitation" if duplicates > 5 else "reconstruction" if template else "recollection"
        assert category == expected
    assert sum((found == c).sum() for c in CATEGORIES) == len(made)


@given(ROWS, st.integers(1, 13))
def test_threshold_1_recites_everything_and_order_does_not_matter(made, threshold):
    table = rows(made)
    assert (categorize(table, 1) == "recitation").all()
    mixed = table.sample(frac=1, random_state=0)
    assert categorize(mixed, threshold).sort_index().equals(categorize(table, threshold))


def test_shares_are_of_the_memorised():
    table = rows([(9, False), (9, True), (1, True), (1, True), (1, False), (1, False)])
    table["memorized"] = [True, True, True, False, False, False]
    table["category"] = categorize(table)
    found = category_shares(table)
    assert found["memorized"].tolist() == [2, 1, 0]
    assert found["share_of_memorized"].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert found["rate"].tolist() == [1.0, 0.5, 0.0]
    table["memorized"] = False
    assert category_shares(table)["share_of_memorized"].tolist() == [0, 0, 0]


def test_the_divergence_is_largest_where_memorised_sequences_differ():
    generator = np.random.default_rng(0)
    parts = []
    for count, distance in ((1, 0.2), (2, 2.0), (3, 0.0)):
        memorized = np.arange(800) % 2 == 0
        logs = generator.normal(size=800) - distance * memorized
        parts.append(
            pd.DataFrame(
                {"sequence_duplicates": count, "continuation_perplexity": np.exp(logs), "memorized": memorized}
            )
        )
    found = divergence_by_duplicates(pd.concat(parts), bootstrap=20).set_index("duplicates")
    assert found["divergence"].idxmax() == 2
    assert found.loc[2, "divergence"] > 5 * found.loc[3, "divergence"]
    assert (found["sd"] > 0).all()
    assert divergence_by_duplicates(simulated(50), fewest=100).empty


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match="no column 'is_templating'"):
        categorize(pd.DataFrame({"sequence_duplicates": [1]}))
