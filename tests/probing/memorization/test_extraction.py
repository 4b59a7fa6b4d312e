import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from modelwright.errors import UserError
from modelwright.models.tiny import tiny_model
from modelwright.probing.memorization.extraction import extractability, part_perplexities, perplexities, read


def learned(family, **overrides):
    """A tiny model that has learnt some sequences by heart, so that both outcomes occur."""
    model = tiny_model(family, **overrides)
    tokens = torch.randint(3, 259, (200, 64), generator=torch.Generator().manual_seed(0))
    known = tokens[:24]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=known, labels=known).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokens.numpy()


class Table(nn.Module):
    """A model whose next token is given by the position: a lookup table."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.config = logits, SimpleNamespace(max_position_embeddings=None)
        self.device, self.generation_config = torch.device("cpu"), None

    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(self.logits.shape[-1], 1))

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1))


def test_a_model_that_copies_scores_1_and_a_constant_one_the_share_of_its_token():
    tokens = np.random.default_rng(0).integers(0, 7, (1, 64))
    copying = torch.nn.functional.one_hot(torch.as_tensor(np.roll(tokens, -1)), 7).float()
    scores, memorized = extractability(Table(copying), np.repeat(tokens, 3, 0))
    assert scores.tolist() == [1.0] * 3
    assert memorized.all()
    constant = torch.zeros(1, 64, 7)
    constant[..., 4] = 1
    many = np.random.default_rng(1).integers(0, 7, (50, 64))
    scores, memorized = extractability(Table(constant), many, batch_size=8)
    assert scores == pytest.approx((many[:, 32:] == 4).mean(1))
    assert not memorized.any()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral", "gemma", "qwen2"])
def test_teacher_forcing_decides_as_generate_does(family):
    model, tokens = learned(family)
    forced = extractability(model, tokens)
    # An end token, penalties and sampling that a checkpoint asks for are no part of the definition.
    model.generation_config.eos_token_id = int(tokens[0, 40])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    own = model.generation_config
    generated = extractability(model, tokens, method="generate", batch_size=50)
    assert model.generation_config is own
    assert forced.memorized.tolist() == generated.memorized.tolist()
    assert 10 <= forced.memorized.sum() < 200
    assert (forced.scores == 1).tolist() == forced.memorized.tolist()


def test_generate_and_teacher_forcing_agree_where_neither_recites():
    model = tiny_model("llama")
    tokens = np.random.default_rng(0).integers(0, 259, (20, 12))
    for batch_size in (3, 20):
        forced = extractability(model, tokens, 8, 4, batch_size=batch_size)
        generated = extractability(model, tokens, 8, 4, "generate", batch_size=batch_size)
        assert forced.memorized.tolist() == generated.memorized.tolist()


def test_leading_tokens_are_context_and_no_part_of_the_sequence():
    model = tiny_model("llama")
    tokens = np.random.default_rng(0).integers(0, 259, (5, 12))
    led = np.concatenate([np.full((5, 1), 1), np.full((5, 1), 7), tokens], axis=1)
    with torch.no_grad():
        laws = model(input_ids=torch.as_tensor(led)).logits.double().log_softmax(-1)[:, 2:-1]
    found = read(model, tokens, 8, (1, 7))
    nats = -laws.gather(-1, torch.as_tensor(tokens)[:, 1:, None])[..., 0].numpy()
    assert found.nats == pytest.approx(nats, rel=1e-9)
    assert found.matches.shape == (5, 4)
    assert found.nats != pytest.approx(read(model, tokens, 8).nats, rel=1e-3)
    parts = part_perplexities(model, tokens, 8, 4, leading=[1, 7])
    assert parts.sequence == pytest.approx(np.exp(nats.mean(1)))
    with pytest.raises(UserError, match="Sequences of 512 tokens do not fit"):
        extractability(
            tiny_model("llama", max_position_embeddings=511), np.zeros((1, 510), int), 500, 10, leading=[1, 7]
        )


def test_generate_begins_behind_the_leading_tokens():
    model = tiny_model("llama")
    prompts = torch.randint(3, 259, (20, 8), generator=torch.Generator().manual_seed(0))
    led = torch.cat([torch.full((20, 1), 1), prompts], dim=1)
    continuation = model.generate(led, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 9:]
    tokens = torch.cat([prompts, continuation], dim=1).numpy()
    for method in ("teacher-forced", "generate"):
        assert extractability(model, tokens, 8, 4, method, leading=[1]).memorized.all()
        assert not extractability(model, tokens, 8, 4, method).memorized.all()


def test_blocks_are_read_one_at_a_time():
    model = tiny_model("gpt2")
    tokens = np.random.default_rng(0).integers(0, 259, (10, 70))
    blocks = (tokens[i : i + 3] for i in range(0, 10, 3))
    assert np.array_equal(extractability(model, blocks).scores, extractability(model, tokens).scores)


def test_perplexities_of_the_parts_make_that_of_the_whole():
    model = tiny_model("llama")
    tokens = np.random.default_rng(0).integers(0, 259, (9, 64))
    found = part_perplexities(model, tokens, batch_size=4)
    assert 63 * np.log(found.sequence) == pytest.approx(
        31 * np.log(found.prompt) + 32 * np.log(found.continuation), rel=1e-9
    )
    ids = torch.as_tensor(tokens)
    with torch.no_grad():
        laws = model(input_ids=ids).logits.double().log_softmax(-1)
    nats = -laws[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert found.continuation == pytest.approx(nats[:, 31:].mean(1).exp().numpy(), rel=1e-12)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    tokens = np.random.default_rng(0).integers(0, 7, (3, 64))
    for part in part_perplexities(Table(torch.zeros(1, 64, 7)), tokens):
        assert part == pytest.approx(7, rel=1e-12)


def test_legacy_perplexities_divide_by_the_whole_and_drop_a_prediction_for_every_zero():
    nats = np.full((1, 63), 2.0)
    none = perplexities(nats, 32, np.ones((1, 64), dtype=int))
    assert none.prompt[0] == pytest.approx(math.exp(2 * 31 / 63))
    assert none.continuation[0] == pytest.approx(math.exp(2 * 32 / 63))
    assert none.sequence[0] == pytest.approx(math.exp(2))
    tokens = np.ones((1, 64), dtype=int)
    tokens[0, 5] = 0
    one = perplexities(np.arange(63.0)[None], 32, tokens)
    assert np.log(one.sequence[0]) == pytest.approx(np.arange(62.0).mean())
    assert np.log(one.prompt[0]) == pytest.approx(np.arange(31.0).sum() / 62)


def test_vocabularies_too_large_for_one_chunk_are_read_in_parts(monkeypatch):
    from modelwright.probing.memorization import extraction

    model = tiny_model("llama")
    tokens = np.random.default_rng(0).integers(0, 259, (5, 20))
    whole = read(model, tokens, 10)
    monkeypatch.setattr(extraction, "_CHUNK", 1)
    assert np.array_equal(read(model, tokens, 10).nats, whole.nats)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        (np.zeros((2, 40), dtype=int), {}, "have 40 tokens, but prompt and continuation need 64"),
        (np.full((2, 64), 300), {}, "Token 300 is outside the vocabulary of 259"),
        (np.full((2, 64), -1), {}, "Token -1 is outside"),
        (np.zeros((2, 64)), {}, "table of token ids"),
        ([[1] * 64, [1] * 63], {}, "differ in length"),
        (np.zeros((2, 64), dtype=int), {"method": "beam"}, "use teacher-forced or generate"),
        (np.zeros((2, 64), dtype=int), {"prompt_len": 0}, "at least 1"),
        (np.zeros((2, 999), dtype=int), {"prompt_len": 600}, "do not fit the model, which takes 512"),
    ],
)
def test_bad_input_is_a_sentence(sequences, options, message):
    with pytest.raises(UserError, match=message):
        extractability(tiny_model("llama"), sequences, **options)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="NaN"):
        extractability(Table(torch.full((1, 64, 7), float("nan"))), np.zeros((1, 64), dtype=int))
