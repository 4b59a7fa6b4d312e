"""TF-IDF: the hashed, streamed weights are scikit-learn's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer

from modelwright.curation import tfidf
from modelwright.curation.tfidf import TfidfSelector
from modelwright.errors import UserError

_GENERATOR = np.random.default_rng(0)
_WORDS = [f"word{i}" for i in range(200)]
POOL = [" ".join(_GENERATOR.choice(_WORDS, size=_GENERATOR.integers(1, 40))) for _ in range(300)]
TARGET = [" ".join(_GENERATOR.choice(_WORDS[:40], size=20)) for _ in range(7)]


@pytest.mark.parametrize("similarity", ["mean", "max"])
@pytest.mark.parametrize("ngrams", [1, 2])
def test_scores_are_those_of_the_plain_definition(
    similarity: str, ngrams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfidf, "_BATCH", 64)
    plain = TfidfVectorizer(ngram_range=(1, ngrams)).fit(POOL)
    # Words of the target that the pool lacks: scikit-learn drops them, the hash keeps them, so there are none here.
    target = TARGET if ngrams == 1 else POOL[:7]
    pool, wanted = plain.transform(POOL).toarray(), plain.transform(target).toarray()
    if similarity == "mean":
        centre = wanted.mean(axis=0)
        expected = pool @ (centre / np.linalg.norm(centre))
    else:
        expected = (pool @ wanted.T).max(axis=1)
    selector = TfidfSelector(similarity=similarity, ngrams=ngrams, features=2**24).fit(target, POOL)
    np.testing.assert_allclose(selector.score(POOL), expected, atol=1e-12)


def test_scores_do_not_depend_on_batches_or_the_order_of_targets() -> None:
    whole = TfidfSelector().fit(TARGET, POOL).score(POOL)
    parts = TfidfSelector().fit(TARGET[::-1], POOL)
    np.testing.assert_allclose(np.concatenate([parts.score(POOL[:100]), parts.score(POOL[100:])]), whole, atol=1e-12)
    assert parts.score([]).shape == (0,)
    assert parts.score(["+++"]).tolist() == [0.0]


def test_a_target_document_in_the_pool_comes_first() -> None:
    pool = [*POOL, TARGET[0]]
    assert np.argmax(TfidfSelector(similarity="max").fit(TARGET, pool).score(pool)) == len(POOL)


def test_the_pool_is_streamed_and_the_fit_can_wait_for_it() -> None:
    def stream() -> Iterator[str]:
        yield from POOL

    scores = TfidfSelector().fit(TARGET, stream()).score(POOL)
    chosen = TfidfSelector().fit(TARGET).select(Dataset.from_dict({"text": POOL}), k=5)
    assert chosen["score"] == sorted(scores, reverse=True)[:5]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="target is empty"):
        TfidfSelector().fit([], POOL)
    with pytest.raises(UserError, match="hold no words"):
        TfidfSelector().fit(["+", "a"], POOL)
    with pytest.raises(UserError, match="not fitted"):
        TfidfSelector().fit(TARGET).score(POOL)
    with pytest.raises(UserError, match="similarity must be"):
        TfidfSelector(similarity="median")
    with pytest.raises(UserError, match="ngrams must be at least 1"):
        TfidfSelector(ngrams=0)
