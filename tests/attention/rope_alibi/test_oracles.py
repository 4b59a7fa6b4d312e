"""RoPE x ALiBi equals what it must: RoPE, ALiBi, its equation, and itself shifted, cached, padded and packed."""

import copy

import pytest
import torch
from transformers import BloomConfig, DynamicCache, MptConfig, StaticCache
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from modelwright.attention.places import Places, places_mask
from modelwright.attention.rope_alibi import RopeAlibiConfig, head_slopes, rope_alibi_attention
from modelwright.attention.rope_alibi import attention as module
from modelwright.attention.rope_alibi.reference import rope_alibi_reference
from modelwright.models.tiny import tiny_model

ROTARY = ("llama", "qwen2", "mistral", "gemma", "gemma2", "gemma3", "gpt_neox")
READINGS = (
    {},
    {"distance": "harmonic"},
    {"slopes": "geometric"},
    {"lambda_r": 0.5, "lambda_a": 0.25},
    {"distance": "harmonic", "lambda_r": 0.0},
)


def sharp(family, **options):
    """A random model whose attention matters."""
    model = tiny_model(family, initializer_range=0.3, **options)
    model.generation_config.eos_token_id = None
    return model


def some_ids(rows=2, length=40, seed=0):
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class Bare:
    """What the attention function asks of a module."""

    training = False


def call(config, query, key, value, mask=None, **more):
    scaling = query.shape[-1] ** -0.5
    return rope_alibi_attention(config, Bare(), query, key, value, mask, scaling=scaling, **more)


