"""The gain formula is the difference of two likelihoods, and the fast search is the slow one."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.tokenization.swe.likelihood import (
    apply_merge,
    exact_search,
    greedy_merges,
    log_likelihood,
    merge_gain,
    merge_word,
    pair_counts,
    symbol_counts,
)
from modelwright.tokenization.swe.merging import PairIndex

SYLLABLES = st.lists(st.sampled_from(["ab", "abc", "aa", "dda", "c"]), min_size=1, max_size=6).map("".join)
WORDS = st.dictionaries(
    SYLLABLES | st.text("ab", min_size=1, max_size=12) | st.text("abcd", min_size=1, max_size=9),
    st.integers(1, 9),
    min_size=1,
)


def corpus(words):
    return {tuple(word): n for word, n in words.items()}


def likelihood(words):
    return log_likelihood(symbol_counts(words).values())


@settings(deadline=None)
@given(WORDS)
def test_predicted_gain_is_the_recomputed_difference(words):
    words = corpus(words)
    counts = symbol_counts(words)
    for (a, b), n in pair_counts(words).items():
        gain = merge_gain(n, counts[a], counts[b], sum(counts.values()), same=a == b)
        assert gain == pytest.approx(likelihood(apply_merge(words, (a, b))) - likelihood(words), abs=1e-9)


def test_pairs_do_not_overlap():
    assert pair_counts({tuple("aaa"): 5}) == {("a", "a"): 5}
    assert pair_counts({tuple("aaaa"): 1, tuple("baa"): 2}) == {("a", "a"): 4, ("b", "a"): 2}
    assert merge_word(tuple("aaaab"), ("a", "a")) == (("aa", "aa", "b"), 2)


def index(words, **options):
    return PairIndex(sorted(set("".join(words))), list(words), list(words.values()), **options)


@settings(deadline=None, max_examples=200)
@given(WORDS, st.integers(1, 3))
def test_fast_search_makes_the_same_merges(words, min_frequency):
    slow = greedy_merges(corpus(words), 8, min_frequency=min_frequency)
    fast = index(words, min_frequency=min_frequency)
    merges = list(fast.merges(8))
    assert [(m.pair, m.count) for m in merges] == [(m.pair, m.count) for m in slow]
    assert [m.gain for m in merges] == pytest.approx([m.gain for m in slow], abs=1e-8)
    expected = corpus(words)
    for merge in slow:
        expected = apply_merge(expected, merge.pair)
    merged = Counter()
    for word, n in zip(fast.segmentation(), words.values(), strict=True):
        merged[word] += n
    assert merged == expected
    assert dict(zip(fast.symbols, fast.counts.tolist(), strict=False)) | symbol_counts(expected) == dict(
        zip(fast.symbols, fast.counts.tolist(), strict=False)
    )
    assert fast.total == sum(symbol_counts(expected).values())


def test_forgetting_rare_pairs_changes_nothing():
    draw = random.Random(0)
    syllables = ("ka", "lom", "aaa", "tri", "ne", "ost", "iva", "b")
    words = {"".join(draw.choice(syllables) for _ in range(4)): draw.randint(1, 3) for _ in range(40)}
    fast, merges = index(words, min_frequency=3), []
    for merge in fast.merges(400):
        merges.append(merge.pair)
        fast._compact()
    assert len(merges) > 20
    assert merges == [m.pair for m in greedy_merges(corpus(words), 400, min_frequency=3)]


def test_longest_symbol():
    merges = list(index({"abcdabcd": 9, "abcd": 5}, max_length=2).merges(9))
    assert merges
    assert all(len("".join(merge.pair)) == 2 for merge in merges)


def test_ties_go_to_the_more_frequent_then_to_the_first():
    # Two pairs of equal counts everywhere: the one that sorts first, whatever the order of the words.
    for words in ({"cd": 4, "ab": 4}, {"ab": 4, "cd": 4}):
        assert next(iter(index(words).merges(1))).pair == ("a", "b")
        assert greedy_merges(corpus(words), 1)[0].pair == ("a", "b")


def test_stops_when_nothing_raises_the_likelihood():
    assert greedy_merges({tuple("ab"): 1, tuple("ba"): 1, tuple("aabb"): 1}, 50) == []
    assert 0 < len(greedy_merges({tuple("abab"): 9, tuple("cab"): 2}, 50)) < 5
    assert greedy_merges({("a",): 3}, 5) == []
    assert list(index({"a": 3}).merges(5)) == []


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=6), st.integers(1, 5), min_size=1, max_size=5))
def test_greedy_is_at_most_the_optimum(words):
    words = corpus(words)
    best, optimum = exact_search(words, 3)
    assert len(best) <= 3
    merged = words
    for pair in best:
        merged = apply_merge(merged, pair)
    assert likelihood(merged) == pytest.approx(optimum)
    greedy = likelihood(words) + sum(merge.gain for merge in greedy_merges(words, 3))
    assert greedy <= optimum + 1e-9


def test_greedy_can_fall_short():
    words = corpus({"abab": 3, "babbaaab": 3})
    assert greedy_merges(words, 3) == []  # no single merge gains anything
    assert exact_search(words, 3)[1] > likelihood(words) + 1
