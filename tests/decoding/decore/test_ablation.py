import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from decoding.decore.decore_cases import ATTENTION, HEADS, INPUTS, make, rows
from modelwright.decoding.decore import HeadAblation, mean_outputs
from modelwright.errors import UserError
from modelwright.models.heads import all_heads, head_layers
from modelwright.models.roles import roles


def qwen3():
    config = Qwen3Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


MODELS = {**{family: family for family in ATTENTION}, "qwen3": None}


def model_of(name):
    return qwen3() if name == "qwen3" else make(name)


def outputs(model, layer, ids, mask, **keys):
    """What the output projection of a layer gets and gives, and the attention weights."""
    model.set_attn_implementation("eager")
    caught = {}
    module = head_layers(model)[layer].output
    handle = module.register_forward_hook(lambda m, args, out: caught.update(input=args[0], output=out))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=positions, output_attentions=True, **keys)
    finally:
        handle.remove()
    return caught["input"], caught["output"], out


@pytest.mark.parametrize("name", MODELS)
def test_with_all_heads_of_a_layer_off_its_attention_is_the_bias(name):
    model = model_of(name)
    layer = head_layers(model)[1]
    ids, mask = rows(["some words", "few"])
    with HeadAblation(model, [(1, head) for head in range(4)]):
        _, out, _ = outputs(model, 1, ids, mask)
    bias = layer.output.bias
    wanted = torch.zeros_like(out) if bias is None else bias.expand_as(out)
    assert torch.equal(out[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("name", MODELS)
def test_off_heads_are_zero_and_others_are_as_they_were(name):
    model = model_of(name)
    ids, mask = rows(["some words", "few"])
    plain, _, _ = outputs(model, 0, ids, mask)
    caught = []
    with HeadAblation(model, [(0, 2)]):
        handle = head_layers(model)[0].output.register_forward_hook(lambda m, args, out: caught.append(args[0]))
        outputs(model, 0, ids, mask)
        handle.remove()
    (changed,) = caught
    assert (changed[..., 16:24] == 0).all()
    others = [*range(16), *range(24, 32)]
    assert torch.equal(changed[..., others], plain[..., others])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_hooks_equal_an_explicit_computation(name):
    """In float64, from the weights that the model itself gives: grouped queries, fused projections, left padding."""
    model = model_of(name).double()
    ids, padding = rows(["some more words", "few"])
    length = ids.shape[1]
    seen = torch.ones(length, length).tril().bool() & padding[:, None].bool()
    # Written out, for the library's own mask gives padding NaN in float64.
    mask = torch.where(seen, 0.0, -1e9)[:, None].double()
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    part = roles(model).layers[1]
    caught = {}
    handles = [
        part.value.module.register_forward_hook(lambda m, args, out: caught.update(value=part.value.take(out))),
        part.output.module.register_forward_hook(lambda m, args, out: caught.update(output=out)),
    ]
    keys = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        weights = model(ids, output_attentions=True, **keys).attentions[1]
        value = caught["value"].view(*ids.shape, -1, 8).transpose(1, 2)
        mixed = weights @ value.repeat_interleave(4 // value.shape[1], 1)
        mixed[:, [1, 3]] = 0
        wanted = mixed.transpose(1, 2).flatten(2) @ part.output.weight().T
        wanted += 0 if part.output.bias() is None else part.output.bias()
        with HeadAblation(model, [(1, 1), (1, 3)]):
            model(ids, **keys)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(caught["output"][padding.bool()], wanted[padding.bool()], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_uniform_head_gives_the_mean_of_what_it_sees(name):
    model = model_of(name)
    ids, mask = rows(["some more words than a window of sixteen", "few words"])
    with HeadAblation(model, [(0, 1), (0, 2)], "uniform"):
        _, _, out = outputs(model, 0, ids, mask)
    weights = out.attentions[0]
    seen = (weights[:, 0] > 0) | (weights[:, 3] > 0)
    length = ids.shape[1]
    causal = torch.ones(length, length).tril().bool() & mask[:, None].bool()
    window = getattr(model.config, "sliding_window", None) if name in ("gemma2", "gemma3") else None
    if window:
        causal &= ~torch.ones(length, length).tril(-window).bool()
    for row in range(2):
        for at in mask[row].nonzero()[:, 0].tolist():
            visible = causal[row, at]
            assert not (seen[row, at] & ~visible).any()
            for head in (1, 2):
                wanted = visible.float() / visible.sum()
                torch.testing.assert_close(weights[row, head, at], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ablation", ["zero", "uniform"])
@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_the_future(name, ablation):
    model = model_of(name)
    ids, _ = rows(["some more words"])
    other = ids.clone()
    other[0, 9:] = 77
    with HeadAblation(model, HEADS, ablation), torch.no_grad():
        one, two = model(ids).logits, model(other).logits
    assert torch.equal(one[:, :9], two[:, :9])


@pytest.mark.parametrize("ablation", ["zero", "uniform", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_rows_and_tokens_apart(name, ablation):
    model = model_of(name)
    means = torch.randn(2, 4, 8)
    ids, _ = rows(["some more words"])
    with torch.no_grad():
        plain = model(ids).logits
        with HeadAblation(model, HEADS, ablation, means=means) as twin:
            off = model(ids).logits
            twin.where = torch.tensor([[False], [True], [False]])
            three = model(ids.expand(3, -1)).logits
            twin.where = (torch.arange(ids.shape[1]) >= 8)[None]
            late = model(ids).logits
            twin.enabled = False
            torch.testing.assert_close(model(ids).logits, plain, atol=0, rtol=0)
    torch.testing.assert_close(three, torch.cat((plain, off, plain)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(late[:, :8], plain[:, :8], atol=0, rtol=0)
    assert not torch.allclose(late[:, 8:], plain[:, 8:], atol=1e-3)


def test_the_mean_is_put_in_place_of_the_output():
    model = make("qwen2")
    texts = ["some more words", "few"]
    ids, mask = rows(texts)
    means = mean_outputs(model, [(ids, mask)])
    plain = [outputs(model, layer, ids, mask)[0][mask.bool()].mean(0).view(4, 8) for layer in (0, 1)]
    torch.testing.assert_close(means, torch.stack(plain), atol=1e-5, rtol=1e-4)
    caught = []
    with HeadAblation(model, [(1, 3)], "mean", means=means):
        handle = head_layers(model)[1].output.register_forward_hook(lambda m, args, out: caught.append(args[0]))
        with torch.no_grad():
            model(ids)
        handle.remove()
    torch.testing.assert_close(caught[0][0, 4, 24:], means[1, 3])
    with pytest.raises(UserError, match="another model's"):
        HeadAblation(model, [(1, 3)], "mean", means=torch.zeros(2, 3, 8))
    with pytest.raises(UserError, match="reach up to layer 1"):
        HeadAblation(model, [(1, 3)], "mean", means=torch.zeros(1, 4, 8))
    with pytest.raises(UserError, match="no text"):
        mean_outputs(model, [])


def test_it_leaves_no_trace_and_may_be_nested():
    model = make()
    ids = INPUTS["input_ids"]
    with torch.no_grad():
        plain = model(ids).logits
        with HeadAblation(model, HEADS):
            once = model(ids).logits
            with HeadAblation(model, [(0, 3)], "uniform"):
                assert not torch.equal(model(ids).logits, once)
            assert torch.equal(model(ids).logits, once)
        assert torch.equal(model(ids).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with HeadAblation(model, HEADS) as ablation, pytest.raises(RuntimeError, match="open already"):
        ablation.__enter__()


def test_a_family_that_is_not_known_by_a_name_of_its_projection():
    model = make()
    model.config.model_type = "strange"
    with pytest.raises(UserError, match="not known where a 'strange' model keeps"):
        HeadAblation(model, HEADS)
    with pytest.raises(UserError, match="No module of LlamaForCausalLM is called"):
        HeadAblation(model, HEADS, output="layers.{layer}.projection")
    ids = INPUTS["input_ids"]
    by_name = HeadAblation(model, HEADS, output="model.layers.{layer}.self_attn.o_proj")
    with torch.no_grad():
        with by_name:
            found = model(ids).logits
        with HeadAblation(model, HEADS, like="llama"):
            assert torch.equal(found, model(ids).logits)
    with pytest.raises(UserError, match="queries of layer 0 cannot be found"):
        HeadAblation(model, HEADS, "uniform", output="model.layers.{layer}.self_attn.o_proj")


def test_all_heads():
    assert all_heads(make()) == [(layer, head) for layer in range(2) for head in range(4)]
