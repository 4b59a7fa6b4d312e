"""STRING on models of transformers: right for every family and way of running, and gone without a trace."""

import copy
import warnings

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
)

from modelwright import catalog
from modelwright.attention.string import OFFICIAL_FACTOR, StringConfig, apply_string
from modelwright.errors import UserError
from modelwright.models.tiny import seeded, tiny_config, tiny_model

LENGTH = 96
SHARP = {"max_position_embeddings": LENGTH, "initializer_range": 0.3}
SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SHARP,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 12, "factor": 8.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
FULL = {"layer_types": ["full_attention", "full_attention"]}

#: Name to the type of model and options; every layout of rotary embeddings that transformers has.
MODELS = {
    "llama": ("llama", {}),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}}),
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 12}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, **FULL}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, **FULL}),
    "gpt_neox: a quarter rotates": ("gpt_neox", {"num_key_value_heads": 4}),
    "phi: a half rotates": ("phi", {}),
    "cohere: pairs": ("cohere", {}),
    "glm: pairs in a half": ("glm", {"head_dim": 8}),
    "smollm3: not every layer rotates": ("smollm3", {"no_rope_layers": [1, 0]}),
    "deepseek: the last part rotates": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2,
        },
    ),
}  # fmt: skip


def build(name, **overrides):
    kind, options = MODELS[name]
    options = {**SMALL, **options, **overrides}
    implementation = options.pop("attn_implementation", None)
    config = AutoConfig.for_model(kind, **options)
    with seeded(0):
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def tokens(rows=2, length=80, seed=0):
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(found, expected, bound=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(expected.abs().max()))


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", **SHARP).double()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_last_token_sees_keys_at_the_papers_positions(name):
    """In a model of one layer the last token's answer is that of plain attention over keys moved to m - p(m, n)."""
    one = {"num_hidden_layers": 1}
    if "gemma" in name:
        one["layer_types"] = ["full_attention"]
    if "smollm3" in name:
        one["no_rope_layers"] = [1]
    model = build(name, **one)
    ids, shift, window = tokens(), 30, 7
    place = torch.arange(80)
    moved = torch.where(79 - place >= shift, place + shift - window, place).expand(2, -1)
    expected = model(ids, position_ids=moved, attention_mask=torch.ones_like(ids)).logits[:, -1]
    plain = model(ids).logits
    with apply_string(model, StringConfig(shift=shift, window=window)):
        found = model(ids).logits
    close(found[:, -1], expected)
    assert float((expected - plain[:, -1]).abs().max()) > 1e-3 * float(expected.abs().max())
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prefill_chunks_decoding_and_padding_agree(name):
    model = build(name)
    ids = tokens()
    with apply_string(model, StringConfig(shift=30, window=7)):
        whole = model(ids).logits
        cache, parts = None, []
        for part in ids.split([29, 1, 1, 20, 27, 2], dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        close(torch.cat(parts, 1), whole)
        mask = torch.ones(2, 85, dtype=torch.long)
        mask[0, :5] = mask[1, :2] = 0
        second = tokens(1, 83, seed=5)
        alone = model(second).logits
        padded = torch.zeros(2, 85, dtype=torch.long)
        padded[0, 5:], padded[1, 2:] = ids[0], second[0]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        both = model(padded, attention_mask=mask, position_ids=positions).logits
        close(both[0, 5:], whole[0])
        close(both[1, 2:], alone[0])


@torch.no_grad()
def test_padding_on_the_right_and_tokens_hidden_within(llama):
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, 45:] = 0
    mask[1, 10:14] = 0
    config = StringConfig(shift=20, window=7)
    with apply_string(llama, config):
        found = llama(ids, attention_mask=mask).logits
        alone = llama(ids[:1, :45]).logits
        # The same as a mask of four dimensions, which says everything.
        full = (mask[:, None, None].bool() & torch.ones(60, 60).tril().bool()).contiguous()
        places = torch.arange(60).expand(2, -1)
        spelt = llama(ids, attention_mask=full, position_ids=places).logits
    torch.testing.assert_close(found[:1, :45], alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1, 14:], spelt[1, 14:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_model_in_training_with_dropout_is_examined_without():
    model = build("gpt_neox: a quarter rotates", hidden_dropout=0.5).train()
    with apply_string(model, StringConfig(shift=30, window=7)) as applied:
        assert applied.layers == (0, 1)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("length", [29, 30, 31, 32])
@torch.no_grad()
def test_boundaries_in_float64(llama, length):
    """T = shift - 1, shift, shift + 1: prefill, then tokens one by one, from every split."""
    ids = tokens(2, length + 3)
    with apply_string(llama, StringConfig(shift=30, window=7)):
        whole = llama(ids).logits
        prefill = llama(ids[:, :length], use_cache=True)
        cache, parts = prefill.past_key_values, [prefill.logits]
        for token in ids[:, length:].split(1, dim=1):
            parts.append(llama(token, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_decoding_a_left_padded_batch_is_decoding_each_row(llama):
    ids = [tokens(1, n, seed=n) for n in (40, 28, 33)]
    padded = torch.cat([torch.nn.functional.pad(row, (40 - row.shape[1], 0)) for row in ids])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (40 - row.shape[1], 0)) for row in ids])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "output_logits": True}
    with apply_string(llama, StringConfig(shift=30, window=7)):
        batch = llama.generate(padded, attention_mask=mask, return_dict_in_generate=True, **options)
        for row, own in enumerate(ids):
            alone = llama.generate(own, return_dict_in_generate=True, **options)
            assert torch.equal(batch.sequences[row, 40:], alone.sequences[0, own.shape[1] :])
            logits = torch.stack([step[row] for step in batch.logits])
            torch.testing.assert_close(logits, torch.cat(alone.logits), rtol=0, atol=1e-10)
            full = llama(alone.sequences).logits[0, own.shape[1] - 1 : -1]
            torch.testing.assert_close(torch.cat(alone.logits).double(), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_up_to_the_shift_the_bits_are_the_models_own(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    plain, masked = model(ids).logits, model(ids, attention_mask=mask).logits
    written = model.generate(ids[:, :20], max_new_tokens=10, do_sample=False)
    with apply_string(model, StringConfig(shift=30, window=7)):
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids, attention_mask=mask).logits, masked)
        assert torch.equal(model.generate(ids[:, :20], max_new_tokens=10, do_sample=False), written)


