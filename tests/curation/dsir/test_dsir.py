import collections
import hashlib
import itertools
import math

import numpy as np
import pytest
from datasets import Dataset

from modelwright.curation.dsir import DsirSelector
from modelwright.curation.dsir.selector import Buckets, bucket, gumbel, log_ratio, tokens
from modelwright.curation.selector import Selector, make_selector
from modelwright.errors import UserError
from modelwright.worlds.domains import domains

WORLD = domains(1, pool_size=120, target_size=20)
POOL = [row["text"] for row in WORLD.pool]
TARGET = [row["text"] for row in WORLD.target]


def slow_weights(target, pool, num_buckets, laplace=False):
    """The definition, one n-gram at a time."""

    def ngrams(text):
        words = tokens(text)
        return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]

    def counts(texts):
        found = collections.Counter()
        for text in texts:
            for ngram in ngrams(text):
                found[int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % num_buckets] += 1
        return found

    p, q = counts(target), counts(pool)
    add = 1 if laplace else 0
    p_total, q_total = sum(p.values()) + add * num_buckets, sum(q.values())
    return [
        sum(
            n * (math.log((p[b] + add) / p_total + 1e-8) - math.log(q[b] / q_total + 1e-8))
            for b, n in counts([text]).items()
        )
        for text in pool
    ]


@pytest.mark.parametrize("laplace", [False, True])
@pytest.mark.parametrize("num_buckets", [50, 10_000])
def test_weights_equal_the_definition(num_buckets, laplace):
    selector = DsirSelector(num_buckets=num_buckets, min_tokens=0, top_k=True, laplace=laplace).fit(TARGET, POOL)
    np.testing.assert_allclose(selector.score(POOL), slow_weights(TARGET, POOL, num_buckets, laplace), rtol=1e-9)


def test_tokens_are_lower_case_words_and_runs_of_punctuation():
    assert tokens("Don't  stop, x_1 += É!\n") == ["don", "'", "t", "stop", ",", "x_1", "+=", "é", "!"]


def test_buckets_are_sha256_of_unigrams_and_bigrams_in_any_state_of_the_cache(monkeypatch):
    expected = [bucket(ngram, 97) for ngram in ("a", "b", "a", "a b", "b a")]
    assert expected[0] == int(hashlib.sha256(b"a").hexdigest(), 16) % 97
    buckets = Buckets(97)
    assert buckets(["a", "b", "a"]).tolist() == expected
    assert buckets(["a", "b", "a"]).tolist() == expected
    monkeypatch.setattr("modelwright.curation.dsir.selector._CACHE_ENTRIES", 1)
    for _ in range(3):
        assert buckets(["a", "b", "a"]).tolist() == expected
        assert buckets(["c"]).tolist() == [bucket("c", 97)]
    assert buckets([]).shape == (0,)


def test_equal_distributions_give_weight_zero():
    selector = DsirSelector(min_tokens=0, top_k=True).fit(POOL, POOL)
    np.testing.assert_array_equal(selector.score(POOL), 0)
    assert (log_ratio(np.array([2, 4, 6]), np.array([1, 2, 3])) == 0).all()


def test_a_weight_is_a_sum_so_that_a_document_twice_weighs_about_twice():
    selector = DsirSelector(min_tokens=0, top_k=True).fit(TARGET, POOL)
    once, twice = selector.score([POOL[0], POOL[0] + "\n" + POOL[0]])
    assert twice == pytest.approx(2 * once, rel=0.2)


def test_one_document_is_drawn_with_the_probability_of_its_weight():
    # Chi-square over many seeds: P(i) = softmax(w)_i.
    pool = ["a a a b", "a b b b", "b b b b", "a a a a", "a b c c"]
    target = ["a a b b c", "a b"]
    weights = DsirSelector(min_tokens=0, top_k=True).fit(target, pool).score(pool)
    weights = 0.5 * weights  # flatter, so that every document is drawn
    expected = np.exp(weights - weights.max())
    expected /= expected.sum()
    draws = 4000
    noise = np.array([[gumbel(text, seed) for text in pool] for seed in range(draws)])
    counts = np.bincount(np.argmax(weights + noise, axis=1), minlength=len(pool))
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 18.5  # the 99.9% point for 4 degrees of freedom


def test_without_top_k_the_score_is_weight_plus_that_noise():
    plain = DsirSelector(min_tokens=0, top_k=True).fit(TARGET, POOL).score(POOL)
    noisy = DsirSelector(min_tokens=0, seed=5).fit(TARGET, POOL).score(POOL)
    np.testing.assert_allclose(noisy - plain, [gumbel(text, 5) for text in POOL], atol=1e-9)


def test_noise_is_gumbel_and_depends_on_seed_and_text_alone():
    values = np.array([gumbel(str(i), 0) for i in range(20_000)])
    assert values.mean() == pytest.approx(0.5772, abs=0.03)
    assert values.var() == pytest.approx(math.pi**2 / 6, rel=0.05)
    assert gumbel("x", 1) == gumbel("x", 1) != gumbel("x", 2)
    assert np.isfinite([gumbel("", -3), gumbel("\ud800", 2**64)]).all()


def test_batches_and_workers_change_nothing():
    selector = DsirSelector(min_tokens=0).fit(TARGET, POOL)
    pool = POOL * 10
    one = selector.score(pool)
    np.testing.assert_array_equal(one, selector.score(pool, workers=2))
    np.testing.assert_array_equal(one[:120], selector.score(POOL))
    np.testing.assert_array_equal(one[5:6], selector.score(POOL[5:6]))


def test_short_documents_are_dropped():
    text = " ".join(["word"] * 100)
    selector = DsirSelector().fit([text], [text])
    scores = selector.score([text, text[:-5], "", " "])
    assert np.isnan(scores).tolist() == [False, True, True, True]
    assert np.isnan(DsirSelector(min_tokens=0).fit([text], [text]).score(["", "a"])).tolist() == [True, False]


def test_it_finds_the_target_domain():
    kinds = np.array([row["kind"] for row in WORLD.pool])
    scores = DsirSelector(min_tokens=0, top_k=True).fit(TARGET, POOL).score(POOL)
    assert np.median(scores[kinds == "target"]) > np.median(scores[(kinds != "target") & (kinds != "markov")])


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="call fit with target and pool"):
        DsirSelector().fit(TARGET).score(["x"])
    with pytest.raises(UserError, match="The target has no tokens"):
        DsirSelector().fit([" "], POOL)
    with pytest.raises(UserError, match="The pool has no tokens"):
        DsirSelector().fit(TARGET, iter([]))
    with pytest.raises(UserError, match="call fit"):
        DsirSelector().score(["x"])
    with pytest.raises(UserError, match="num_buckets"):
        DsirSelector(num_buckets=0)
    with pytest.raises(UserError, match="min_tokens"):
        DsirSelector(min_tokens=-1)


def test_select_gives_a_waiting_target_its_pool():
    options = {"min_tokens": 0, "top_k": True}
    picked = DsirSelector(**options).fit(TARGET).select(Dataset.from_dict({"text": POOL}), k=5)
    expected = DsirSelector(**options).fit(TARGET, POOL).score(POOL)
    assert picked["score"] == sorted(expected, reverse=True)[:5]


def test_it_is_a_selector_of_the_catalog():
    selector = make_selector("dsir", {"num-buckets": "1e3", "top-k": "true"})
    assert selector == DsirSelector(num_buckets=1000, top_k=True)
    assert isinstance(selector, Selector)
    assert selector.needs_pool
