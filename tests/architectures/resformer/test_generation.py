"""Caches and generation: cached, padded, chunked and beamed decoding all equal the plain forward pass."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from architectures.resformer.small_models import SIZES, VARIANTS, build, llama, tokens
from modelwright.architectures.resformer import ResFormerConfig, SharedValueCache, kv_cache_bytes
from modelwright.errors import UserError

IDS = tokens(batch=3, length=12)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_full_forward(variant):
    model = build(variant)
    full = model(IDS, use_cache=False).logits
    pieces, cache = [], None
    for piece in IDS.split([5, 3, 1, 1, 1, 1], dim=-1):  # chunked prefill, then token by token
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-10, rtol=0)
    assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_and_without_a_cache_with_left_padding_and_beams(variant):
    model = build(variant)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    mask[1, :1] = 0
    ids = IDS.masked_fill(mask == 0, 0)
    for beams in (1, 3):
        cached = model.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY)
        uncached = model.generate(ids, attention_mask=mask, num_beams=beams, use_cache=False, **GREEDY)
        assert torch.equal(cached, uncached), beams
    chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=5, **GREEDY)
    assert torch.equal(chunked, model.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("variant", ["identity", "token-gate", "svformer", "cla2", "neutreno"])
def test_a_left_padded_batch_equals_the_sequences_alone(variant):
    model = build(variant)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(IDS, attention_mask=mask, position_ids=positions).logits
    alone = model(IDS[:1, 4:]).logits
    torch.testing.assert_close(logits[:1, 4:], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", ["identity", "svformer"])
def test_only_the_asked_for_logits(variant):
    model = build(variant)
    full = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, full[:, -2:], atol=1e-12, rtol=0)
    chosen = torch.tensor([0, 3])
    torch.testing.assert_close(model(IDS, logits_to_keep=chosen).logits, full[:, chosen], atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 7, 12])
@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_svformer_cache_bytes_are_n_plus_1_over_2n_of_llamas(length, layers):
    def held(model):
        return kv_cache_bytes(model(IDS[:, :length], use_cache=True).past_key_values)

    full = held(llama(num_hidden_layers=layers))
    model = build("svformer", num_hidden_layers=layers)
    assert held(model) * 2 * layers == full * (layers + 1)
    # With GQA the two ratios multiply.
    many_heads = held(llama(num_hidden_layers=layers, num_key_value_heads=4))
    assert held(model) * 2 * layers * 4 == many_heads * (layers + 1) * 2


def test_cache_bytes_count_what_is_held():
    model = build("svformer", dtype=torch.float32)
    cache = model(IDS, use_cache=True).past_key_values
    assert isinstance(cache, SharedValueCache)
    one = IDS.numel() * SIZES["num_key_value_heads"] * model.config.head_dim * 4
    assert cache.get_kv_bytes() == 5 * one  # keys of 4 layers, values of one
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(stored.values()) == 5 * one  # nothing hides behind a view


def test_cla2_and_gqa_cache_bytes():
    full = kv_cache_bytes(llama(num_key_value_heads=4)(IDS, use_cache=True).past_key_values)
    cla = kv_cache_bytes(build("cla2", num_key_value_heads=4)(IDS, use_cache=True).past_key_values)
    gqa = kv_cache_bytes(llama(num_key_value_heads=2)(IDS, use_cache=True).past_key_values)
    assert cla * 2 == gqa * 2 == full


def test_generate_makes_the_shared_value_cache_by_itself():
    model = build("svformer")
    output = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
    assert isinstance(output.past_key_values, SharedValueCache)
    given = SharedValueCache(model.config)
    again = model.generate(IDS, past_key_values=given, **GREEDY)
    assert torch.equal(output.sequences, again)
    assert given.get_seq_length() == again.shape[1] - 1


def test_the_generation_hook_that_is_overridden_exists():
    """A canary: `_prepare_cache_for_generation` is private to transformers."""
    from transformers import GenerationMixin

    assert callable(GenerationMixin._prepare_cache_for_generation)


def filled(model, ids=IDS):
    return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("variant", ["svformer", "svformer-anchors", "svformer-cla2"])
def test_cache_operations_leave_a_cache_of_the_changed_batch(variant):
    model = build(variant)
    following = tokens(3, 1, seed=5)

    def after(cache, rows=slice(None), start=IDS):
        ids = start[rows]
        new = following[: len(ids)]
        got = model(new, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, model(torch.cat([ids, new], 1)).logits[:, -1:], atol=1e-10, rtol=0)

    cache = filled(model)
    cache.crop(-3)
    after(cache, start=IDS[:, :-3])
    cache = filled(model)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    after(cache, rows=[2, 0, 0])
    cache = filled(model)
    cache.batch_select_indices(torch.tensor([2, 1]))
    after(cache, rows=[2, 1])
    cache = filled(model, IDS[:1])
    cache.batch_repeat_interleave(3)
    after(cache, rows=[0, 0, 0])
    cache = filled(model)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.get_kv_bytes() == 0
    model(IDS, past_key_values=cache, use_cache=True)
    after(cache)


@pytest.mark.parametrize("variant", ["svformer-anchors", "cla2"])
def test_assisted_generation_rolls_the_cache_back(variant):
    model, draft = build(variant, dtype=torch.float32), build(variant, seed=5, dtype=torch.float32)
    plain = llama(dtype=torch.float32)
    for target, assistant in ((model, draft), (model, plain), (plain, model)):
        expected = target.generate(IDS[:1], **GREEDY)
        assert torch.equal(target.generate(IDS[:1], assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=3, **GREEDY), model.generate(IDS[:1], **GREEDY))


def test_an_anchors_values_follow_to_the_device_of_the_layer_that_uses_them():
    cache = SharedValueCache(build("svformer").config)
    tensor = torch.zeros(1, 2, 3, 8)
    cache.update(tensor, tensor, 0)
    keys, values = cache.update(tensor.to("meta"), None, 1)  # with a device map: another GPU
    assert keys.device == values.device == torch.device("meta")
    assert cache.values_of(1).device == tensor.device


def test_svformer_decodes_compiled_with_symbolic_sizes():
    model = build("svformer", num_hidden_layers=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        cache = model(IDS[:, :10], use_cache=True).past_key_values
        pieces = [compiled(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(10, 12)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(IDS).logits[:, 10:], atol=1e-10, rtol=0)


def test_svformer_refuses_other_caches():
    model = build("svformer")
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=32),
    ):
        with pytest.raises(UserError, match="SharedValueCache"):
            model(IDS, past_key_values=cache, use_cache=True)
        with pytest.raises(UserError, match="SharedValueCache"):
            model.generate(IDS, past_key_values=cache, **GREEDY)
    with pytest.raises(UserError, match="SharedValueCache"):
        model.generate(IDS, cache_implementation="static", **GREEDY)
    with pytest.raises(UserError, match="anchors"):
        model(IDS, past_key_values=SharedValueCache(build("svformer-anchors").config), use_cache=True)


def test_the_shared_value_cache_refuses_other_models():
    with pytest.raises(UserError, match="DynamicCache"):
        SharedValueCache(llama().config)
    model = build("identity")
    with pytest.raises(UserError, match="SharedValueCache"):
        model(IDS, past_key_values=SharedValueCache(build("svformer").config), use_cache=True)
    cache = SharedValueCache(build("svformer").config)
    key = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="layer 1 is no anchor"):
        cache.update(key, key, 1)
    with pytest.raises(ValueError, match="layer 0 is an anchor"):
        cache.update(key, None, 0)


def test_a_static_cache_serves_resformer():
    model = build("identity", dtype=torch.float32)
    expected = model.generate(IDS, **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)


def test_hidden_states_and_attentions_are_recorded():
    model = build("identity")
    model.set_attn_implementation("eager")
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == SIZES["num_hidden_layers"] + 1
    assert [a.shape for a in output.attentions] == [(3, 4, 12, 12)] * SIZES["num_hidden_layers"]
    assert isinstance(model.config, ResFormerConfig)
