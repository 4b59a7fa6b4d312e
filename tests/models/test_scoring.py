"""Scores against a slow loop in float64, and what they must not depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.models import scoring
from modelwright.models.scoring import bits_per_byte, score_documents, windows
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from modelwright.models.tokenizers import train_bpe

TEXTS = ["one short line", "é", "", "a longer document, " * 9, "x" * 40, "the end\n"]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 3), st.integers(4, 20), st.data())
def test_windows_predict_each_token_once_with_enough_context(length, prefix_length, window, data):
    stride = data.draw(st.integers(1, window - prefix_length))
    ids, prefix = list(range(100, 100 + length)), list(range(prefix_length))
    predicted = []
    for inputs, scored in windows(ids, prefix, window, stride):
        assert 1 <= scored < len(inputs) <= window
        predicted += inputs[-scored:]
        first = inputs[-scored]
        whole = [*prefix, *ids]
        assert inputs == whole[whole.index(inputs[0]) : whole.index(inputs[-1]) + 1]
        assert len(inputs) - scored >= min(window - stride, whole.index(first))
    assert predicted == ids


def slow(model, tokenizer, text, window, stride):
    """One token at a time, in float64."""
    whole = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    model, total, edge = model.double(), 0.0, window
    for at in range(1, len(whole)):
        while at >= edge:
            edge = min(len(whole), edge + stride)
        context = torch.tensor([whole[max(0, min(edge, len(whole)) - window) : at]])
        total += model(context).logits[0, -1].log_softmax(-1)[whole[at]].item()
    return total


@pytest.mark.parametrize(("window", "stride"), [(512, 256), (16, 8), (16, 15), (9, 1)])
def test_equals_a_slow_loop_in_float64(window, stride):
    tokenizer = byte_tokenizer()
    found = list(score_documents(tiny_model("llama"), tokenizer, TEXTS, window=window, stride=stride))
    with torch.no_grad():
        for text, score in zip(TEXTS, found, strict=True):
            expected = slow(tiny_model("llama"), tokenizer, text, window, stride)
            assert score.log_probability == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert (score.bytes, score.tokens) == (len(text.encode()), len(text.encode()))
            assert score.words == len(text.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_does_not_depend_on_the_batch(family):
    model, tokenizer = tiny_model(family), byte_tokenizer()
    one, many = (
        [s.log_probability for s in score_documents(model, tokenizer, TEXTS, window=24, stride=8, batch_size=b)]
        for b in (1, 7)
    )
    assert one == pytest.approx(many, rel=1e-5)


def test_a_uniform_model_needs_the_log_of_the_vocabulary():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert bits_per_byte(model, byte_tokenizer(), TEXTS) == pytest.approx(math.log2(259), rel=1e-7)


def test_a_tokenizer_of_fewer_tokens_pays_for_the_same_bytes():
    model, bpe = tiny_model("llama", vocab_size=400), train_bpe(TEXTS * 3, 300)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    text = TEXTS[3]
    tokens = len(bpe(text)["input_ids"])
    assert tokens < len(text)
    assert bits_per_byte(model, bpe, [text]) == pytest.approx(tokens * math.log2(400) / len(text))


def test_logits_in_chunks_are_the_same(monkeypatch):
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    whole = list(score_documents(model, tokenizer, TEXTS))
    monkeypatch.setattr(scoring, "_CHUNK", 259 * 3)
    assert [s.log_probability for s in score_documents(model, tokenizer, TEXTS)] == [s.log_probability for s in whole]


def test_bfloat16_is_close():
    tokenizer = byte_tokenizer()
    exact = bits_per_byte(tiny_model("llama"), tokenizer, TEXTS)
    assert bits_per_byte(tiny_model("llama").bfloat16(), tokenizer, TEXTS) == pytest.approx(exact, rel=2e-3)


def test_errors():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    for keys in ({"window": 513}, {"window": 1}, {"window": 8, "stride": 8}, {"stride": 0}):
        with pytest.raises(UserError, match=r"window|stride"):
            list(score_documents(model, tokenizer, TEXTS, **keys))
    with pytest.raises(UserError, match="another model's"):
        list(score_documents(tiny_model("llama", vocab_size=50), tokenizer, TEXTS))
    with pytest.raises(UserError, match="empty"):
        bits_per_byte(model, tokenizer, ["", ""])