@pytest.mark.parametrize("family", ROTARY)
def test_without_a_penalty_it_is_rope(family):
    model, ids = sharp(family), some_ids()
    expected, slopes = model(ids).logits, gradients(model, ids)
    with RopeAlibiConfig(lambda_a=0.0).apply(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        for found, wanted in zip(gradients(model, ids), slopes, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with RopeAlibiConfig().apply(model):
        assert float((model(ids).logits - expected).abs().max()) > 1e-2
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("heads", [4, 8])
def test_without_rotation_and_with_geometric_slopes_it_is_mpts_alibi(heads):
    config = MptConfig(d_model=8 * heads, n_heads=heads, max_seq_len=32)
    torch.manual_seed(0)
    theirs = MptAttention(config, layer_idx=0).eval()
    x = torch.randn(2, 24, config.d_model, requires_grad=True)
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)[None, None]
    bias = build_mpt_alibi_tensor(heads, 32)
    expected = theirs(x, bias, attention_mask=hidden)[0]
    query, key, value = (t.unflatten(-1, (heads, 8)).transpose(1, 2) for t in theirs.Wqkv(x).chunk(3, dim=-1))
    found, _ = call(RopeAlibiConfig(slopes="geometric"), query, key, value)
    found = theirs.out_proj(found.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    slopes = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


def test_without_rotation_and_with_geometric_slopes_it_is_blooms_alibi():
    heads = 4
    config = BloomConfig(hidden_size=32, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0)
    torch.manual_seed(0)
    theirs = BloomAttention(config, layer_idx=0).eval()
    x = torch.randn(2, 24, 32)
    alibi = build_alibi_tensor(torch.ones(2, 24), heads, torch.float32)
    mask = torch.full((24, 24), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = theirs(x, residual=torch.zeros_like(x), alibi=alibi, attention_mask=mask)[0]
    query, key, value = theirs._reshape(theirs.query_key_value(x))
    found, _ = call(RopeAlibiConfig(slopes="geometric"), query, key, value)
    torch.testing.assert_close(theirs.dense(found.transpose(1, 2).flatten(2)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", READINGS, ids=str)
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_it_is_its_equation(options, kept):
    """Slopes belong to query heads, also where several share a key head."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, h, 12, 8, generator=g, dtype=torch.float64) for h in (4, kept, kept))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    config = RopeAlibiConfig(**options)
    angle = torch.arange(12.0)[:, None].double() * 100.0 ** (-torch.arange(4).double() / 4)
    angle = torch.cat((angle, angle), dim=-1)[None]
    turned = apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
    found, _ = call(config, *turned, value)
    wide = (t[0].repeat_interleave(4 // t.shape[1], 0) for t in (query, key, value))
    expected = rope_alibi_reference(
        *wide, slopes=head_slopes(config.slopes, 4), harmonic_distance=config.distance == "harmonic",
        lambda_r=config.lambda_r, lambda_a=config.lambda_a, theta=100.0,
    )  # fmt: skip
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    weight = torch.randn(found.shape, generator=g, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight[0]).sum(), leaves, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", READINGS[:3], ids=str)
def test_a_shift_of_all_positions_changes_nothing(options):
    model, ids = sharp("llama"), some_ids()
    with RopeAlibiConfig(**options).apply(model), torch.no_grad():
        expected = model(ids).logits
        shifted = model(ids, position_ids=torch.arange(37, 77)[None]).logits
    torch.testing.assert_close(shifted, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("options", READINGS[:2], ids=str)
def test_cached_decoding_is_the_whole_pass(family, options):
    model, ids = sharp(family), some_ids(length=48)
    with RopeAlibiConfig(**options).apply(model), torch.no_grad():
        expected = model(ids).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
            steps = [(0, 20), (20, 21), (21, 22), (22, 48)]
            found = torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in steps], dim=1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_is_greedy_on_whole_passes_in_a_padded_batch(cache):
    model, ids = sharp("llama"), some_ids(length=24)
    padded = torch.cat((torch.zeros(2, 7, dtype=torch.long), ids), dim=1)
    mask = (padded > 0).long()
    padded = torch.cat((padded, some_ids(rows=1, length=31, seed=5)))
    mask = torch.cat((mask, torch.ones(1, 31, dtype=torch.long)))
    more = {"cache_implementation": cache} if cache else {}
    with RopeAlibiConfig().apply(model):
        found = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, **more)[:2, 7:]
        for _ in range(6):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, ids)


def test_packed_sequences_do_not_see_each_other():
    model, ids = sharp("llama"), some_ids(rows=1)
    places = torch.cat((torch.arange(15), torch.arange(25)))[None]
    with RopeAlibiConfig(distance="harmonic").apply(model), torch.no_grad():
        found = model(ids, position_ids=places, use_cache=False).logits
        alone = torch.cat([model(part).logits for part in (ids[:, :15], ids[:, 15:])], dim=1)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)


def test_a_sliding_window_stays_and_a_mask_of_ones_own_is_followed():
    windowed, full = sharp("mistral", sliding_window=6), sharp("mistral")
    full.load_state_dict(windowed.state_dict())
    ids, place = some_ids(), torch.arange(40)
    far = place[:, None] - place
    seen = ((far >= 0) & (far < 6))[None, None].expand(2, 1, -1, -1)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with RopeAlibiConfig().apply(windowed), RopeAlibiConfig().apply(full), torch.no_grad():
        expected = windowed(ids).logits
        for mask in (seen, added):
            found = full(ids, attention_mask=mask, position_ids=place[None]).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert float((full(ids).logits - expected).abs().max()) > 1e-2


def test_rows_in_chunks_are_all_rows(monkeypatch):
    model, ids = sharp("llama"), some_ids()
    with RopeAlibiConfig().apply(model), torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(module, "SCORES", 2 * 4 * 40 * 7)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_weights_are_those_of_the_output():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 9, 8, generator=g) for h in (4, 2, 2))
    fused, none = call(RopeAlibiConfig(), query, key, value)
    found, weights = call(RopeAlibiConfig(), query, key, value, output_attentions=True)
    assert none is None
    torch.testing.assert_close(found, fused, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), fused, rtol=0, atol=1e-6)


def test_the_penalty_is_float32_in_bfloat16():
    """1,000 tokens away, bfloat16 knows a penalty of 250 only to 1."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 1200, 8, generator=g).bfloat16() for _ in range(3))
    # Keys that make up for the penalty exactly, so that distances decide in their last places.
    place = torch.arange(1200.0)
    config = RopeAlibiConfig(lambda_r=0.0)
    found, _ = call(config, query[:, :, -1:], key, value)
    slopes = head_slopes("harmonic", 2)
    expected = (-(slopes[:, None] * (1199 - place))).softmax(-1)[None, :, None] @ value.float()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("distance", ["linear", "harmonic"])
@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_is_told_the_same(distance, padded):
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.masking_utils import causal_mask_function

    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 40, 16, generator=g) for h in (4, 2, 2))
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :9] = not padded
    mask = places_mask(q_length=40, kv_length=40, mask_function=causal_mask_function, attention_mask=real)
    places, slopes = Places.read(mask, 40), head_slopes("harmonic", 4)
    expected, _ = call(RopeAlibiConfig(distance=distance), query, key, value, mask, softcap=3.0)
    found = flex_attention(
        query, key, value, score_mod=module.score_mod(places, 2, slopes, distance, 3.0),
        block_mask=module.causal_blocks(places, 2, mask), enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(
        found[real[:, None].expand(2, 4, -1)], expected[real[:, None].expand(2, 4, -1)], rtol=0, atol=1e-5
    )
    assert module.causal_blocks(places, 2, mask) is module.causal_blocks(places, 2, mask)


def test_a_deep_copy_of_a_model_keeps_its_attention():
    model, ids = sharp("llama"), some_ids()
    RopeAlibiConfig(distance="harmonic").install(model)
    expected = model(ids).logits
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, expected, rtol=0, atol=0)
