import numpy as np
import pytest

from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.models.tokenizers import encode, train_bpe
from modelwright.probing.memorization import (
    ModelEmbedder,
    NgramEmbedder,
    TokenCorpus,
    build_features,
    part_perplexities,
    semantic_matches,
    textual_matches,
    tokenize_corpus,
)
from modelwright.probing.memorization.features import COLUMNS, NotInCorpus

LINE = "The licence of this file is found beside it, in English."
TEXTS = [
    *(f"{LINE} Copy no. {i}." for i in range(3)),
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20",
    "Nobody had ever seen the harbour so empty as on that Monday, said the clerk.",
    "short",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tokenize_corpus(TEXTS, byte_tokenizer(), tmp_path_factory.mktemp("corpus") / "tokens")


def test_the_corpus_is_its_documents_one_after_the_other(corpus):
    rows = encode(byte_tokenizer(), TEXTS)
    assert corpus.tokens.tolist() == [token for row in rows for token in row]
    assert corpus.boundaries.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    assert corpus.tokens.dtype == np.uint16
    again = TokenCorpus.open(corpus.folder)
    assert again.tokenizer_hash == corpus.tokenizer_hash


@pytest.mark.parametrize(("every", "expected"), [(None, 5), (8, None), (1, None)])
def test_sequences_stay_in_their_documents(corpus, every, expected):
    places = corpus.places(48, every)
    sizes = np.diff(corpus.boundaries)
    per = [0 if s < 48 else 1 if every is None else (s - 48) // every + 1 for s in sizes]
    assert len(places.start) == sum(per)
    assert expected is None or len(places.start) == expected
    assert (places.start + 48 <= corpus.boundaries[places.document + 1]).all()
    tokens = corpus.sequences(places.start, 48)
    for row, document, offset in zip(tokens, places.document, places.offset):
        assert byte_tokenizer().decode(row) == TEXTS[document][offset : offset + 48]


def test_features_are_what_they_are_called(corpus):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    tokens = corpus.sequences(corpus.places(48).start, 48)
    table = build_features(tokens, corpus, tokenizer, model, prompt_len=24, cont_len=24)
    assert table.columns.tolist() == list(COLUMNS)
    assert table["sequence_duplicates"].tolist() == [3, 3, 3, 1, 1]
    assert table["is_incrementing"].tolist() == [False, False, False, True, False]
    assert table["is_templating"].tolist() == [False, False, False, True, False]
    assert table["semantic_matches"].tolist() == [3, 3, 3, 1, 1]
    assert table["textual_matches"].tolist() == [0] * 5
    counts = np.bincount(corpus.tokens, minlength=259)[tokens[4]]
    assert table["frequency_median"][4] == np.median(counts)
    assert table["frequency_p75"][4] == np.percentile(counts, 75)
    assert table["frequency_min"][4] == counts.min()
    ours = part_perplexities(model, tokens, 24, 24)
    assert table["continuation_perplexity"].to_numpy() == pytest.approx(ours.continuation)
    order = np.array([3, 0, 4, 2, 1])
    mixed = build_features(tokens[order], corpus, tokenizer, model, prompt_len=24, cont_len=24)
    for name in COLUMNS:
        assert mixed[name].to_numpy() == pytest.approx(table[name].to_numpy()[order]), name


def test_a_sequence_that_is_not_in_the_corpus_is_warned_of(corpus):
    tokens = np.full((1, 48), 100)
    with pytest.warns(NotInCorpus, match="1 of 1 sequences are not in the corpus"):
        build_features(tokens, corpus, byte_tokenizer(), tiny_model("llama"), prompt_len=24, cont_len=24)


def test_another_tokenizers_corpus_is_refused(corpus):
    other = train_bpe(TEXTS, 262)
    with pytest.raises(UserError, match="made by another tokenizer"):
        build_features(np.zeros((1, 64), dtype=int), corpus, other, tiny_model("llama"))
    with pytest.raises(UserError, match="outside the vocabulary of 259"):
        build_features(np.full((1, 64), 300), corpus, byte_tokenizer(), tiny_model("llama"))
    with pytest.raises(UserError, match="have 40 tokens"):
        build_features(np.zeros((1, 40), dtype=int), corpus, byte_tokenizer(), tiny_model("llama"))
    with pytest.raises(UserError, match="need a model"):
        build_features(corpus.sequences(np.array([0]), 64), corpus, byte_tokenizer())


def test_an_empty_corpus_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        tokenize_corpus(["", ""], byte_tokenizer(), tmp_path / "tokens")
    assert not list(tmp_path.iterdir())
    tokenize_corpus(["a"], byte_tokenizer(), tmp_path / "tokens")
    with (tmp_path / "tokens" / "tokens.bin").open("wb"):
        pass
    with pytest.raises(UserError, match="cut off"):
        TokenCorpus.open(tmp_path / "tokens")


def by_first_letter(texts):
    """An embedder in which texts with the same first letter are the same."""
    return np.eye(256)[[ord(text[0]) for text in texts]]


def test_matches_are_counted_by_cosine_and_by_edits():
    sample = ["apple pie", "apple pies", "apple pies", "a quite different sentence", "banana"]
    texts = ["apple pie", "cherry", "a\u00e9"]
    assert semantic_matches(texts, sample, by_first_letter).tolist() == [4, 0, 4]
    assert textual_matches(texts, sample, texts, sample, by_first_letter).tolist() == [2, 0, 0]
    assert textual_matches(texts, sample, texts, sample, by_first_letter, edits=1).tolist() == [0, 0, 0]
    assert textual_matches(texts, sample, texts, sample, by_first_letter, edits=40).tolist() == [3, 0, 0]


def test_edits_are_levenshteins():
    a, b = "x" * 30, "x" * 30 + "y" * 19
    assert textual_matches([a], [b], [a], [b], by_first_letter).tolist() == [1]
    assert textual_matches([a], [b + "y"], [a], [b + "y"], by_first_letter).tolist() == [0]


def test_the_default_embedder_finds_what_looks_alike():
    texts = [f"In the year {year} the company sold many wooden chairs to the harbour." for year in (1901, 1902)]
    texts.append("Quartz vibrates; nobody jogs past my big fox.")
    embed = NgramEmbedder(texts)
    assert semantic_matches(texts, texts, embed).tolist() == [2, 2, 1]
    assert textual_matches(texts, texts, texts, texts, embed).tolist() == [1, 1, 0]


def test_the_models_own_states_embed_texts():
    model = tiny_model("llama")
    embed = ModelEmbedder(model, byte_tokenizer())
    alone, both = embed(["abc"]), embed(["abc", "a much longer text"])
    assert both.shape == (2, 32)
    assert both[0] == pytest.approx(alone[0], abs=1e-5)


def test_the_models_states_are_made_a_few_texts_at_a_time():
    model, sizes = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda _, args, keys: sizes.append(len(keys["input_ids"])), with_kwargs=True)
    texts = [f"text {i}" for i in range(10)]
    few = ModelEmbedder(model, byte_tokenizer(), batch_size=4)(texts)
    assert sizes == [4, 4, 2]
    assert few == pytest.approx(ModelEmbedder(model, byte_tokenizer())(texts), abs=1e-5)


def test_an_embedder_that_gives_no_numbers_is_refused():
    with pytest.raises(UserError, match="row of finite numbers"):
        semantic_matches(["a"], ["b"], lambda texts: np.full((len(texts), 2), np.nan))