@torch.no_grad()
def test_without_shift_and_with_a_window_as_wide_it_is_the_plain_model(llama):
    ids = tokens()
    plain = llama(ids).logits
    for shift, window in ((0, 0), (30, 30)):
        with apply_string(llama, StringConfig(shift=shift, window=window)):
            torch.testing.assert_close(llama(ids).logits, plain, rtol=0, atol=1e-12)


@torch.no_grad()
def test_bfloat16():
    model = build("llama")
    ids = tokens()
    with apply_string(model, StringConfig(shift=30, window=7)):
        exact = model(ids).logits
    model = model.bfloat16()
    plain = model(ids).logits.float()
    with apply_string(model, StringConfig(shift=30, window=7)):
        rough = model(ids).logits.float()
    spread = float(exact.std())
    assert float((rough - exact).abs().mean()) < 0.05 * spread
    assert float((plain - exact).abs().mean()) > 2 * float((rough - exact).abs().mean())


def state(model):
    names = {id(module): name for name, module in model.named_modules()}
    holders = {name: id(module.__dict__.get("config")) for name, module in model.named_modules()}
    tensors = {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = {name: module.training for name, module in model.named_modules()}
    keys = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return names, holders, tensors, flags, keys, copy.deepcopy(model.config.to_dict())


@pytest.mark.parametrize("training", [False, True])
def test_leaving_restores_everything(training):
    model = build("llama")
    model.train(training)
    before = state(model)
    registered = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    with pytest.raises(RuntimeError, match="inside"), apply_string(model, StringConfig(shift=30, window=7)):
        model(tokens())
        raise RuntimeError("inside")
    assert state(model) == before
    assert registered == (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping))
    with pytest.raises(UserError), apply_string(model, StringConfig(shift=500)):
        pass
    assert state(model) == before


@torch.no_grad()
def test_two_models_of_one_config_have_shifts_of_their_own():
    config = tiny_config("llama", **SHARP)
    with seeded(0):
        first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert first.config is second.config
    ids = tokens()
    plain = second(ids).logits
    with apply_string(first, StringConfig(shift=30, window=7)):
        alone = first(ids).logits
        assert torch.equal(second(ids).logits, plain)
        with apply_string(second, StringConfig(shift=50, window=3)):
            assert torch.equal(first(ids).logits, alone)
            other = second(ids).logits
        assert torch.equal(second(ids).logits, plain)
    with apply_string(second, StringConfig(shift=50, window=3)):
        assert torch.equal(second(ids).logits, other)
    assert not torch.equal(other, plain)


