"""The other methods: their positions as their papers have them, and exact on a model."""

import pytest
import torch

from modelwright.attention.string import StringConfig, apply_string
from modelwright.attention.string import baselines as b
from modelwright.attention.string.reference import string_positions
from modelwright.attention.string.rotation import Rotation
from modelwright.errors import UserError
from modelwright.models.tiny import tiny_model

SHARP = {"max_position_embeddings": 96, "initializer_range": 0.3}


def tokens(length=80):
    return torch.randint(3, 259, (2, length), generator=torch.Generator().manual_seed(0))


def expected(length, rule):
    found = torch.full((length, length), torch.nan, dtype=torch.float64)
    for m in range(length):
        for n in range(m + 1):
            found[m, n] = rule(m, n)
    return found


def dual_chunk(m, n, chunk=4, length=7):
    if m // chunk == n // chunk:
        return m - n
    if m // chunk - n // chunk == 1:
        return min(chunk + m % chunk, length - 1) - n % chunk
    return (length - 1) - n % chunk


@pytest.mark.parametrize(
    ("branches", "rule"),
    [
        (b.rope(), lambda m, n: m - n),
        (b.string(5, 2), lambda m, n: m - n if m - n < 5 else m - n - 5 + 2),
        (b.rerope(5), lambda m, n: min(m - n, 5)),
        (b.leaky_rerope(5, 2.0), lambda m, n: m - n if m - n < 5 else 5 + (m - n - 5) / 2),
        (b.self_extend(5, 3), lambda m, n: m - n if m - n < 5 else m // 3 - n // 3 + 5 - 5 // 3),
        (b.dual_chunk(4, 7), dual_chunk),
    ],
    ids=["rope", "string", "rerope", "leaky", "self-extend", "dual chunk"],
)
def test_position_maps(branches, rule):
    torch.testing.assert_close(b.position_matrix(branches, 19), expected(19, rule), equal_nan=True)


def test_string_is_the_same_matrix():
    found = b.position_matrix(b.string(7, 3), 20)
    assert torch.equal(found.nan_to_num(-1).long(), string_positions(20, 7, 3))


def test_dual_chunk_is_exact_within_its_local_window():
    found = b.position_matrix(b.dual_chunk(4, 7), 12)
    for m in range(12):
        for n in range(max(0, m - (7 - 4) + 1), m + 1):
            assert found[m, n] == m - n
    assert found[~found.isnan()].max() == 6
    with pytest.raises(UserError, match="does not fit"):
        b.dual_chunk(7, 7)


@pytest.mark.parametrize("branches", [b.rope(), b.rerope(5), b.leaky_rerope(5, 2.0), b.self_extend(5, 3)])
def test_every_pair_is_rotated_by_its_position(branches):
    class Frequencies(torch.nn.Module):
        inv_freq = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)

    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 9, 6, generator=generator, dtype=torch.float64)
    rotation = Rotation(Frequencies(), "inv_freq")
    found = b.attention_with_positions(query, key, value, branches, rotation, scaling=0.4)
    position = b.position_matrix(branches, 9)
    scores = torch.full((9, 9), -torch.inf, dtype=torch.float64)
    for m in range(9):
        for n in range(m + 1):
            turned = rotation.at(query[:, :, m : m + 1], position[m, n][None])
            scores[m, n] = 0.4 * (turned[0, 0, 0] @ key[0, 0, n])
    torch.testing.assert_close(found[0, 0], scores.softmax(-1) @ value[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@torch.no_grad()
def test_on_a_model_rope_is_itself_and_string_is_string(family):
    full = {"layer_types": ["full_attention"] * 2} if family == "gemma2" else {}
    model = tiny_model(family, **SHARP, **full).double()
    ids = tokens()
    plain = model(ids).logits
    with b.apply_positions(model, b.rope()):
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    with apply_string(model, StringConfig(shift=30, window=7)):
        shifted = model(ids).logits
    with b.apply_positions(model, b.string(30, 7)):
        found = model(ids).logits
        cache = model(ids[:, :50], use_cache=True).past_key_values
        rest = model(ids[:, 50:], past_key_values=cache).logits
    bound = 1e-5 * float(shifted.abs().max())
    torch.testing.assert_close(found, shifted, rtol=0, atol=bound)
    torch.testing.assert_close(rest, shifted[:, 50:], rtol=0, atol=bound)
    assert float((shifted - plain).abs().max()) > 100 * bound
    with b.apply_positions(model, b.self_extend(100, 4)):
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_rescaled_frequencies():
    model = tiny_model("llama", **SHARP)
    ids, original = tokens(), model.model.rotary_emb
    plain = model(ids).logits
    with b.rescaled(model, "ntk", 1.5):
        size = model.config.hidden_size // model.config.num_attention_heads
        base = model.config.rope_parameters["rope_theta"] * 1.5 ** (size / (size - 2))
        wanted = base ** -(torch.arange(0, size, 2) / size)
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, wanted)
        assert not torch.equal(model(ids).logits, plain)
        # The lowest frequency is the plain one divided by the factor: that is what the exponent is for.
        torch.testing.assert_close(model.model.rotary_emb.inv_freq[-1], original.inv_freq[-1] / 1.5)
    with b.rescaled(model, "yarn", 2.0):
        assert model.model.rotary_emb.attention_scaling > 1
        assert not torch.equal(model(ids).logits, plain)
    assert model.model.rotary_emb is original
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(UserError, match="use ntk or yarn"), b.rescaled(model, "other", 2.0):
        pass
    with pytest.raises(UserError, match="no rotary"), b.rescaled(tiny_model("gpt2"), "ntk", 2.0):
        pass
    with pytest.raises(UserError, match="cannot be rescaled"), b.rescaled(tiny_model("gemma3"), "ntk", 2.0):
        pass


@torch.no_grad()
def test_padding_is_refused():
    model = tiny_model("llama", **SHARP)
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[0, :3] = 0
    with b.apply_positions(model, b.rerope(9)), pytest.raises(UserError, match="no padding"):
        model(tokens(), attention_mask=mask)
