"""Settings: defaults, round trips through config.json, and mistakes that are named."""

import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from architectures.resformer.small_models import SIZES, VARIANTS, build, tokens
from modelwright.architectures.resformer import (
    ResFormerConfig,
    ResFormerForCausalLM,
    SVFormerConfig,
    SVFormerForCausalLM,
    ValueResidualConfig,
)
from modelwright.errors import UserError


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_gives_the_same_model(variant, tied, tmp_path):
    ids = tokens()
    model = build(variant, dtype=torch.float32, tie_word_embeddings=tied, attention_bias=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert config.value_residual == model.config.value_residual
    assert isinstance(config.value_residual, ValueResidualConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    decoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_config_json_is_plain_data(tmp_path):
    residual = ValueResidualConfig(mode="sparse", layers=[3, 1])
    config = ResFormerConfig(**SIZES, value_residual=residual)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    wanted = {"mode": "sparse", "lambda_first": 5.0, "lambda_current": 1.0, "layers": [1, 3]}
    assert stored["value_residual"] == wanted
    assert stored["model_type"] == "resformer"
    assert ResFormerConfig.from_pretrained(tmp_path).value_residual == residual
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert ResFormerConfig(**SIZES).to_dict() != config.to_dict()


def test_from_config_in_bfloat16_keeps_the_coefficients_in_float32():
    config = ResFormerConfig(**SIZES, value_residual={"mode": "learnable"}, denseformer=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == model.no_weight_decay()
    assert len(kept) == 3


def test_a_checkpoint_without_coefficients_gets_the_initial_ones(tmp_path):
    """A plain Llama's weights under a ResFormer config: what is missing is initialised, not left as garbage."""
    settings = {**SIZES, "value_residual": {"mode": "none"}}
    ResFormerForCausalLM(ResFormerConfig(**settings)).save_pretrained(tmp_path)
    config = ResFormerConfig(**{**settings, "value_residual": {"mode": "learnable_plus"}, "denseformer": True})
    model = ResFormerForCausalLM.from_pretrained(tmp_path, config=config)
    torch.testing.assert_close(model.model.value_residual()[:, 0], torch.full((3,), 4 / 3))
    torch.testing.assert_close(model.model.layer_average.alpha_bias[:, 1:], torch.eye(4))


def test_default_layers():
    def layers(count=8, **residual):
        return ResFormerConfig(**{**SIZES, "num_hidden_layers": count}, value_residual=residual).mixing_layers

    assert layers() == tuple(range(1, 8))
    assert layers(mode="none") == ()
    assert layers(mode="sparse") == (5, 6, 7)
    assert layers(mode="sparse", count=1) == ()
    assert layers(mode="constant", layers=[2, 4]) == (2, 4)
    assert ResFormerConfig(**SIZES, cla_group_size=2).mixing_layers == (2,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_residual": {"mode": "identiti"}}, "did you mean 'identity'"),
        ({"value_residual": {"lamda_first": 2.0}}, "did you mean 'lambda_first'"),
        ({"value_residual": {"layers": [0]}}, "layer 0"),
        ({"value_residual": {"layers": [4]}}, r"one of \[1, 2, 3\]"),
        ({"value_residual": {"layers": [-1]}}, "layer -1"),
        ({"value_residual": {"layers": 3}}, "list of whole numbers"),
        ({"value_residual": {"layers": "1,2"}}, "list of whole numbers"),
        ({"value_residual": {"layers": [1.5]}}, "list of whole numbers"),
        ({"value_residual": "constant"}, "mapping of its settings"),
        ({"value_residual": {"mode": "constant", "lambda_first": "two"}}, "lambda_first must be a number"),
        ({"value_scale": float("nan")}, "finite"),
        ({"num_key_value_heads": 3}, r"multiple of num_key_value_heads \(3\)"),
        ({"sliding_window": 8}, "no sliding windows"),
        ({"layer_types": ["sliding_attention"] * 4}, "no sliding windows"),
        ({"value_residual": {"mode": "identity", "lambda_first": 2.0}}, "choose mode 'constant'"),
        ({"value_residual": {"mode": "token_gate", "lambda_first": 2.0}}, "add up to 1"),
        ({"value_residual": {"mode": "learnable_plus", "lambda_first": 2.0}}, "no lambda_first"),
        ({"value_residual": {"mode": "constant", "lambda_first": float("nan")}}, "finite"),
        ({"value_residual": {"mode": "learnable_plus"}, "num_hidden_layers": 1}, "learnable_plus"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"cla_group_size": 5}, "cla_group_size"),
        ({"cla_group_size": 2, "neutreno_lambda": 0.4}, "NeuTRENO"),
        ({"per_layer_config": {1: {"num_key_value_heads": 4}}}, r"widths of the values: \[16, 32\]"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        ResFormerConfig(**{**SIZES, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_anchors": [0, 4]}, "anchor 4"),
        ({"value_anchors": [1]}, "Layer 0 must be"),
        ({"value_anchors": []}, "Layer 0 must be"),
        ({"value_anchors": 0}, "list of whole numbers"),
        ({"value_anchors": [0, 1], "cla_group_size": 2}, "anchor 1"),
        ({"value_residual": {"mode": "identity"}}, "no values of their own"),
        ({"neutreno_lambda": 0.4}, "no values of their own"),
    ],
)
def test_svformer_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        SVFormerConfig(**{**SIZES, **settings})


def test_an_edited_config_is_checked_again_by_the_model():
    config = ResFormerConfig(**SIZES, value_residual={"mode": "constant", "layers": [3]})
    config.num_hidden_layers = 2
    with pytest.raises(UserError, match="layer 3"):
        ResFormerForCausalLM(config)
    anchors = SVFormerConfig(**SIZES, value_anchors=[0, 3])
    anchors.num_hidden_layers = 2
    with pytest.raises(UserError, match="anchor 3"):
        SVFormerForCausalLM(anchors)


def test_values_of_another_width_are_refused_with_their_shapes():
    model = build("identity")
    model.model.layers[2].self_attn.v_proj = torch.nn.Linear(32, 8, bias=False, dtype=torch.float64)
    with pytest.raises(UserError, match=r"Layer 2 .*\(2, 11, 8\).*\(2, 11, 16\)"):
        model(tokens())
