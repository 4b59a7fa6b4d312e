"""The n-gram model: Kneser-Ney by hand, against what KenLM's estimator wrote, and by its laws."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.models.ngram import BEGIN, END, NGramModel, estimate, read_arpa

# corpus.txt is generated; model.arpa is what KenLM 0.3's `lmplz -o 4 --discount_fallback` made of it.
LMPLZ = Path(__file__).parent / "lmplz"
CORPUS = (LMPLZ / "corpus.txt").read_text().splitlines()

documents = st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=7).map(" ".join), min_size=1, max_size=12)


def by_words(model, order):
    return {
        tuple(model.words[i] for i in ids): values
        for ids, *values in zip(
            model.ids(order).tolist(), model.log_probability[order - 1], model.log_backoff[order - 1], strict=True
        )
    }


def test_it_is_what_lmplz_estimates():
    ours, theirs = estimate(CORPUS, 4), read_arpa(LMPLZ / "model.arpa")
    assert ours.sizes == theirs.sizes
    assert ours.fallback == [1]
    assert ours.discounts[1] == pytest.approx((0.543307, 0.932121, 2.54248), rel=1e-5)
    for n in range(1, 5):
        mine, other = by_words(ours, n), by_words(theirs, n)
        assert mine.keys() == other.keys()
        for gram, values in mine.items():
            assert values == pytest.approx(other[gram], abs=1e-6)


def slow(texts, order):
    """Chen and Goodman's formulas over dictionaries, one probability at a time."""
    sentences = [["<s>", *text.split(), "</s>"] for text in texts]
    raw = [Counter(tuple(s[i : i + n]) for s in sentences for i in range(len(s) - n + 1)) for n in range(1, order + 1)]
    counts = []
    for n in range(1, order + 1):
        if n == order:
            counts.append(raw[n - 1])
            continue
        before = Counter(gram[1:] for gram in raw[n])
        counts.append({g: raw[n - 1][g] if g[0] == "<s>" else before[g] for g in raw[n - 1]})
    counts[0] = {g: c for g, c in counts[0].items() if g != ("<s>",)}
    discounts = []
    for level in counts:
        t = Counter(level.values())
        try:
            y = t[1] / (t[1] + 2 * t[2])
            found = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
            fits = all(0 <= d <= k for k, d in enumerate(found, 1))
        except ZeroDivisionError:
            fits = False
        discounts.append(found if fits else [0.5, 1.0, 1.5])
    vocabulary = {w for s in sentences for w in s} - {"<s>"} | {"<unk>"}

    def probability(word, context):
        level = counts[len(context)]
        discount = discounts[len(context)]
        after = {g: c for g, c in level.items() if g[:-1] == context}
        lower = probability(word, context[1:]) if context else 1 / len(vocabulary)
        if not after:
            return lower
        total = sum(after.values())
        count = after.get((*context, word), 0)
        taken = discount[min(count, 3) - 1] if count else 0.0
        return (count - taken + sum(discount[min(c, 3) - 1] for c in after.values()) * lower) / total

    return vocabulary, probability


@given(documents, st.integers(2, 4))
def test_it_is_the_definition_by_dictionaries(texts, order):
    model = estimate(texts, order)
    vocabulary, probability = slow(texts, order)
    words = [w.decode() for w in model.words]
    for context in {tuple(["<s>", *text.split()][:order][-(order - 1) :]) for text in texts}:
        distribution = model.distribution(context)
        for word in vocabulary:
            assert distribution[words.index(word)] == pytest.approx(probability(word, context), abs=1e-12)


@given(documents, st.integers(2, 5))
def test_the_probabilities_after_every_context_sum_to_one(texts, order):
    model = estimate(texts, order)
    words = [w.decode() for w in model.words]
    contexts = [c for n in range(order) for c in itertools.islice(itertools.product([*words, "new"], repeat=n), 40)]
    contexts += [tuple(["<s>", *text.split()][: order - 1]) for text in texts]
    for context in contexts:
        found = model.distribution(context)
        assert math.fsum(found) == pytest.approx(1.0, abs=1e-9)
        assert (np.delete(found, BEGIN) > 0).all()
        assert found[BEGIN] == 0


def test_counts_and_discounts_by_hand():
    # Different words before: a has <s>, b; b has <s>, a; c has b; </s> has a, b, c. So one word has 1, two 2, one 3.
    model = estimate(["a b c", "b a", "b a b"], 2)
    p = dict(zip(model.words, 10.0 ** model.log_probability[0], strict=True))
    y = 1 / (1 + 2 * 2)
    d1, d2, d3 = 1 - 2 * y * 2 / 1, 2 - 3 * y * 1 / 2, 3.0
    assert model.discounts[0] == pytest.approx((d1, d2, d3))
    rest = (d1 + 2 * d2 + d3) / 8
    assert p[b"c"] == pytest.approx((1 - d1) / 8 + rest / 5)
    assert p[b"a"] == pytest.approx((2 - d2) / 8 + rest / 5)
    assert p[b"</s>"] == pytest.approx((3 - d3) / 8 + rest / 5)
    assert p[b"<unk>"] == pytest.approx(rest / 5)


def test_saved_models_are_the_same(tmp_path):
    model = estimate(CORPUS, 3)
    model.save(tmp_path / "m.safetensors", note="x")
    again, more = NGramModel.load(tmp_path / "m.safetensors")
    assert more == {"note": "x"}
    assert (again.words, again.discounts, again.fallback) == (model.words, model.discounts, model.fallback)
    for name in ("prefix", "word", "log_probability", "log_backoff"):
        for mine, other in zip(getattr(model, name), getattr(again, name), strict=True):
            np.testing.assert_array_equal(mine, other)
    model.write_arpa(tmp_path / "m.arpa")
    arpa = read_arpa(tmp_path / "m.arpa")
    np.testing.assert_allclose(arpa.distribution(["the"]), model.distribution(["the"]), rtol=1e-7)


def test_symbols_in_the_text_are_left_out_and_blank_texts_too():
    assert estimate(["a <s> b </s>", " \n", "<unk>"], 2).words == estimate(["a b"], 2).words
    assert estimate(["a b"], 2).words[END] == b"</s>"


@pytest.mark.parametrize("texts", [[], ["", "  \n"], ["<s> </s>"]])
def test_an_empty_reference_is_refused(texts):
    with pytest.raises(UserError, match="reference of the n-gram model is empty"):
        estimate(texts)


def test_bad_orders_small_texts_and_bad_files_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="between 2 and 6, not 1"):
        estimate(["a b"], 1)
    with pytest.raises(UserError, match="no Kneser-Ney discounts for 1-grams"):
        estimate(["a b"], 2, fallback=None)
    with pytest.raises(UserError, match="does not exist"):
        NGramModel.load(tmp_path / "no.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="holds no n-gram model"):
        NGramModel.load(tmp_path / "bad.safetensors")
    whole = (LMPLZ / "model.arpa").read_text()
    for bad in ("", whole[: len(whole) // 2], whole.replace("ngram 2=130", "ngram 2=131")):
        (tmp_path / "bad.arpa").write_text(bad)
        with pytest.raises(UserError, match="not a whole ARPA file"):
            read_arpa(tmp_path / "bad.arpa")
