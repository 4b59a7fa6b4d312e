"""The identities that define the method, in float64."""

import pytest
import torch

from architectures.resformer.small_models import (
    SIZES,
    VARIANTS,
    build,
    exact_norms,
    llama,
    loss_of,
    reference_logits,
    tokens,
    with_weights_of,
)

IDS = tokens()


def gradients(model, ids=IDS):
    model.zero_grad()
    loss_of(model(ids, use_cache=False).logits, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_logits_equal_the_plain_definition(variant, kv_heads):
    model = build(variant, num_key_value_heads=kv_heads)
    torch.testing.assert_close(model(IDS).logits, reference_logits(model, IDS), atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", ["constant", "learnable"])
def test_coefficients_zero_and_one_are_a_llama(mode):
    plain = llama()
    # "constant" takes the short way around the mixing; "learnable" goes through it.
    residual = {"mode": mode, "lambda_first": 0.0, "lambda_current": 1.0}
    ours = build("learnable", perturb=False, value_residual=residual)
    with_weights_of(ours, plain)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, atol=1e-12, rtol=0)
    wanted, found = gradients(plain), gradients(ours)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize("pair", [(0.0, 0.5), (1.0, 0.0), (0.0, 0.0), (-1.0, 2.0), (3.0, 1.0)])
@pytest.mark.parametrize("mode", ["constant", "sparse"])
def test_fixed_coefficients_are_used_as_given(mode, pair):
    """The mixing has short ways for some pairs; none may change what is computed."""
    residual = {"mode": mode, "lambda_first": pair[0], "lambda_current": pair[1]}
    model = build("constant", value_residual=residual)
    torch.testing.assert_close(model(IDS).logits, reference_logits(model, IDS), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_identity_mode_is_cross_layer_attention_over_duplicated_keys(kv_heads):
    model = build("identity", num_key_value_heads=kv_heads)
    explicit = reference_logits(model, IDS, duplicated_keys=True)
    torch.testing.assert_close(model(IDS).logits, explicit, atol=1e-10, rtol=0)


def test_one_layer_is_a_llama_whatever_the_variant():
    plain = llama(num_hidden_layers=1)
    for variant in ("identity", "constant", "learnable", "token-gate", "neutreno", "cla2", "svformer", "scale"):
        overrides = {"cla_group_size": 1} if variant == "cla2" else {}
        ours = with_weights_of(build(variant, num_hidden_layers=1, **overrides), plain)
        torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, atol=0, rtol=0, msg=variant)


def test_svformer_is_resformer_with_coefficients_one_and_zero():
    resformer = build("constant", value_residual={"mode": "constant", "lambda_first": 1.0, "lambda_current": 0.0})
    svformer = with_weights_of(build("svformer"), resformer)
    torch.testing.assert_close(svformer(IDS).logits, resformer(IDS).logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("variant", "anchors"), [("svformer", [0]), ("svformer-anchors", [0, 2])])
@pytest.mark.parametrize("bias", [False, True])
def test_svformer_has_value_projections_at_anchors_only(variant, anchors, bias):
    plain, ours = llama(attention_bias=bias), build(variant, attention_bias=bias)
    found = {int(name.split(".")[2]) for name in ours.state_dict() if "v_proj" in name}
    assert found == set(anchors)
    width = SIZES["num_key_value_heads"] * ours.config.head_dim
    saved = (SIZES["num_hidden_layers"] - len(anchors)) * (SIZES["hidden_size"] * width + bias * width)
    assert plain.num_parameters() - ours.num_parameters() == saved


def test_all_layers_as_anchors_are_a_llama():
    plain = llama()
    ours = with_weights_of(build("svformer", value_anchors=[0, 1, 2, 3]), plain)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, atol=1e-12, rtol=0)


