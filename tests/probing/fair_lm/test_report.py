"""Bins, slope, gap, intervals, and Parquet there and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.probing.fair_lm import TokenCounts, TokenLossReport, frequency_bins
from modelwright.probing.fair_lm.audit import audit, compare
from modelwright.probing.fair_lm.report import interval


def report(seed=0, width=50, correct=True):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 6, width)
    loss = generator.exponential(1, width) * counts
    return TokenLossReport(loss, counts, generator.binomial(counts, 0.5) if correct else None)


def test_edges_are_exact_powers():
    counts = [0, 1, 2, 3, 8, 9, 26, 27, 242, 243, 3**20 - 1, 3**20]
    bins = frequency_bins(counts)
    assert bins.index.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 20, 21]
    assert [bins.label(n) for n in range(4)] == ["0", "[1, 3)", "[3, 9)", "[9, 27)"]
    assert bins.edges(5) == (81, 243)
    assert frequency_bins([1, 2, 4, 8], base=2).index.tolist() == [1, 2, 3, 4]


@given(st.lists(st.integers(0, 3**12), min_size=1, max_size=60), st.integers(2, 10), st.integers(0, 1000))
def test_every_type_is_in_exactly_one_bin_and_shares_sum_to_one(counts, base, seed):
    if not any(counts):
        counts[0] = 1
    bins = frequency_bins(counts, base)
    for count, number in zip(counts, bins.index):
        low, high = bins.edges(number)
        assert low <= count < high
    found = report(seed, len(counts))
    if not found.types:
        return
    rows = found.by_bin(bins)
    assert sum(row.types for row in rows) == found.types
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert sum(row.types * row.loss for row in rows) / found.types == pytest.approx(found.balanced)
    assert all(0 <= row.accuracy <= 1 for row in rows)


def test_types_that_training_lacks_have_a_bin_of_their_own_and_no_part_in_the_gap():
    counts = np.array([0, 1, 100])
    found = TokenLossReport(np.array([9.0, 4.0, 2.0]), np.array([1, 2, 4]))
    rows = found.by_bin(frequency_bins(counts))
    assert [(row.label, row.types, row.loss) for row in rows] == [("0", 1, 9), ("[1, 3)", 1, 2), ("[81, 243)", 1, 0.5)]
    assert found.gap(frequency_bins(counts)) == 1.5
    assert found.slope(counts) == pytest.approx(-1.5 / np.log(100))
    assert found.slope([5, 5, 5]) is None
    assert TokenLossReport(np.ones(3), np.array([0, 1, 0])).gap(frequency_bins(counts)) is None


def test_the_slope_is_a_least_squares_line():
    found, counts = report(3), np.random.default_rng(3).integers(0, 500, 50)
    inside = found.seen & (counts > 0)
    line = np.polyfit(np.log(counts[inside]), found.per_token[inside], 1)
    assert found.slope(counts) == pytest.approx(line[0])


def test_intervals_hold_the_mean_and_shrink_with_more_types():
    values = np.random.default_rng(0).exponential(1, 4000)
    narrow, wide = interval(values, 500), interval(values[:40], 500)
    assert narrow[0] < values.mean() < narrow[1]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5
    half = 1.96 * values.std() / np.sqrt(4000)
    assert narrow[1] - narrow[0] == pytest.approx(2 * half, rel=0.15)
    assert interval(values, 500) == narrow
    row = report().by_bin(frequency_bins(np.arange(50)), bootstrap=200)[-1]
    assert row.low <= row.loss <= row.high


def test_parquet_there_and_back(tmp_path):
    for correct in (True, False):
        found = TokenLossReport(*vars(report(1, correct=correct)).values())
        object.__setattr__(found, "tokenizer", "abc")
        found.to_parquet(tmp_path / f"{correct}.parquet")
        again = TokenLossReport.from_parquet(tmp_path / f"{correct}.parquet")
        np.testing.assert_array_equal(again.loss, found.loss)
        np.testing.assert_array_equal(again.counts, found.counts)
        assert (again.correct is None) is not correct
        assert again.tokenizer == "abc"
    with pytest.raises(UserError, match="exists already"):
        found.to_parquet(tmp_path / "True.parquet")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(UserError, match="not Parquet"):
        TokenLossReport.from_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="does not exist"):
        TokenLossReport.from_parquet(tmp_path / "y.parquet")
    TokenCounts(np.array([1, 2])).save(tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no losses by token type"):
        TokenLossReport.from_parquet(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("counts", "base", "message"),
    [
        ([1, -1], 3, "cannot be negative"),
        ([0.5, 1], 3, "whole numbers"),
        ([[1]], 3, "one number for each"),
        ([], 3, "one number for each"),
        ([0, 0], 3, "all zero"),
        ([1, 2], 1, "at least 2"),
        ([1, 2], 2.5, "at least 2"),
    ],
)
def test_bad_counts_are_sentences(counts, base, message):
    with pytest.raises(UserError, match=message):
        frequency_bins(counts, base)


def test_counts_and_bins_of_the_wrong_length_are_refused():
    with pytest.raises(UserError, match="for 3 token types, but the losses are for 50"):
        report().by_bin(frequency_bins([1, 2, 3]))
    with pytest.raises(UserError, match="for 3 token types"):
        report().slope([1, 2, 3])


def test_a_comparison_is_the_papers_deltas():
    counts = np.array([1, 100])
    low = TokenLossReport(np.array([0.1, 9.0]), np.array([1, 9]))
    high = TokenLossReport(np.array([1.1, 9.9]), np.array([1, 9]))
    found = compare(high, low, frequency_bins(counts))
    assert found["delta_average"] == pytest.approx(0.19)
    assert found["delta_balanced"] == pytest.approx((1.1 + 1.1) / 2 - (0.1 + 1.0) / 2)
    assert found["delta_ratio"] == pytest.approx(0.55 / 0.19)
    assert [row["ratio"] for row in found["bins"]] == pytest.approx([11, 1.1])
    assert compare(low, low, frequency_bins(counts))["delta_ratio"] is None
    with pytest.raises(UserError, match="different data"):
        compare(high, TokenLossReport(np.ones(2), np.array([2, 9])), frequency_bins(counts))
    with pytest.raises(UserError, match="vocabularies of 2 and 50"):
        compare(high, report(), frequency_bins(counts))


def test_an_audit_of_a_padded_table_has_everything():
    counts = TokenCounts(np.arange(40))
    found = audit(report(), counts, bootstrap=50, against=report(), earlier=[report()])
    assert found["against"]["delta_average"] == 0
    assert found["learning_speed"]["auc"]["mean"] == 0
    assert found["balanced_interval"][0] < found["balanced"] < found["balanced_interval"][1]
    with pytest.raises(UserError, match="of another tokenizer"):
        audit(report(), TokenCounts(np.arange(60)))