@torch.no_grad()
def test_a_cache_crosses_the_border_of_the_context(llama):
    """Keys are stored as ever, so a prompt that was read outside is continued inside, in the last layer's sense."""
    ids = tokens()
    one = tiny_model("llama", num_hidden_layers=1, **SHARP).double()
    with apply_string(one, StringConfig(shift=30, window=7)):
        expected = one(ids).logits[:, -1]
    cache = one(ids[:, :-1], use_cache=True).past_key_values
    with apply_string(one, StringConfig(shift=30, window=7)):
        torch.testing.assert_close(one(ids[:, -1:], past_key_values=cache).logits[:, -1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
@torch.no_grad()
def test_sliding_windows(family):
    """A window within the shift is left alone; a wider one hides what it hides, near and far."""
    ids, wide = tokens(), 50
    options = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": wide}
    if family == "mistral":
        del options["layer_types"]
    model = tiny_model(family, **SHARP, **options)
    place = torch.arange(80)
    moved = torch.where(79 - place >= 20, place + 20 - 7, place).expand(2, -1)
    expected = model(ids, position_ids=moved, attention_mask=torch.ones_like(ids)).logits[:, -1]
    plain = model(ids).logits
    with apply_string(model, StringConfig(shift=20, window=7)):
        found = model(ids).logits
        cache, parts = DynamicCache(config=model.config), []
        for part in ids.split([19, 1, 30, 1, 29], dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    close(found[:, -1], expected)
    close(torch.cat(parts, 1), found)
    assert float((found - plain).abs().max()) > 1e-4
    for shift in (wide, 60):
        config = StringConfig(shift=shift, window=7)
        with pytest.warns(UserWarning, match="changes nothing"), apply_string(model, config):
            assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_gemma3_has_a_rotation_for_each_kind_of_layer():
    model = tiny_model("gemma3", **SHARP, sliding_window=50)
    with apply_string(model, StringConfig(shift=20, window=7)) as applied:
        assert applied.layers == (0, 1)
        attention = model.model.layers[0].self_attn.config._attn_implementation
        hook = AttentionInterface._global_mapping[attention].__self__
        names = {layer: rotation.name for layer, rotation in hook.rotations.items()}
    kinds = model.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    assert names == {layer: f"{kind}_inv_freq" for layer, kind in enumerate(kinds)}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_mask_of_four_dimensions_counts_by_position_ids(name):
    """A tree of drafts: two continuations of one prompt in a single pass are each what they are alone."""
    model = build(name).double()
    prompt, left, right = tokens(1, 33), tokens(1, 4, seed=1), tokens(1, 4, seed=2)
    with apply_string(model, StringConfig(shift=30, window=7)):
        alone = [model(torch.cat((prompt, branch), 1)).logits[:, 33:] for branch in (left, right)]
        cache = model(prompt, use_cache=True).past_key_values
        mask = torch.zeros(1, 1, 8, 41, dtype=torch.bool)
        mask[..., :33] = True
        triangle = torch.ones(4, 4, dtype=torch.bool).tril()
        mask[0, 0, :4, 33:37] = mask[0, 0, 4:, 37:] = triangle
        if model.config._attn_implementation == "eager" and name != "gemma2":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        positions = torch.arange(33, 37).repeat(2)[None]
        tree = model(
            torch.cat((left, right), 1), past_key_values=cache, attention_mask=mask, position_ids=positions
        ).logits
    torch.testing.assert_close(tree, torch.cat(alone, 1), rtol=0, atol=1e-12)


@torch.no_grad()
def test_weights_are_returned_where_the_model_returns_them():
    model = build("llama, eager")
    with apply_string(model, StringConfig(shift=30, window=7)):
        out = model(tokens(), output_attentions=True)
    assert len(out.attentions) == 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 80))
    assert not out.attentions[1].triu(1).any()


def test_gradients():
    model = build("llama")
    ids = tokens()
    with apply_string(model, StringConfig(shift=30, window=7)):
        with torch.no_grad():
            fused = model(ids).logits
        out = model(ids)
        close(out.logits, fused)
        out.logits.logsumexp(-1).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@torch.no_grad()
def test_the_attention_factor_is_a_temperature(llama):
    ids = tokens(2, 20)
    with apply_string(llama, StringConfig(shift=30, window=7, attention_factor="official")) as applied:
        found = llama(ids).logits
    assert applied.attention_factor == OFFICIAL_FACTOR == pytest.approx(1.0693, abs=1e-4)
    same = copy.deepcopy(llama)
    for layer in same.model.layers:
        layer.self_attn.scaling *= OFFICIAL_FACTOR**2
    torch.testing.assert_close(found, same(ids).logits, rtol=0, atol=1e-12)
    long = tokens()
    with apply_string(llama, StringConfig(shift=30, window=7, attention_factor="official")):
        found = llama(long).logits
    with apply_string(same, StringConfig(shift=30, window=7)):
        torch.testing.assert_close(found, same(long).logits, rtol=0, atol=1e-12)


def test_what_is_applied():
    model = build("llama")
    with apply_string(model, StringConfig(window=8)) as applied:
        assert (applied.shift, applied.window, applied.attention_factor, applied.layers) == (32, 8, 1.0, (0, 1))
        assert applied.training_length == LENGTH
        assert [applied.largest_position(n) for n in (10, 32, 33, 96)] == [9, 31, 31, 71]
    assert StringConfig(shift=0.4, window=8).resolve(model)[0] == 38
    assert StringConfig(shift=0.4, window=8, training_length=50).resolve(model)[0] == 20
    with catalog.load("contexts", "string")(shift=40, window=8).apply(model) as applied:
        assert applied.shift == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 96}, "less than the training length of 96"),
        ({"shift": -1}, "at least 0"),
        ({"shift": 40.0}, "whole tokens as an int"),
        ({"shift": 1.0}, "a fraction between 0 and 1"),
        ({"shift": True}, "a fraction between 0 and 1"),
        ({"shift": float("nan")}, "a fraction between 0 and 1"),
        ({"shift": 30, "window": 31}, "at most the shift, which is 30"),
        ({"shift": 30, "window": -1}, "window is -1"),
        ({"shift": 30, "window": 7.5}, "window is 7.5: give whole tokens"),
        ({"shift": 30, "window": 7, "training_length": 0}, "training_length is 0"),
        ({}, "window is 128"),
        ({"shift": 30, "window": 8, "attention_factor": 0}, "attention_factor is 0"),
        ({"shift": 30, "window": 8, "attention_factor": "none"}, "attention_factor is 'none'"),
    ],
)
def test_values_out_of_range(options, message):
    model = build("llama")
    with pytest.raises(UserError, match=message), apply_string(model, StringConfig(**options)):
        pass


