"""Models from scratch: named architectures, settings that are never silently lost."""

import pytest
import torch

from modelwright import catalog
from modelwright.errors import UserError
from modelwright.models.new import new_config, new_model
from modelwright.models.tiny import byte_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_settings_are_typed_and_the_tokenizer_gives_the_vocabulary():
    config = new_config("llama", {**SMALL, "rms_norm_eps": "1e-5", "tie_word_embeddings": "true"}, byte_tokenizer())
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (259, 0, 1, 2)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)


@pytest.mark.parametrize("key", ["hiden_size", "hidden_sizes"])
def test_a_typing_error_is_not_kept_as_an_attribute(key):
    with pytest.raises(UserError, match=f"no setting '{key}': did you mean 'hidden_size'"):
        new_config("llama", {key: 32})


def test_a_model_that_sees_what_it_should_predict_is_refused():
    with pytest.raises(UserError, match="--set is_decoder=true"):
        new_config("bert")
    assert new_config("bert", {"is_decoder": "true"}).is_decoder
    assert new_config("gpt_neox").model_type == "gpt_neox"  # always causal, whatever its is_decoder says


def test_dotted_settings():
    config = new_config("llama", {"rope_parameters.rope_theta": "5e5"})
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.rope_parameters["rope_type"] == "default"
    with pytest.raises(UserError, match="rope_parameters.rope_tetha.*rope_theta"):
        new_config("llama", {"rope_parameters.rope_tetha": 1})


def test_a_nested_dataclass_fills_in_by_what_is_given():
    config = new_config("resformer", {"value_residual.mode": "constant"})
    assert config.value_residual.coefficients == (2.0, 1.0)


def test_old_rotary_settings_and_other_names_of_a_field_are_known():
    assert new_config("llama", {"rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5
    assert new_config("gpt2", {"hidden_size": 24}).n_embd == 24


def test_bad_values():
    with pytest.raises(UserError, match="settings for llama are not valid.*hidden_size"):
        new_config("llama", {"hidden_size": "wide"})
    with pytest.raises(UserError, match="vocab_size is 100, but the tokenizer has 259"):
        new_config("llama", {"vocab_size": 100}, byte_tokenizer())
    with pytest.raises(UserError):
        new_model(new_config("llama", {**SMALL, "num_attention_heads": 3, "num_key_value_heads": 2, "hidden_size": -1}))


def test_unknown_architecture():
    with pytest.raises(UserError, match="no architecture 'lama': did you mean 'llama'"):
        new_config("lama")
    with pytest.raises(UserError, match="no architecture 't5'"):
        new_config("t5")


def test_the_seed_decides_the_weights_and_leaves_no_trace():
    config = new_config("llama", SMALL, byte_tokenizer())
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    a, b, c = new_model(config, 1), new_model(config, 1), new_model(config, 2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize("name", sorted(catalog.provided("architectures")))
def test_architectures_of_the_catalog(name):
    model = new_model(new_config(name, SMALL, byte_tokenizer()))
    assert model.config.num_hidden_layers == 2
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 259)
    with pytest.raises(UserError, match="did you mean"):
        new_config(name, {"num_hiden_layers": 2})


def test_nested_settings_of_a_catalog_architecture():
    if "resformer" not in catalog.provided("architectures"):
        pytest.skip("no such method here")
    config = new_config("resformer", {**SMALL, "value_residual.mode": "constant", "value_residual.lambda_first": 2.0})
    value = config.value_residual
    read = value.get if isinstance(value, dict) else lambda name: getattr(value, name)
    assert (read("mode"), read("lambda_first")) == ("constant", 2.0)
    with pytest.raises(UserError, match="value_residual.mod"):
        new_config("resformer", {"value_residual.mod": "constant"})
