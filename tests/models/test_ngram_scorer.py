"""Scoring documents by an n-gram model: the fast ways are the definition, and are KenLM."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.models.ngram import NGramModel, estimate
from modelwright.models.ngram_scorer import NGramScorer
from modelwright.models.ngram_scoring import Lookup

LMPLZ = Path(__file__).parent / "lmplz"
CORPUS = (LMPLZ / "corpus.txt").read_text().splitlines()
TEXTS = [
    *CORPUS[:5],
    "the cat\tsat  on\nthe mat\x0b and\x0c ran\r",
    "nothing known here",
    "the unknown cat",
    "a",
    "",
    " \n ",
    "the <s> cat </s> <unk>",
    "die Ärzte straße\u3000the",
    "the " * 400,
]
ENGINES = ["numpy", pytest.param("compiled", marks=pytest.mark.slow)]


def by_definition(model, text):
    words = [w.decode() for w in model.words]
    history, total = ["<s>"], 0.0
    # Only ASCII white space separates, as in KenLM; what spells a symbol is an unknown word.
    for word in [*(w.decode() for w in text.encode().split()), None]:
        at = 2 if word is None else words.index(word) if word in words[3:] else 0
        total += math.log10(model.distribution(history)[at])
        history.append("</s>" if word is None else word if at else "<unk>")
    return total, len(history) - 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [2, 3, 5])
def test_scores_are_the_definition(engine, order):
    model = estimate(CORPUS, order)
    found = Lookup(model, engine).score(TEXTS)
    slow = [by_definition(model, text) for text in TEXTS]
    np.testing.assert_allclose(found.log_probability, [p for p, _ in slow], rtol=1e-6, atol=1e-5)
    assert found.tokens.tolist() == [n for _, n in slow]
    assert found.unknown[TEXTS.index("nothing known here")] == 3
    assert found.unknown[TEXTS.index("the <s> cat </s> <unk>")] == 3
    assert np.isnan(found.perplexity).tolist() == [not text.split() for text in TEXTS]


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=8),
    st.lists(st.text("abcx ", max_size=12), min_size=1, max_size=6),
    st.integers(2, 6),
)
def test_vectors_are_the_definition_on_any_text(reference, texts, order):
    model = estimate(reference, order)
    found = Lookup(model, "numpy").score(texts)
    np.testing.assert_allclose(
        found.log_probability, [by_definition(model, text)[0] for text in texts], rtol=1e-6, atol=1e-5
    )


@pytest.mark.slow
def test_the_engines_agree_whatever_the_batch_and_the_threads(monkeypatch):
    model = estimate(CORPUS, 5)
    compiled, vectors = Lookup(model, "compiled"), Lookup(model, "numpy")
    whole = compiled.score(TEXTS * 3)
    np.testing.assert_allclose(whole.log_probability, vectors.score(TEXTS * 3).log_probability, rtol=1e-12)
    np.testing.assert_array_equal(whole.unknown, vectors.score(TEXTS * 3).unknown)
    monkeypatch.setattr("modelwright.models.ngram_scoring._BLOCK", 64)
    for lookup in (compiled, vectors):
        one, three = lookup.score(TEXTS), lookup.score(TEXTS * 3, workers=2)
        np.testing.assert_array_equal(three.log_probability, np.tile(one.log_probability, 3))


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_kenlm_to_four_digits(engine, tmp_path):
    kenlm = pytest.importorskip("kenlm")
    scorer = NGramScorer(order=4, engine=engine).fit(CORPUS)
    scorer.save(tmp_path / "ours.arpa")
    for path in (tmp_path / "ours.arpa", LMPLZ / "model.arpa"):  # the second is lmplz's own estimate
        theirs = kenlm.Model(str(path))
        texts = [t for t in TEXTS if "<" not in t]  # there KenLM takes a spelt symbol for the symbol
        # Summed here in float64: KenLM's own sum is a float32, which is off by 1e-3 after 400 words.
        sums = [sum(p for p, *_ in theirs.full_scores(t)) for t in texts]
        np.testing.assert_allclose(scorer.scores(texts).log_probability, sums, atol=1e-4, rtol=0)
        known = [t for t in texts if t.split()]
        np.testing.assert_allclose(scorer.perplexity(known), [theirs.perplexity(t) for t in known], rtol=1e-4)


def test_the_backend_kenlm_gives_the_same(tmp_path):
    pytest.importorskip("kenlm")
    ours, theirs = NGramScorer(3).fit(CORPUS), NGramScorer(3, "kenlm").fit(CORPUS)
    texts = [*(t for t in TEXTS if "<" not in t), "half of a pair \ud83d"]
    mine, other = ours.scores(texts), theirs.scores(texts)
    np.testing.assert_allclose(mine.log_probability, other.log_probability, atol=1e-4)
    np.testing.assert_array_equal(mine.tokens, other.tokens)
    np.testing.assert_array_equal(mine.unknown, other.unknown)
    with pytest.raises(UserError, match="KenLM cannot read"):
        (tmp_path / "bad.bin").write_bytes(b"x")
        NGramScorer.load(tmp_path / "bad.bin", "kenlm")
    with pytest.raises(UserError, match="read it with the backend 'kenlm'"):
        NGramScorer.load(tmp_path / "bad.bin")


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary():
    words = [b"<unk>", b"<s>", b"</s>", b"a", b"b", b"c"]
    p = np.full(6, -math.log10(5))  # <s> is never predicted
    empty = np.empty(0, dtype=np.int64)
    # One bigram, so that there is a table; it says what the unigrams say.
    model = NGramModel(
        words,
        [empty, np.array([3])],
        [np.arange(6, dtype=np.int32), np.array([4], dtype=np.int32)],
        [p, p[:1]],
        [np.zeros(6), np.zeros(1)],
    )
    found = Lookup(model, "numpy").score(["a b c", "c", "x y a b a b"]).perplexity
    np.testing.assert_allclose(found, 5.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["m.safetensors", "m.arpa"])
def test_a_loaded_scorer_gives_the_same(tmp_path, name):
    scorer = NGramScorer(order=3, engine="numpy").fit(CORPUS)
    scorer.save(tmp_path / name)
    again = NGramScorer.load(tmp_path / name, engine="numpy")
    assert again.order == 3
    np.testing.assert_allclose(again.perplexity(TEXTS), scorer.perplexity(TEXTS), rtol=1e-6)


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="no backend 'pythn': did you mean 'python'"):
        NGramScorer(backend="pythn")
    with pytest.raises(UserError, match="call fit first"):
        NGramScorer().perplexity(["a"])
    with pytest.raises(UserError, match="no n-gram model to save"):
        NGramScorer().save("x.arpa")