def test_models_that_cannot():
    config = StringConfig(shift=30, window=7, training_length=96)
    for family, message in (("gpt2", "no rotary position embedding"), ("mamba2", "no rotary position embedding")):
        with pytest.raises(UserError, match=message), apply_string(tiny_model(family), config):
            pass
    falcon = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    )
    with pytest.raises(UserError, match="ALiBi"), apply_string(falcon, config):
        pass
    gptj = AutoConfig.for_model("gptj", n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=96, vocab_size=259)
    with pytest.raises(UserError, match="no rotary"), apply_string(AutoModelForCausalLM.from_config(gptj), config):
        pass
    yarn = build("yarn")
    factor = StringConfig(shift=30, window=7, attention_factor="official")
    with pytest.raises(UserError, match="leave attention_factor at 1"), apply_string(yarn, factor):
        pass
    with apply_string(build("llama"), config) as _:
        pass
    model = build("llama")
    with (
        apply_string(model, config),
        pytest.raises(UserError, match="another context already"),
        apply_string(model, config),
    ):
        pass


def test_static_caches_are_refused_where_they_would_be_wrong():
    model = build("llama")
    ids = tokens(1, 40)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with (
        apply_string(model, StringConfig(shift=30, window=7)),
        pytest.raises(UserError, match="static cache"),
        torch.no_grad(),
    ):
        model.generate(ids, **options)


@torch.no_grad()
def test_prompts_beyond_the_models_positions_are_named_once():
    model = build("llama")
    with apply_string(model, StringConfig(shift=30, window=7)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens(1, LENGTH))
        with pytest.warns(UserWarning, match="97 tokens are more than the 96 positions"):
            model(tokens(1, LENGTH + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens(1, LENGTH + 1))


@torch.no_grad()
def test_resformer():
    from modelwright.architectures.resformer import ResFormerConfig, ResFormerForCausalLM

    with seeded(0):
        model = ResFormerForCausalLM(ResFormerConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    ids, place = tokens(), torch.arange(80)
    moved = torch.where(79 - place >= 30, place + 23, place).expand(2, -1)
    expected = model(ids, position_ids=moved, attention_mask=torch.ones_like(ids)).logits[:, -1]
    with apply_string(model, StringConfig(shift=30, window=7)):
        close(model(ids).logits[:, -1], expected)