def test_the_first_value_projection_learns_from_every_layer():
    model = build("identity")
    name = "model.layers.0.self_attn.v_proj.weight"
    attached = gradients(model)[name]
    model.zero_grad()
    loss_of(reference_logits(model, IDS), IDS).backward()
    torch.testing.assert_close(attached, model.get_parameter(name).grad, atol=1e-10, rtol=0)
    model.zero_grad()
    loss_of(reference_logits(model, IDS, detach_first=True), IDS).backward()
    detached = model.get_parameter(name).grad
    assert (attached - detached).norm() > 0.1 * attached.norm()


@pytest.mark.parametrize("variant", ["identity", "learnable_plus", "token-gate", "neutreno-resformer", "svformer"])
def test_gradients_agree_with_finite_differences(variant):
    model = exact_norms(build(variant.replace("_", "-")))
    names = ["model.layers.0.self_attn.v_proj.weight", *model.no_weight_decay()]
    if variant == "token-gate":
        names += ["model.layers.2.self_attn.value_gate.weight", "model.layers.2.self_attn.value_gate.bias"]
    gradient = gradients(model)
    for name in names:
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        direction /= direction.norm()
        losses = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter.add_(step * direction)
                losses.append(loss_of(model(IDS).logits, IDS))
            parameter.add_(1e-5 * direction)
        slope = (losses[0] - losses[1]) / 2e-5
        torch.testing.assert_close((gradient[name] * direction).sum(), slope, atol=1e-8, rtol=1e-6, msg=name)


def test_neutreno_without_lambda_is_a_llama():
    plain = llama()
    ours = with_weights_of(build("neutreno", neutreno_lambda=0.0), plain)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, atol=0, rtol=0)


def test_denseformer_starts_as_a_llama():
    plain = llama()
    ours = with_weights_of(build("denseformer", perturb=False), plain)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, atol=1e-12, rtol=0)


def test_value_scale_is_a_llama_with_longer_values_after_the_first_layer():
    plain = llama()
    ours = with_weights_of(build("scale"), plain)
    with torch.no_grad():
        for layer in plain.model.layers[1:]:
            layer.self_attn.v_proj.weight.mul_(5**0.5)
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, atol=1e-12, rtol=0)


def test_two_and_one_make_values_the_square_root_of_five_longer_at_the_start():
    """What the scale control stands for: V_1 and V_n are nearly orthogonal at initialisation."""
    torch.manual_seed(0)
    first, current = torch.randn(2, 1000, 64, dtype=torch.float64)
    assert torch.isclose((2 * first + current).norm() / current.norm(), torch.tensor(5**0.5).double(), rtol=0.02)


def test_learnable_modes_start_where_they_say():
    from modelwright.architectures.resformer import ResFormerConfig, ResFormerForCausalLM

    def coefficients(**residual):
        model = ResFormerForCausalLM(ResFormerConfig(**SIZES, value_residual=residual))
        return model.model.value_residual()

    half = torch.full((3, 2), 0.5)
    torch.testing.assert_close(coefficients(mode="learnable"), half, atol=0, rtol=0)
    plus = coefficients(mode="learnable_plus")
    torch.testing.assert_close(plus[:, 0], torch.full((3,), 4 / 3))  # scale 4 (layers) over 3 mixing layers
    torch.testing.assert_close(plus[:, 1], half[:, 1])
    torch.testing.assert_close(coefficients(mode="learnable", layers=[2])[:, 0], torch.tensor([0.5]))
    gated = ResFormerForCausalLM(
        ResFormerConfig(**SIZES, value_residual={"mode": "token_gate", "lambda_first": 0.2, "lambda_current": 0.8})
    )
    gate = gated.model.layers[1].self_attn.value_gate
    torch.testing.assert_close(gate.bias.sigmoid(), torch.full((2,), 0.8))  # the share of the layer's own values


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_functions_agree(attention):
    for variant in ("identity", "svformer", "neutreno", "cla2"):
        model = build(variant, dtype=torch.float32)
        expected = model(IDS).logits
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
