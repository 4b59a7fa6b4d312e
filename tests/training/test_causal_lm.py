"""The loop against a bare torch loop, and what it promises of schedules, decay and the log."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from modelwright.errors import UserError
from modelwright.models.scoring import bits_per_byte
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.packing import PackedBlocks, tokenize
from modelwright.training.resume import decayed_parameters
from modelwright.training.trainer import rate
from modelwright.verbs.train import Train

TOKENS = tokenize([f"document {i} says {i * i % 17}\n" for i in range(200)], byte_tokenizer()).tokens
OPTIONS = TrainingOptions(steps=8, batch_size=4, block_size=32, log_every=3, device="cpu", warmup=2)


def bare_loop(model, options, accumulation=1):
    data = PackedBlocks(TOKENS, options.block_size, 10_000, options.seed)
    decayed = set(decayed_parameters(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is flag], "weight_decay": decay}
        for flag, decay in ((True, options.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)
    model.train()
    losses = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate(step, options.steps, options)
        total = 0.0
        for part in range(accumulation):
            at = (step * accumulation + part) * options.batch_size
            batch = data.__getitems__(range(at, at + options.batch_size))
            loss = model(**batch).loss / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_in_a_bare_loop(family):
    expected, model = tiny_model(family), tiny_model(family)
    losses = bare_loop(expected, OPTIONS)
    result = train(model, TOKENS, OPTIONS)
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7), name
    assert [row["step"] for row in result.log] == [1, 3, 6, 8]
    assert result.log[0]["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert result.log[2]["loss"] == pytest.approx(sum(losses[3:6]) / 3, rel=1e-6)
    assert result.final_loss == pytest.approx(sum(losses[6:]) / 2, rel=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_gradient_checkpointing(checkpointing):
    options = dataclasses.replace(
        OPTIONS, batch_size=2, gradient_accumulation=2, gradient_checkpointing=checkpointing, schedule="linear"
    )
    expected, model = tiny_model("llama"), tiny_model("llama")
    losses = bare_loop(expected, options, accumulation=2)
    result = train(model, TOKENS, options)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert result.log[0]["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert result.tokens == 8 * 2 * 2 * 32


def test_half_the_batch_accumulated_twice_is_the_same_training():
    model, other = tiny_model("llama"), tiny_model("llama")
    train(model, TOKENS, OPTIONS)
    train(other, TOKENS, dataclasses.replace(OPTIONS, batch_size=2, gradient_accumulation=2))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_schedules():
    options = TrainingOptions(steps=100, warmup=10, min_lr_ratio=0.1)
    rates = [rate(step, 100, options) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    linear = dataclasses.replace(options, schedule="linear")
    assert rate(55, 100, linear) == pytest.approx(0.55)
    assert rate(99, 100, dataclasses.replace(options, schedule="constant")) == 1.0
    assert TrainingOptions(steps=200, warmup=0.05).warmup_steps(200) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_biases_and_scalars_do_not_decay(family):
    model = tiny_model(family)
    decayed = set(decayed_parameters(model))
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "norm" not in name
        assert (name in decayed) == matrix, name


def test_evaluation_in_the_log_is_bits_per_byte():
    model, heldout = tiny_model("llama"), ["document 3 says 9\n", "document 5 says 8\n"]
    options = dataclasses.replace(OPTIONS, eval_every=4)
    result = train(model, TOKENS, options, tokenizer=byte_tokenizer(), heldout=heldout)
    assert [row["step"] for row in result.log if "eval_bits_per_byte" in row] == [4, 8]
    assert result.bits_per_byte == bits_per_byte(model, byte_tokenizer(), heldout, window=32)
    assert not model.training
    again = train(tiny_model("llama"), TOKENS, OPTIONS)
    assert again.final_loss == result.final_loss  # evaluating changes nothing


def test_lengths():
    assert TrainingOptions(epochs=2, batch_size=4, block_size=10).total_steps(1000) == 50
    assert TrainingOptions(tokens=1001, batch_size=2, block_size=10).total_steps(9999) == 51
    assert TrainingOptions(tokens=1001, batch_size=2, block_size=10).total_steps(9999, processes=2) == 26


def test_divergence_is_said():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(UserError, match="step 1: training diverged"):
        train(model, TOKENS, OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "one of steps, epochs or tokens"),
        ({"epochs": 1.0}, "one of steps, epochs or tokens"),
        ({"steps": 0}, "steps must be greater than 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"block_size": 1}, "block_size"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"beta1": 2.0}, "beta1"),
        ({"beta2": 1.0}, "beta2 must be 0 or more and less than 1"),
        ({"block_size": 1024}, "takes at most 512"),
        ({"device": "tpu9"}, "not available"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        train(tiny_model("llama"), TOKENS, dataclasses.replace(OPTIONS, **options))


def test_data_and_model_that_do_not_fit():
    with pytest.raises(UserError, match="the tokenizer is another model's"):
        train(tiny_model("llama", vocab_size=50), TOKENS, OPTIONS)
    with pytest.raises(UserError, match="load it in float32"):
        train(tiny_model("llama").bfloat16(), TOKENS, OPTIONS)
    with pytest.raises(UserError, match="fewer than one block"):
        train(tiny_model("llama"), TOKENS[:20], OPTIONS)
    with pytest.raises(UserError, match="no tokenizer"):
        train(tiny_model("llama"), TOKENS, OPTIONS, heldout=["a"])


def test_the_verb_has_the_same_options_and_defaults():
    verb = {f.name: f.default for f in dataclasses.fields(Train)}
    for option in dataclasses.fields(TrainingOptions):
        assert verb[option.name] == option.default, option.name


def test_uint16_and_uint32_streams_train_alike():
    a, b = tiny_model("llama"), tiny_model("llama")
    train(a, TOKENS, OPTIONS)
    train(b, TOKENS.astype(np.uint32), OPTIONS)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
