"""The two controls."""

from __future__ import annotations

import numpy as np
import scipy.stats
from datasets import Dataset

from modelwright.curation.random_sample import AllSelector, RandomSelector

TEXTS = [f"document {i}" for i in range(4000)]


def test_a_sample_depends_on_seed_and_text_only() -> None:
    scores = RandomSelector(seed=1).score(TEXTS)
    assert np.array_equal(scores, RandomSelector(seed=1).score(TEXTS))
    assert np.array_equal(scores[::-1], RandomSelector(seed=1).score(TEXTS[::-1]))
    assert np.array_equal(scores[7:9], RandomSelector(seed=1).score(TEXTS[7:9]))
    other = RandomSelector(seed=2).score(TEXTS)
    assert abs(scipy.stats.pearsonr(scores, other).statistic) < 0.05


def test_scores_are_uniform() -> None:
    scores = RandomSelector(seed=0).score(TEXTS)
    assert scipy.stats.kstest(scores, "uniform").pvalue > 0.001
    assert scores.min() >= 0
    assert scores.max() < 1


def test_every_document_is_equally_likely_over_seeds() -> None:
    # 10 of 40 documents, 300 seeds: each is expected 75 times.
    counts = np.zeros(40)
    for seed in range(300):
        counts[np.argsort(-RandomSelector(seed=seed).score(TEXTS[:40]))[:10]] += 1
    # Inclusion counts vary less than a multinomial's: 0.75 of its variance.
    statistic = ((counts - 75) ** 2 / 75).sum() / 0.75
    assert scipy.stats.chi2.sf(statistic, df=39) > 0.001


def test_all_keeps_everything_in_order() -> None:
    pool = Dataset.from_dict({"text": ["b", "a", "", "c"]})
    assert AllSelector().select(pool)["text"] == ["b", "a", "c"]
    assert AllSelector().select(pool, k=2)["text"] == ["b", "a"]
