"""The cache in models: generation, beams, padding, every attention implementation, and the command line."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import cache_utils

from modelwright.attention.saq import StaircaseQuantizedCache
from modelwright.attention.saq import stored as stored_module
from modelwright.attention.saq.stored import StoredStates
from modelwright.decoding.parts import read_cache, read_parts
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.generate import Generate

FULL = ("llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox")
SIZES = {"segment_length": 16, "group_size": 8}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompt(rows=2, length=70, seed=0):
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def cache_for(model, levels=(16, 8, 4, 2), **options):
    return StaircaseQuantizedCache(model.config, levels, **(SIZES | options))


def logits(model, ids, cache, mask=None):
    """Logits of every token, read one by one after a prompt of 60."""
    found = []
    with torch.no_grad():
        for begin, end in [(0, 60), *((i, i + 1) for i in range(60, ids.shape[1]))]:
            now = None if mask is None else mask[:, :end]
            positions = None if now is None else (now.cumsum(-1) - 1).clamp(min=0)[:, begin:]
            out = model(ids[:, begin:end], attention_mask=now, position_ids=positions, past_key_values=cache)
            found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FULL)
def test_generation_in_every_family(family):
    model = tiny_model(family)
    inputs = {"inputs": prompt(), "max_new_tokens": 30, **GREEDY}
    plain = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, past_key_values=cache_for(model, (16,))), plain)
    cache = cache_for(model)
    found = model.generate(**inputs, past_key_values=cache)
    assert found.shape == plain.shape
    assert cache.get_seq_length() == 99
    assert cache.segment_bits() == [2, 2, 2, 2, 4, 8]


@pytest.mark.parametrize("family", [*FULL, "llama, one key head"])
def test_every_attention_implementation_reads_the_same(family, monkeypatch):
    """Packed (by sdpa, by name) or dequantised (eager): the same logits; and packed ones are not dequantised whole."""
    shared = {"num_key_value_heads": 1} if "," in family else {}
    model = tiny_model(family.partition(",")[0], **shared)
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    whole = []
    dequantised = StoredStates.dequantised
    monkeypatch.setattr(StoredStates, "dequantised", lambda self: whole.append(1) or dequantised(self))
    for padding in (None, mask):
        found = {}
        for name in ("eager", "sdpa", "staircase"):
            model.set_attn_implementation(name)
            whole.clear()
            found[name] = logits(model, ids, cache_for(model), padding)
            if name == "eager":
                assert whole
            elif name == "staircase" or padding is None:
                assert not whole
        seen = slice(23, None) if padding is not None else slice(None)
        for name in ("sdpa", "staircase"):
            torch.testing.assert_close(found[name][:, seen], found["eager"][:, seen], rtol=1e-4, atol=1e-4)
        assert not torch.equal(found["staircase"], logits(model, ids, cache_for(model, (16,)), padding))


def test_padding_on_the_left_changes_nothing():
    model = tiny_model("llama")
    ids = prompt(1)
    alone = logits(model, ids, cache_for(model, (16,)))
    mask = torch.cat((torch.zeros(1, 13, dtype=torch.long), torch.ones_like(ids)), 1)
    padded = logits(model, torch.cat((torch.zeros(1, 13, dtype=torch.long), ids), 1), cache_for(model, (16,)), mask)
    torch.testing.assert_close(padded[:, 13:], alone, rtol=1e-4, atol=1e-4)
    # Quantised, segments lie elsewhere; the logits are near, not equal.
    padded = logits(model, torch.cat((torch.zeros(1, 13, dtype=torch.long), ids), 1), cache_for(model, (16, 8)), mask)
    assert float((padded[:, 13:] - alone).abs().max()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    model = tiny_model("llama").to(dtype)
    cache = cache_for(model)
    found = logits(model, prompt(), cache)
    assert found.dtype == dtype
    plain = logits(tiny_model("llama"), prompt(), cache_for(model))
    assert float((found.float() - plain).abs().max()) < 0.1
    assert cache.layers[0].keys.dtype == dtype


def test_compiled_attention_is_given_plain_tensors():
    """flex_attention is compiled, which no other tensors go into."""
    model, states = tiny_model("llama"), torch.randn(2, 1, 2, 40, 8)
    found = {}
    for name in ("sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        cache = cache_for(model)
        cache.update(*states, 0)
        found[name] = cache.update(*states[..., :1, :], 0)
    assert all(isinstance(s, StoredStates) for s in found["sdpa"])
    for plain, stored in zip(found["flex_attention"], found["sdpa"], strict=True):
        assert type(plain) is torch.Tensor
        assert torch.equal(plain, stored.dequantised())


def test_autocast():
    model, ids = tiny_model("llama"), prompt()
    expected = logits(model, ids, cache_for(model))
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, ids, cache_for(model))
    assert float((found.float() - expected).abs().max()) < 0.1


def test_a_prompt_in_pieces():
    """Many queries at once over packed states, causal among themselves, as with dequantised ones."""
    model = tiny_model("llama")
    ids = prompt(length=100)
    results = []
    for name in ("eager", "sdpa", "staircase"):
        model.set_attn_implementation(name)
        cache = cache_for(model)
        with torch.no_grad():
            parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 40), (40, 90), (90, 100))]
        results.append(torch.cat(parts, 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)


def test_inference_mode_and_gradients_on():
    """Neither is what generate uses; both give what it gives, and no graph is kept."""
    model, ids = tiny_model("llama"), prompt()
    expected = logits(model, ids, cache_for(model))
    for context in (torch.inference_mode, torch.enable_grad):
        cache = cache_for(model)
        with context():
            model(ids[:, :60], past_key_values=cache)
            found = model(ids[:, 60:61], past_key_values=cache).logits
        torch.testing.assert_close(found[:, 0], expected[:, 60], rtol=1e-4, atol=1e-5)
        keys, values = cache.layers[0].segments[0]
        assert not any(t.requires_grad for t in (keys.scale, values.minimum))


def test_beams():
    model = tiny_model("llama")
    inputs = {"inputs": prompt(), "max_new_tokens": 24, "num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(**inputs, past_key_values=cache_for(model, (16,))), model.generate(**inputs))
    quantised = model.generate(**inputs, past_key_values=cache_for(model))
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(**inputs, past_key_values=cache_for(model)), quantised)


def test_prompt_lookup_rolls_back():
    model = tiny_model("llama")
    ids = prompt(1, 20).repeat(1, 4)
    inputs = {"inputs": ids, "max_new_tokens": 20, **GREEDY}
    plain = model.generate(**inputs)
    assert torch.equal(
        model.generate(**inputs, past_key_values=cache_for(model, (16,)), prompt_lookup_num_tokens=3), plain
    )
    cache = cache_for(model)
    model.generate(**inputs, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() in (99, 100)


def test_stored_states_are_right_whatever_is_done_with_them():
    model = tiny_model("llama")
    cache = cache_for(model)
    both = torch.randn(2, 1, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    cache.update(*both, 0)
    keys, values = cache.update(*(s[:, :, :1] for s in both), 0)
    assert isinstance(keys, StoredStates)
    plain = keys.dequantised()
    assert type(plain) is torch.Tensor
    assert keys.shape == plain.shape
    assert keys.dtype == plain.dtype
    assert keys.device == plain.device
    assert torch.equal(keys.transpose(1, 2), plain.transpose(1, 2))
    assert torch.equal(torch.cat((keys, plain), 2), torch.cat((plain, plain), 2))
    assert torch.equal(keys.repeat_interleave(2, 1), plain.repeat_interleave(2, 1))
    assert torch.equal(keys[:, :, 5], plain[:, :, 5])
    assert "bits=[2, 4, 8]" in repr(keys)
    query = torch.randn(1, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    expected = functional.scaled_dot_product_attention(query, plain, values.dequantised(), enable_gqa=True)
    found = functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    # What packed attention does not do is left to torch.
    causal = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(
        causal,
        functional.scaled_dot_product_attention(query, plain, values.dequantised(), is_causal=True, enable_gqa=True),
    )


def test_long_calls_are_left_to_torch(monkeypatch):
    model = tiny_model("llama")
    cache = cache_for(model)
    both = torch.randn(2, 1, 2, 70, 8)
    cache.update(*both, 0)
    keys, values = cache.update(*(s[:, :, :1] for s in both), 0)
    monkeypatch.setattr(stored_module, "packed_attention", None)
    assert stored_module.attend(torch.zeros(1, 2, 65, 8), keys, values, mask=None, scaling=1.0) is None


class Said(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def test_generate_with_a_named_cache(tmp_path):
    save_model(tiny_model("llama"), byte_tokenizer(), tmp_path / "model")
    output, plot, said = tmp_path / "out.jsonl", tmp_path / "memory.svg", Said()

    def generate(cache, **options):
        inputs = {"model": str(tmp_path / "model"), "prompt": ["a tale " * 10], "output": output, "max_new_tokens": 24}
        return Generate(**inputs, cache=cache, **options).run(said)

    given = "saq: {segment_length: 16, group_size: 8}"
    summary = generate(given, cache_plot=plot, compare=True)
    row = json.loads(output.read_text().splitlines()[0])
    assert {"completion", "plain", "first_difference"} <= set(row)
    assert plot.stat().st_size > 1000
    assert [level["bits"] for level in summary["cache_memory"]] == [16, 8, 4, 2]
    assert sum(level["tokens"] for level in summary["cache_memory"]) == 70 + 23
    assert any("bits" in line and "all" in line for line in said.lines)
    with pytest.raises(UserError, match="exists"):
        generate(given, cache_plot=plot, force=False)
    with pytest.raises(UserError, match="name one, such as --cache saq"):
        generate(None, cache_plot=tmp_path / "other.svg", force=True)
    generate("dynamic", cache_plot=tmp_path / "other.svg", force=True)
    assert "other.svg was not drawn" in said.lines[-1]
    for name in ("kivi-2: {residual_length: 16, group_size: 8}", "kivi-4: {group_size: 8}", "dynamic"):
        assert ("cache_memory" in generate(name, force=True)) == name.startswith("kivi")
    # With a method that has a loop of its own.
    assert "cache_memory" in generate(given, force=True, with_=["plain"])
    for name, message in (
        ("saq", "groups of 32 do not divide"),
        ("squeezed", "'squeezed' is no cache"),
        ("quantized: {backend: hqq}", "backend 'hqq'"),
        ("saq: {levels: [16, 5]}", "5 bits cannot be packed"),
        ("saq: {bits: 5}", "no option 'bits'"),
        ("{saq: {}, kivi-2: {}}", "two caches: name one"),
    ):
        with pytest.raises(UserError, match=message):
            generate(name, force=True)
    assert not list(tmp_path.glob("*.partial*"))


def test_transformers_own_quantized_cache():
    model, part = tiny_model("llama"), read_cache("quantized: {backend: fp8}")
    if hasattr(cache_utils, "Fp8QuantizedLayer"):
        given = part.options.for_generate(model)
        assert model.generate(prompt(), max_new_tokens=5, **GREEDY, **given).shape == (2, 75)
    else:
        with pytest.raises(UserError, match="backend 'fp8'"):
            part.options.for_generate(model)


def test_multi_draft_says_that_it_wants_another_cache():
    model, parts = tiny_model("llama"), read_parts(["multi-draft: {prompt_lookup: true}"])
    parts = replace(parts, cache=read_cache("saq: {segment_length: 16, group_size: 8}"))
    with parts.on(model, byte_tokenizer()) as applied, pytest.raises(UserError, match="needs a dynamic cache"):
        applied.generate(inputs=prompt(1), max_new_tokens=5, **GREEDY)


def test_a_run_with_another_cache_is_another_run():
    parts = [replace(read_parts([]), cache=read_cache(name)) for name in ("kivi-2", "kivi-4", "kivi-2: {bits: 2}")]
    assert parts[0].identity() == parts[2].identity()
    assert parts[0].identity() != parts[1].identity()
    assert parts[0].name == "kivi-2"
