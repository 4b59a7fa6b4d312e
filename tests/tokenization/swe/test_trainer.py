"""The exported tokenizer segments as training did, and loses nothing."""

import argparse
import itertools
import string
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.models.loading import load_tokenizer
from modelwright.models.tokenizers import SPECIAL_TOKENS, wrap
from modelwright.tokenization.swe import LikelihoodBpeTrainer, fit
from modelwright.tokenization.swe.likelihood import log_likelihood
from modelwright.tokenization.swe.merging import PairIndex
from modelwright.tokenization.swe.refine import (
    best_segmentation,
    count_segments,
    expectation_maximisation,
    log_probabilities,
    prune,
    removal_losses,
    unigram_model,
)
from modelwright.tokenization.swe.words import byte_alphabet, count_words, splitting


@pytest.fixture(scope="module")
def texts():
    sources = [Path(module.__file__).read_text(encoding="utf-8")[:30_000] for module in (argparse, string, textwrap)]
    return [*sources, "naïve Ω 🙂 text\r\n\tend"]


@pytest.mark.parametrize("alphabet", ["byte", "character"])
@settings(deadline=None, max_examples=80)
@given(st.text(st.characters(exclude_categories=("Cn", "Cs")), max_size=60))  # new letters depend on the library's age
def test_words_are_those_of_the_tokenizer(alphabet, text):
    split, _ = splitting(alphabet)
    words, characters = count_words([text], alphabet)
    assert sorted(words.elements()) == sorted(word for word, _ in split.pre_tokenize_str(text))
    assert characters == len(text)


@pytest.mark.parametrize("alphabet", ["byte", "character"])
def test_exported_segmentation_is_that_of_training(texts, alphabet):
    trainer = LikelihoodBpeTrainer(vocab_size=700, alphabet=alphabet)
    tokenizer = trainer.train_from_iterator(texts)
    words, _ = count_words(texts, alphabet)
    letters = byte_alphabet() if alphabet == "byte" else sorted(set().union(*words))
    index = PairIndex(letters, sorted(words), [words[w] for w in sorted(words)], min_frequency=2)
    assert tuple(index.merges(len(trainer.merges))) == trainer.merges
    for word, symbols in zip(sorted(words), index.segmentation(), strict=True):
        assert tuple(token.value for token in tokenizer.model.tokenize(word)) == symbols
    # Hence the likelihood over the texts is the one that the gains promise.
    start = log_likelihood(PairIndex(letters, list(words), list(words.values())).counts)
    reached = log_likelihood(index.counts)
    assert reached - start == pytest.approx(sum(m.gain for m in trainer.merges), rel=1e-9)
    characters = sum(map(len, texts))
    assert fit(tokenizer, texts).bits_per_character == pytest.approx(-reached / characters / 0.6931471805599453)


@pytest.mark.parametrize("options", [{}, {"refine": "em"}, {"prune_from": 500}])
def test_bytes_come_back(texts, options, tmp_path):
    tokenizer = LikelihoodBpeTrainer(vocab_size=400, special_tokens=SPECIAL_TOKENS, **options).train_from_iterator(
        texts
    )
    wrap(tokenizer).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert len(again) == 400
    assert again.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    for text in [*texts, "", "\x00 \ufffe Ж\n\n  x", "<pa d>"]:
        assert again.decode(again(text)["input_ids"]) == text


def test_characters_come_back_with_single_blanks(texts):
    tokenizer = LikelihoodBpeTrainer(vocab_size=500, alphabet="character").train_from_iterator(texts)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == " ".join(text.split())
    assert tokenizer.encode("ж").tokens == ["▁", "<unk>"]


@pytest.mark.parametrize("refine", [None, "em"])
@pytest.mark.parametrize("alphabet", ["byte", "character"])
def test_special_tokens_that_stand_in_the_text_are_no_words(alphabet, refine):
    special = ["<unk>", "<unk>s", "<s>"]
    texts = ["<s>the <unk> cat<unk> sat on <unk>s the mat "] * 30
    trainer = LikelihoodBpeTrainer(
        vocab_size=300 if alphabet == "byte" else 60, alphabet=alphabet, refine=refine, special_tokens=special
    )
    tokenizer = trainer.train_from_iterator(texts)
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [vocabulary[token] for token in special] == [0, 1, 2]
    words, _ = count_words(texts, alphabet, special)
    found = [token for token in tokenizer.encode(texts[0]).tokens if token not in special]
    assert sorted("".join(found * 30)) == sorted("".join(words.elements()))  # the tokenizer sees the same words
    assert not any("<" in word for word in words)


def test_a_special_token_that_is_an_ordinary_one_is_refused():
    with pytest.raises(UserError, match="special token 'a' is an ordinary token"):
        LikelihoodBpeTrainer(vocab_size=300, special_tokens=["a"]).train_from_iterator(["b c"])


