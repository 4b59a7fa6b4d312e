"""Roles, by what the parts do and not by what they are called."""

import copy

import pytest
import torch

from modelwright import catalog
from modelwright.errors import UserError
from modelwright.models.new import new_config, new_model
from modelwright.models.roles import KNOWN, roles, unwrap
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))
WITH_ATTENTION = [f for f in FAMILIES if f != "mamba2"]
GATED = [f for f in WITH_ATTENTION if f not in ("gpt2", "gpt_neox")]


def output_of(model, module):
    """The module's first input and its output in a forward pass."""
    seen = {}

    def hook(_, args, kwargs, out):
        seen["in"] = (args or tuple(kwargs.values()))[0]
        seen["out"] = out[0] if isinstance(out, tuple) else out

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        cache = model(IDS).get("past_key_values")
    handle.remove()
    return seen["in"], seen["out"], cache


@pytest.fixture(params=WITH_ATTENTION)
def model(request):
    return tiny_model(request.param, seed=1).double()


def heads(flat, cached):
    return flat.view(*flat.shape[:2], cached.shape[1], cached.shape[3]).transpose(1, 2)


def test_the_value_projection_fills_the_cache_of_values(model):
    for layer in roles(model).layers:
        _, out, cache = output_of(model, layer.value.module)
        cached = cache.layers[layer.index].values
        torch.testing.assert_close(heads(layer.value.take(out), cached), cached)


def test_the_key_projection_fills_the_cache_of_keys_where_no_rotation_or_norm_follows(model):
    if any(name.endswith("k_norm") for name, _ in model.named_modules()):
        pytest.skip("keys are normed before they are cached")
    layer = roles(model).layers[0]
    _, out, cache = output_of(model, layer.key.module)
    cached = cache.layers[0].keys
    first = heads(layer.key.take(out), cached)[:, :, 0]  # position 0 is not rotated
    torch.testing.assert_close(first, cached[:, :, 0])


def test_weights_are_those_that_act(model):
    layer = roles(model).layers[1]
    for part in (layer.query, layer.key, layer.value, layer.output, layer.up, layer.down):
        given, out, _ = output_of(model, part.module)
        bias = part.bias()
        torch.testing.assert_close(given @ part.weight().T + (0 if bias is None else bias), part.take(out))


def test_without_query_the_keys_do_not_matter_but_the_values_do(model):
    layer = roles(model).layers[0]
    with torch.no_grad():
        layer.query.set_weight(torch.zeros_like(layer.query.weight()))
        if layer.query.bias() is not None:
            rows = slice(None) if layer.query.rows is None else layer.query.rows
            layer.query.base.bias[rows] = 0
        before = model(IDS).logits
        layer.key.set_weight(torch.randn_like(layer.key.weight()))
        torch.testing.assert_close(model(IDS).logits, before)
        layer.value.set_weight(torch.randn_like(layer.value.weight()))
        assert (model(IDS).logits - before).abs().max() > 1e-6


def test_set_weight_changes_its_own_rows_only(model):
    layer = roles(model).layers[0]
    before = {name: getattr(layer, name).weight().clone() for name in ("query", "key", "value", "output")}
    layer.value.set_weight(before["value"] + 1)
    assert torch.equal(layer.value.weight(), before["value"] + 1)
    for name in ("query", "key", "output"):
        assert torch.equal(getattr(layer, name).weight(), before[name])
    with pytest.raises(ValueError, match="has shape"):
        layer.value.set_weight(torch.zeros(3, 3))


def test_mlp(model):
    layer = roles(model).layers[1]
    parts = [layer.down, layer.up, layer.gate] if layer.gate else [layer.down]
    for part in parts:
        kept = part.weight().clone()
        part.set_weight(torch.zeros_like(kept))
        _, out, _ = output_of(model, layer.mlp)
        bias = layer.down.bias()
        torch.testing.assert_close(out, torch.zeros_like(out) + (0 if bias is None else bias))
        part.set_weight(kept)


def test_norms_stand_before_what_they_norm(model):
    r = roles(model)
    for layer in r.layers:
        assert torch.equal(output_of(model, layer.mixer_norm)[1], output_of(model, layer.mixer)[0])
        assert torch.equal(output_of(model, layer.mlp_norm)[1], output_of(model, layer.mlp)[0])
        if layer.mixer_output_norm is not None:
            assert torch.equal(output_of(model, layer.mixer_output_norm)[0], output_of(model, layer.mixer)[1])
            assert torch.equal(output_of(model, layer.mlp_output_norm)[0], output_of(model, layer.mlp)[1])
    assert torch.equal(output_of(model, r.final_norm)[1], output_of(model, r.head)[0])
    assert r.embedding is model.get_input_embeddings()
    assert r.head is model.get_output_embeddings()


def test_names_lead_to_the_modules(model):
    for layer in roles(model).layers:
        assert model.get_submodule(layer.name) is layer.block
        for part in (layer.query, layer.output, layer.up, layer.gate):
            assert part is None or model.get_submodule(part.name) is part.module


def test_mamba_has_a_mixer_and_no_attention():
    model = tiny_model("mamba2")
    layer = roles(model).layers[1]
    assert layer.attention is layer.query is layer.value is layer.mlp is None
    given, out, _ = output_of(model, layer.output.module)
    torch.testing.assert_close(given @ layer.output.weight().T, out)
    assert torch.equal(output_of(model, layer.mixer_norm)[1], output_of(model, layer.mixer)[0])


@pytest.mark.parametrize("family", sorted(catalog.provided("architectures")))
def test_our_own_architectures(family):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = new_model(new_config(family, sizes, byte_tokenizer()))
    layers = roles(model).layers
    assert all(layer.query is not None and layer.gate is not None for layer in layers)
    assert layers[0].value is not None
    for layer in layers:
        assert (layer.value is None) == (getattr(layer.attention, "v_proj", None) is None)


def test_wrappers_are_taken_off():
    model = tiny_model("llama")
    inner = roles(model)
    compiled = torch.compile(model)
    assert unwrap(torch.nn.DataParallel(compiled)) is model
    assert roles(compiled).layers[0].value.module is inner.layers[0].value.module


def test_peft_adapters():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    weight = copy.deepcopy(roles(model).layers[0].value.weight())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"]))
    value = roles(wrapped).layers[0].value
    assert value.module is not value.base
    assert torch.equal(value.weight(), weight)


def test_unknown_families():
    model = tiny_model("llama")
    model.config.model_type = "hypernet"
    with pytest.raises(UserError, match=f"'hypernet' model keeps its parts .known: {KNOWN[0]}"):
        roles(model)
    assert len(roles(model, like="llama").layers) == 2
    with pytest.raises(UserError, match="no 'transformer.h'"):
        roles(model, like="gpt2")
    with pytest.raises(UserError, match="did you mean 'llama'"):
        roles(model, like="lama")
