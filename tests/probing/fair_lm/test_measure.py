"""Documents and rows through a model: the tokens of score_documents, whatever the batches and windows."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForLanguageModeling

from modelwright.errors import UserError
from modelwright.models.scoring import score_documents
from modelwright.models.tiny import byte_tokenizer, seeded, tiny_model
from modelwright.probing.fair_lm import measure_blocks, measure_documents, measure_rows
from modelwright.probing.fair_lm.measure import pad_rows
from modelwright.training.packing import tokenize

TEXTS = ["a short one", "", "a longer one that does not fit into a window of forty tokens, so it is cut " * 3, "é"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sum_is_that_of_score_documents(family):
    model, tokenizer = tiny_model(family), byte_tokenizer()
    report = measure_documents(model, tokenizer, iter(TEXTS), window=40, stride=11, batch_size=3).compute()
    scores = list(score_documents(model, tokenizer, TEXTS, window=40, stride=11))
    assert report.tokens == sum(score.tokens for score in scores)
    assert report.loss.sum() == pytest.approx(-sum(score.log_probability for score in scores), rel=1e-6)
    alone = measure_documents(model, tokenizer, TEXTS, window=40, stride=11, batch_size=1).compute()
    np.testing.assert_array_equal(alone.counts, report.counts)
    np.testing.assert_allclose(alone.loss, report.loss, rtol=1e-5)
    assert report.tokenizer is not None


def test_blocks_are_what_training_sees():
    model = tiny_model("llama")
    tokens = tokenize(["some text"] * 9, byte_tokenizer()).tokens
    blocks = tokens[: len(tokens) // 16 * 16].reshape(-1, 16)
    ids = torch.from_numpy(blocks.astype(np.int64))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert measure_blocks(model, blocks, batch_size=2).compute().average == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a_collator_that_pads_on_the_left_changes_nothing(family):
    if family == "bloom":  # takes no positions
        with seeded(0):
            config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=259)
            model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(family)
    rows = [{"input_ids": list(range(5, 5 + n))} for n in (4, 9, 15)]
    tokenizer = byte_tokenizer()
    assert tokenizer.padding_side == "left"
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    padded = measure_rows(model, rows, batch_size=3, collate=collate).compute()
    alone = measure_rows(model, rows, batch_size=1).compute()
    np.testing.assert_array_equal(padded.counts, alone.counts)
    np.testing.assert_allclose(padded.loss, alone.loss, rtol=1e-4, atol=1e-5)


def test_the_mode_of_every_module_comes_back():
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.lm_head.eval()
    first = measure_rows(model, [{"input_ids": list(range(5, 30))}]).compute().average
    assert first == measure_rows(model, [{"input_ids": list(range(5, 30))}]).compute().average  # no dropout
    assert model.training
    assert not model.lm_head.training
    with pytest.raises(UserError):
        measure_rows(model, [{"input_ids": [5, 6], "labels": [5, 999]}])
    assert model.training


def test_rows_are_padded_and_padding_is_masked():
    batch = pad_rows([{"input_ids": [1, 2, 3]}, {"input_ids": [4], "labels": [9], "attention_mask": [1]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "position_ids" not in batch
    with pytest.raises(UserError, match="no 'input_ids' \\(fields: text\\)"):
        pad_rows([{"text": "x"}])
    with pytest.raises(UserError, match="differ in length"):
        pad_rows([{"input_ids": [1], "labels": [1, 2]}])


def test_mistakes_are_sentences():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    with pytest.raises(UserError, match="no target"):
        measure_documents(model, tokenizer, [""]).compute()
    with pytest.raises(UserError, match="window of 9999"):
        measure_documents(model, tokenizer, TEXTS, window=9999)
    with pytest.raises(UserError, match="outside the vocabulary of 100"):
        measure_documents(tiny_model("llama", vocab_size=100), tokenizer, TEXTS)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        measure_documents(model, tokenizer, TEXTS)