def test_same_texts_same_tokenizer(texts):
    first, second = (LikelihoodBpeTrainer(vocab_size=400).train_from_iterator(order) for order in (texts, texts[::-1]))
    assert first.to_str() == second.to_str()


def test_trains_on_files(texts, tmp_path):
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    from_file = LikelihoodBpeTrainer(vocab_size=300).train(tmp_path / "a.txt")
    assert from_file.to_str() == LikelihoodBpeTrainer(vocab_size=300).train_from_iterator(texts[:1]).to_str()
    with pytest.raises(UserError):
        LikelihoodBpeTrainer().train(tmp_path / "missing.txt")


@pytest.fixture(scope="module")
def merged(texts):
    words, _ = count_words(texts, "byte")
    index = PairIndex(byte_alphabet(), list(words), list(words.values()), min_frequency=2)
    list(index.merges(200))
    return words, index.symbols, dict(zip(index.symbols, index.counts.tolist(), strict=False))


def test_em_never_lowers_the_likelihood(merged):
    words, symbols, counts = merged
    refined, history = expectation_maximisation(words, symbols, counts)
    assert history[0] == pytest.approx(log_likelihood(counts.values()))
    assert len(history) > 2
    assert all(after >= before for before, after in itertools.pairwise(history))
    assert history[-1] == pytest.approx(log_likelihood(refined.values()))
    assert sum(n * len(symbol) for symbol, n in refined.items()) == sum(n * len(word) for word, n in words.items())


def test_viterbi_is_exact(merged):
    from tokenizers import Tokenizer

    words, symbols, counts = merged
    longest = max(map(len, words))
    scores = log_probabilities(symbols, counts, longest)
    exported = Tokenizer(unigram_model(scores))
    for word in sorted(words)[:400]:
        best = best_segmentation(word, scores, longest)
        assert exported.encode(word).tokens == best
        assert all(counts.get(symbol) for symbol in best)  # nothing of probability 0
        if len(word) < 9:
            assert sum(scores[s] for s in best) == pytest.approx(max(all_scores(word, scores)))


def all_scores(word, scores):
    if not word:
        return [0.0]
    ends = range(1, len(word) + 1)
    return [scores[word[:e]] + rest for e in ends if word[:e] in scores for rest in all_scores(word[e:], scores)]


def test_removal_loss_is_the_recomputed_difference(merged):
    _, symbols, counts = merged
    scores = log_probabilities(symbols, counts, 40)
    losses = removal_losses(symbols, counts, scores)
    assert set(losses) == {symbol for symbol in symbols if len(symbol) > 1}
    for symbol in list(losses)[::17]:
        new = dict(counts)
        n = new.pop(symbol)
        for part in best_segmentation(symbol, scores, 40, without=symbol):
            new[part] = new.get(part, 0) + n
        assert losses[symbol] == pytest.approx(log_likelihood(counts.values()) - log_likelihood(new.values()), abs=1e-6)


def test_pruning_keeps_the_alphabet_and_beats_merging(texts, merged):
    words, symbols, counts = merged
    kept, now = prune(words, symbols, counts, 320)
    assert len(kept) == 320
    assert kept == [symbol for symbol in symbols if symbol in set(kept)]
    assert set(byte_alphabet()) <= set(kept)
    assert now == count_segments(words, log_probabilities(kept, now, max(map(len, words))))
    plain = fit(LikelihoodBpeTrainer(vocab_size=320).train_from_iterator(texts), texts)
    pruned = fit(LikelihoodBpeTrainer(vocab_size=320, prune_from=456).train_from_iterator(texts), texts)
    refined = fit(LikelihoodBpeTrainer(vocab_size=320, refine="em").train_from_iterator(texts), texts)
    assert pruned.bits_per_character < refined.bits_per_character < plain.bits_per_character
    assert len(prune(words, symbols, counts, 10)[0]) == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "alphabet has 256 symbols"),
        ({"vocab_size": 258, "special_tokens": SPECIAL_TOKENS}, "at least 259"),
        ({"vocab_size": 3, "alphabet": "character"}, "alphabet"),
        ({"alphabet": "word"}, "alphabet"),
        ({"refine": "more"}, "refine"),
        ({"min_frequency": 0}, "min_frequency"),
        ({"prune_from": 10}, "prune_from"),
        ({"prune_share": 1.0}, "prune_share"),
        ({"max_token_length": 1}, "max_token_length"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LikelihoodBpeTrainer(**options).train_from_iterator(["some text"])


def test_no_text():
    for texts in ([], [""]):
        with pytest.raises(UserError, match="no text"):
            LikelihoodBpeTrainer().train_from_iterator(texts)
    with pytest.raises(UserError, match="no text"):
        fit(LikelihoodBpeTrainer(vocab_size=300).train_from_iterator(["abc"]), [])
