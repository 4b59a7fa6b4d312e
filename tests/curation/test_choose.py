"""Choosing by rank, threshold and budget: compared with a slow reference that follows the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.curation.choose import Rule, choose, length_correlation, quantiles
from modelwright.errors import UserError

_SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan, -math.inf])


def reference(scores: list[float], rule: Rule, sizes: list[int], hashes: list[int]) -> list[int]:
    """One document after the other, by the definitions."""
    ranked = sorted((i for i, s in enumerate(scores) if not math.isnan(s)), key=lambda i: (-scores[i], i))
    chosen: list[int] = []
    seen: set[int] = set()
    used = 0
    for i in ranked:
        if rule.threshold is not None and scores[i] <= rule.threshold:
            break
        if rule.dedup and hashes[i] in seen:
            continue
        seen.add(hashes[i])
        if rule.top is not None and len(chosen) == rule.top:
            break
        used += sizes[i]
        if rule.token_budget is not None and used > rule.token_budget:
            break
        chosen.append(i)
    return chosen


@settings(max_examples=500)
@given(
    st.lists(st.tuples(_SCORES, st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=30),
    st.none() | st.integers(1, 40),
    st.none() | st.sampled_from([-1.0, 0.0, 0.3]),
    st.none() | st.integers(1, 60),
    st.booleans(),
)
def test_the_selection_is_that_of_the_definitions(
    documents: list[tuple[float, int, int]], top: int | None, threshold: float | None, budget: int | None, dedup: bool
) -> None:
    scores, sizes, hashes = (list(column) for column in zip(*documents))
    rule = Rule(top=top, threshold=threshold, token_budget=budget, dedup=dedup)
    expected = reference(scores, rule, sizes, hashes)
    arguments = {"tokens": np.array(sizes), "hashes": np.array(hashes), "lengths": np.array(sizes)}
    if (top is not None and top > len(scores)) or not expected:
        with pytest.raises(UserError):
            choose(np.array(scores), rule, **arguments)
    else:
        assert choose(np.array(scores), rule, **arguments).tolist() == expected


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=50), st.integers(1, 500))
def test_a_budget_is_kept_and_the_next_document_would_exceed_it(
    documents: list[tuple[float, int]], budget: int
) -> None:
    scores, tokens = (np.array(column) for column in zip(*documents))
    order = np.argsort(-scores, kind="stable")
    if tokens[order[0]] > budget:
        with pytest.raises(UserError, match=f"alone has {tokens[order[0]]} tokens, more than the budget of {budget}"):
            choose(scores, Rule(token_budget=budget), tokens=tokens)
        return
    chosen = choose(scores, Rule(token_budget=budget), tokens=tokens)
    assert tokens[chosen].sum() <= budget
    assert len(chosen) == len(scores) or tokens[order[: len(chosen) + 1]].sum() > budget


def test_a_threshold_is_strict() -> None:
    assert choose(np.array([0.1, 0.3, 0.2]), Rule(threshold=0.1)).tolist() == [1, 2]


def test_ties_keep_the_order_of_the_pool() -> None:
    assert choose(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), Rule(top=4)).tolist() == [1, 3, 0, 2]


def test_permuting_the_pool_permutes_the_selection() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random(50)
    order = generator.permutation(50)
    chosen = choose(scores, Rule(top=10))
    assert order[choose(scores[order], Rule(top=10))].tolist() == chosen.tolist()


def test_nan_and_blocked_documents_are_never_chosen() -> None:
    scores = np.array([np.nan, 3.0, 2.0, np.nan, 1.0])
    assert choose(scores, Rule()).tolist() == [1, 2, 4]
    assert choose(scores, Rule(top=5), blocked=np.array([False, True, False, False, False])).tolist() == [2, 4]
    with pytest.raises(UserError, match="No document of the pool has a score"):
        choose(np.array([np.nan]), Rule())
    with pytest.raises(UserError, match="shares text with the held-out"):
        choose(np.array([1.0, np.nan]), Rule(), blocked=np.array([True, False]))


def test_faults_of_the_rule() -> None:
    with pytest.raises(UserError, match="top is 1,001, but the pool has only 3 documents"):
        choose(np.ones(3), Rule(top=1001))
    with pytest.raises(UserError, match=r"above 0\.9; the best of the pool has 0\.5"):
        choose(np.array([0.5, 0.1]), Rule(threshold=0.9))
    for name in ("top", "token_budget", "byte_budget", "length_buckets"):
        with pytest.raises(UserError, match=f"{name} must be at least 1, not 0"):
            Rule(**{name: 0})
    with pytest.raises(UserError, match="not NaN"):
        Rule(threshold=math.nan)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 30)), min_size=1, max_size=60), st.integers(1, 8))
def test_length_buckets_only_reorder(documents: list[tuple[float, int]], buckets: int) -> None:
    scores, lengths = (np.array(column) for column in zip(*documents))
    chosen = choose(scores, Rule(length_buckets=buckets), lengths=lengths)
    assert sorted(chosen) == list(range(len(scores)))
    if buckets == 1:
        assert chosen.tolist() == np.argsort(-scores, kind="stable").tolist()


def test_length_buckets_undo_a_score_that_is_only_a_length() -> None:
    lengths = np.random.default_rng(0).permutation(1000) + 1
    scores = 1.0 / lengths  # shortest first, whatever the content
    plain = choose(scores, Rule(top=100), lengths=lengths)
    assert lengths[plain].max() == 100
    even = choose(scores, Rule(top=100, length_buckets=10), lengths=lengths)
    # Each bucket of a hundred lengths gives its ten shortest.
    assert sorted(lengths[even].tolist()) == [100 * bucket + i for bucket in range(10) for i in range(1, 11)]


def test_length_buckets_keep_the_score_inside_a_bucket() -> None:
    generator = np.random.default_rng(1)
    scores, lengths = generator.random(200), generator.integers(1, 1000, 200)
    chosen = choose(scores, Rule(length_buckets=4), lengths=lengths)
    edges = np.quantile(lengths, [0.25, 0.5, 0.75])
    for bucket in range(4):
        inside = [i for i in chosen if np.searchsorted(edges, lengths[i]) == bucket]
        assert inside == sorted(inside, key=lambda i: -scores[i])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=2, max_size=40))
def test_correlations_are_those_of_scipy(documents: list[tuple[int, int]]) -> None:
    scores, lengths = (np.array(column, dtype=float) for column in zip(*documents))
    found = length_correlation(np.append(scores, np.nan), np.append(lengths, 3))
    if np.ptp(scores) == 0 or np.ptp(lengths) == 0:
        assert found == {"spearman": None, "pearson": None}
    else:
        assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, lengths).statistic, abs=1e-9)
        assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(scores, lengths).statistic, abs=1e-9)


def test_quantiles_leave_out_what_is_not_finite() -> None:
    found = quantiles(np.array([np.nan, 0.0, 1.0, 2.0, -np.inf]))
    assert found == {"min": 0, "p05": 0.1, "p25": 0.5, "median": 1, "p75": 1.5, "p95": 1.9, "max": 2}
    assert quantiles(np.array([np.nan])) is None
