"""Counts: as packed training sees them, streamed, kept with their tokenizer, refused for another."""

import tracemalloc

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer
from modelwright.models.tokenizers import train_bpe
from modelwright.probing.fair_lm import TokenCounts, by_vocabulary_size, count_tokens, rare_types, tokenizer_fingerprint
from modelwright.probing.fair_lm import counts as counts_module
from modelwright.training.packing import tokenize

TEXTS = ["the cat sat", "", "on the mat\n", "the\u00e9 cat " * 20]


@pytest.mark.parametrize("leading", [False, True])
def test_counts_are_those_of_the_packed_stream(leading):
    tokenizer = train_bpe(TEXTS, 280)
    if leading:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    counts = count_tokens(TEXTS, tokenizer)
    stream = tokenize(TEXTS, tokenizer).tokens
    if not leading:
        stream = stream[1:]  # the end token before the first document is nobody's target
    np.testing.assert_array_equal(counts.counts, np.bincount(stream, minlength=len(tokenizer)))
    assert (counts.documents, counts.tokens) == (4, len(stream))
    assert counts.counts[tokenizer.bos_token_id] == (4 if leading else 0)
    np.testing.assert_array_equal(np.asarray(count_tokens([{"text": t} for t in TEXTS], tokenizer)), counts.counts)


def test_rows_that_are_tokenised_count_where_they_are_targets():
    rows = [
        {"input_ids": [5, 6, 7, 7]},
        {"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": torch.tensor([5, 6, 5, 6]), "position_ids": torch.tensor([0, 1, 0, 1])},
    ]
    counts = count_tokens(rows, byte_tokenizer())
    assert {int(i): int(counts.counts[i]) for i in np.flatnonzero(counts.counts)} == {6: 3, 7: 3}


def test_a_corpus_larger_than_memory_is_a_stream(monkeypatch):
    monkeypatch.setattr(counts_module, "_BATCH_CHARACTERS", 1 << 15)
    tokenizer, text = byte_tokenizer(), "a line of text that repeats\n" * 100

    def peak(documents):
        tracemalloc.start()
        counts = count_tokens((text for _ in range(documents)), tokenizer)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return counts.tokens, found

    (few, small), (many, large) = peak(60), peak(240)
    assert many == 4 * few
    assert large < 1.5 * small


def test_parquet_there_and_back_and_other_tokenizers_refused(tmp_path):
    first, second = train_bpe(TEXTS, 270), train_bpe(["something else entirely else"] * 3, 270)
    counts = count_tokens(TEXTS, first)
    counts.save(tmp_path / "c.parquet", first)
    again = TokenCounts.load(tmp_path / "c.parquet")
    np.testing.assert_array_equal(again.counts, counts.counts)
    assert (again.tokenizer, again.documents) == (counts.tokenizer, 4)
    again.check(first)
    assert parquet.read_table(tmp_path / "c.parquet")["token"].to_pylist() == first.convert_ids_to_tokens(
        range(len(first))
    )
    for other in (second, byte_tokenizer()):
        with pytest.raises(UserError, match="of another tokenizer than the model's"):
            again.check(other)
    with pytest.raises(UserError, match="exists already"):
        counts.save(tmp_path / "c.parquet")


def test_the_fingerprint_knows_the_tokenizer_and_nothing_else(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_bpe(TEXTS, 275)
    mark = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.padding_side, again.chat_template = "right", "{{ messages }}"
    again(["a", "bcd"], padding=True)  # leaves padding switched on in the backend
    assert tokenizer_fingerprint(again) == mark
    again.add_tokens(["<new>"])
    assert tokenizer_fingerprint(again) != mark
    from tokenizers import normalizers

    lower = AutoTokenizer.from_pretrained(tmp_path)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()  # the vocabulary is the same
    assert tokenizer_fingerprint(lower) != mark


def test_anyones_counts_can_be_read(tmp_path):
    parquet.write_table(pyarrow.table({"token_id": [4, 0], "count": [7, 2]}), tmp_path / "mine.parquet")
    counts = TokenCounts.load(tmp_path / "mine.parquet")
    assert counts.counts.tolist() == [2, 0, 0, 0, 7]
    assert counts.tokenizer is None
    counts.check(byte_tokenizer())  # nothing is known against it
    assert counts.resized(7).counts.tolist() == [2, 0, 0, 0, 7, 0, 0]
    assert len(TokenCounts(np.array([1, 0])).resized(1)) == 1
    with pytest.raises(UserError, match="knows only 4"):
        counts.resized(4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": [1], "count": [1]}, "no column 'token_id'"),
        ({"token_id": [1]}, "no column 'count'"),
        ({"token_id": [1, 1], "count": [1, 2]}, "twice"),
        ({"token_id": [-1], "count": [1]}, "whole numbers from 0"),
        ({"token_id": ["a"], "count": [1]}, "whole numbers from 0"),
        ({"token_id": [0], "count": [-1]}, "negative"),
    ],
)
def test_files_that_are_no_counts(tmp_path, table, message):
    parquet.write_table(pyarrow.table(table), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=message):
        TokenCounts.load(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "nothing to count"),
        ([{"body": "x"}], "Row 1 has neither 'text' nor 'input_ids' \\(fields: body\\)"),
        (["fine", 3], "Row 2 is of type int"),
        ([{"input_ids": [1, 300]}], "Token 300 is outside the tokenizer's vocabulary of 259"),
    ],
)
def test_rows_that_cannot_be_counted(data, message):
    with pytest.raises(UserError, match=message):
        count_tokens(data, byte_tokenizer())


def test_rare_types_are_those_that_the_bulk_does_without():
    found = rare_types([0, 1, 4, 95], 0.95)
    assert (found.covering, found.seen, found.vocab_size) == (1, 3, 4)
    assert found.share_of_seen == pytest.approx(2 / 3)
    assert found.share_of_vocabulary == pytest.approx(3 / 4)
    assert rare_types([0, 1, 4, 95], 0.96).covering == 2
    assert rare_types([5, 5], 1).share_of_seen == 0
    for coverage in (0, 1.1):
        with pytest.raises(UserError, match="between 0 and 1"):
            rare_types([1], coverage)
    with pytest.raises(UserError, match="all zero"):
        rare_types([0, 0])


def test_larger_vocabularies_have_more_types_that_are_rare():
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), generator.integers(3, 8))) for _ in range(400)]
    weights = 1 / np.arange(1, 401)
    texts = [" ".join(generator.choice(words, 60, p=weights / weights.sum())) for _ in range(60)]
    few, many = by_vocabulary_size(texts, [280, 700])
    assert (few.vocab_size, many.vocab_size) == (280, 700)
    assert many.share_of_seen > few.share_of_seen + 0.05
