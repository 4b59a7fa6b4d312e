"""Packing: every token where a plain loop puts it; an order that depends on the seed alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from modelwright.errors import UserError
from modelwright.models.tokenizers import byte_tokenizer
from modelwright.training import packing
from modelwright.training.packing import PackedBlocks, tokenize

TOKENIZER = byte_tokenizer()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("aé\n", max_size=20), max_size=12), st.booleans())
def test_stream_is_documents_each_between_end_tokens(tmp_path_factory, texts, in_file):
    path = tmp_path_factory.mktemp("tokens") / "t.bin" if in_file else None
    stream = tokenize(texts, TOKENIZER, path)
    expected = [2]
    for text in texts:
        expected += [*TOKENIZER(text)["input_ids"], 2]
    assert stream.tokens.tolist() == expected
    assert stream.tokens.dtype == np.uint16
    assert (stream.documents, stream.bytes) == (len(texts), sum(len(t.encode()) for t in texts))


def test_a_tokenizers_own_first_token_leads_each_document():
    own = byte_tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    a, b = own.convert_tokens_to_ids(["a", "b"])
    assert tokenize(["a", "b"], own).tokens.tolist() == [1, a, 2, 1, b, 2]


def test_long_documents_are_tokenised_in_parts(monkeypatch):
    text = "line one\nline two\n" * 40 + "x" * 100
    whole = tokenize([text, "b"], TOKENIZER).tokens.tolist()
    monkeypatch.setattr("modelwright.models.tokenizers._LONG", 33)
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 10)
    assert tokenize([text, "b"], TOKENIZER).tokens.tolist() == whole


def test_no_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        tokenize(["a"], tokenizer)


@given(st.integers(2, 9), st.integers(9, 100), st.integers(0, 3))
def test_each_pass_sees_each_block_once(block_size, tokens, seed):
    stream = np.arange(tokens, dtype=np.uint16)
    blocks = tokens // block_size
    data = PackedBlocks(stream, block_size, 3 * blocks, seed)
    for number in range(3):
        rows = data.__getitems__(range(number * blocks, (number + 1) * blocks))["input_ids"]
        assert sorted(rows.flatten().tolist()) == list(range(blocks * block_size))
        assert torch.equal(rows[:, 0] % block_size, torch.zeros(blocks, dtype=torch.long))


def test_order_is_a_function_of_seed_and_position():
    stream = np.arange(1000, dtype=np.uint16)
    a, b = PackedBlocks(stream, 10, 500, 1), PackedBlocks(stream, 10, 500, 1)
    forward = [a[i]["input_ids"].tolist() for i in range(300)]
    assert forward == [b[i]["input_ids"].tolist() for i in reversed(range(300))][::-1]
    assert forward[:100] != forward[100:200]
    assert forward[:100] != [PackedBlocks(stream, 10, 500, 2)[i]["input_ids"].tolist() for i in range(100)]


def test_too_few_tokens():
    with pytest.raises(UserError, match="9 tokens, fewer than one block of 10"):
        PackedBlocks(np.arange(9), 10, 5)
