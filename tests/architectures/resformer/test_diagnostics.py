"""Concentration, similarity, spectra and relative loss."""

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from architectures.resformer.small_models import SIZES, VARIANTS, build, llama, tokens
from modelwright.architectures.resformer.diagnostics import (
    attention_concentration,
    attention_entropy,
    relative_loss,
    token_similarity,
    value_spectrum,
)
from modelwright.errors import UserError


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=1, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def test_entropy_of_known_attention():
    identity = torch.eye(9).expand(3, 9, 9)
    assert math.isclose(attention_entropy(identity).item(), math.log(9))
    first = torch.zeros(3, 9, 9)
    first[..., 0] = 1
    assert attention_entropy(first).item() == 0
    # Two heads that look at different tokens: importance is averaged over heads before the entropy is taken.
    one, two = torch.zeros(9, 9), torch.zeros(9, 9)
    one[:, 0], two[:, 1] = 1, 1
    assert math.isclose(attention_entropy(torch.stack([one, two])).item(), math.log(2), rel_tol=1e-6)
    # Uniform causal rows: a_j = sum over i >= j of 1 / (i + 1).
    causal = torch.ones(4, 4).tril() / torch.arange(1, 5).unsqueeze(-1)
    importance = np.array([sum(1 / (i + 1) for i in range(j, 4)) for j in range(4)]) / 4
    expected = -(importance * np.log(importance)).sum()
    assert math.isclose(attention_entropy(causal.unsqueeze(0)).item(), expected, rel_tol=1e-6)


def test_similarity_and_spectrum_against_loops():
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    pairs = [torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(states) for j, b in enumerate(states) if i != j]
    torch.testing.assert_close(token_similarity(states), torch.stack(pairs).mean())
    assert token_similarity(states[:1].expand(4, 5)).item() == pytest.approx(1)
    covariance = sum(torch.outer(v, v) for v in states) / len(states)
    expected = torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(value_spectrum(states), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_report_agrees_with_the_models_own_tensors(variant):
    ids = tokens()
    model = build(variant)
    report = attention_concentration(model, ids)
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True, output_hidden_states=True, use_cache=True)
    for layer, attention in enumerate(output.attentions):
        entropies = torch.stack([attention_entropy(one) for one in attention])
        assert report.entropy_by_layer[layer] == pytest.approx(entropies.mean().item())
        assert report.sink_mass_by_layer[layer] == pytest.approx(attention[..., 0].mean().item())
    if variant != "denseformer":  # there the next block's input is an average, not the block's output
        state = output.hidden_states[2]
        assert report.residual_norm_first_by_layer[1] == pytest.approx(state[:, 0].norm(dim=-1).mean().item())
        assert report.residual_norm_rest_by_layer[1] == pytest.approx(state[:, 1:].norm(dim=-1).mean().item())
    # The values attended over: what the layer's own attention output is made of (one query head per value head).
    assert len(report.value_spectrum_by_layer) == SIZES["num_hidden_layers"]
    total = np.sum(report.value_spectrum_by_layer[0])
    values = output.past_key_values.layers[0].values.transpose(1, 2).flatten(-2)
    assert total == pytest.approx(values.square().sum(-1).mean().item())


def test_mixed_and_shared_values_are_the_ones_measured():
    ids = tokens()
    plain = attention_concentration(build("none"), ids)
    scaled = attention_concentration(build("scale"), ids)
    assert scaled.value_norm_rest_by_layer[0] == pytest.approx(plain.value_norm_rest_by_layer[0])
    shared = attention_concentration(build("svformer"), ids)
    assert len({round(x, 9) for x in shared.value_norm_rest_by_layer}) == 1
    own = attention_concentration(build("svformer-anchors"), ids)
    assert own.value_norm_rest_by_layer[1] != pytest.approx(own.value_norm_rest_by_layer[2])
    assert own.value_norm_rest_by_layer[2] == own.value_norm_rest_by_layer[3]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["identity", "svformer", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_changes_nothing(side, variant, dtype):
    """In float64 transformers' eager attention makes NaN of rows of padding; GPT-2's positions would be shifted."""
    model = {"llama": llama, "gpt2": gpt2}.get(variant, lambda dtype: build(variant, dtype=dtype))(dtype=dtype)
    short, long = tokens(1, 7, seed=3), tokens(1, 11, seed=4)
    padding = torch.zeros(1, 4, dtype=torch.long)
    parts = (padding, short) if side == "left" else (short, padding)
    ones = (padding, torch.ones_like(short)) if side == "left" else (torch.ones_like(short), padding)
    batch = {
        "input_ids": torch.cat([torch.cat(parts, 1), long]),
        "attention_mask": torch.cat([torch.cat(ones, 1), torch.ones_like(long)]),
    }
    padded = attention_concentration(model, batch)
    alone = [attention_concentration(model, ids) for ids in (short, long)]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert padded.entropy_limit == pytest.approx((math.log(7) + math.log(11)) / 2)
    for name in vars(padded):
        if name.endswith("by_layer") and "spectrum" not in name:
            expected = np.mean([getattr(report, name) for report in alone], axis=0)
            np.testing.assert_allclose(getattr(padded, name), expected, rtol=tolerance, err_msg=name)
    pooled = [(7 * np.sum(a) + 11 * np.sum(b)) / 18 for a, b in zip(*(r.value_spectrum_by_layer for r in alone))]
    np.testing.assert_allclose([np.sum(s) for s in padded.value_spectrum_by_layer], pooled, rtol=tolerance)


def test_the_model_is_left_as_it_was():
    model = build("identity").train()
    attention_concentration(model, tokens())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not model.model.layers[0]._forward_hooks or not any(
        "keep" in hook.__name__ for hook in model.model.layers[0]._forward_hooks.values()
    )


def test_other_families():
    assert len(attention_concentration(gpt2(), tokens()).entropy_by_layer) == 3
    assert len(attention_concentration(llama(), tokens()).entropy_by_layer) == SIZES["num_hidden_layers"]
    mamba = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, chunk_size=4,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="mamba2"):
        attention_concentration(mamba, tokens())
    with pytest.raises(UserError, match="at least 2 tokens"):
        attention_concentration(llama(), tokens(1, 1))


def test_relative_loss():
    a, b = [5.0, 4.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]
    steps, difference = relative_loss(a, b, window=2)
    assert steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(difference, [0, -0.5, -1.5, -2.5])
    rows = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(a)]
    other = [{"step": 10, "loss": 5.0}, {"step": 20, "eval_loss": 1.0}, {"step": 30, "loss": 5.0}]
    steps, difference = relative_loss(rows, other, window=20)  # steps, not rows
    assert steps.tolist() == [10, 30]
    np.testing.assert_allclose(difference, [0, -1.5])
    with pytest.raises(UserError, match="no step in common"):
        relative_loss(rows, b)
    with pytest.raises(UserError, match="at least 1"):
        relative_loss(a, b, window=0)
