"""Conversion of trained checkpoints, in Python and by the verb."""

import json
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from architectures.resformer.small_models import SIZES, llama, tokens
from modelwright.architectures.resformer.convert import convert_to_resformer, convert_to_svformer
from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.verbs.convert import Convert

IDS = tokens()


def source(family: str, **overrides):
    torch.manual_seed(0)
    settings = {**SIZES, **overrides}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings)).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**{"sliding_window": None, **settings})).eval()
    model = Qwen2ForCausalLM(Qwen2Config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("mode", ["learnable", "constant", "none"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_default_start_computes_what_the_checkpoint_did(family, mode, tied, tmp_path):
    model = source(family, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = convert_to_resformer(model, mode=mode)
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert ours.config.rope_parameters["rope_theta"] == 5e5
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)
    # The source is untouched, and shares no memory.
    with torch.no_grad():
        ours.model.layers[0].mlp.up_proj.weight.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.abs().sum() > 0


def test_continued_training_moves_the_coefficients():
    ours = convert_to_resformer(source("llama")).train()
    ours(IDS, labels=IDS).loss.backward()
    assert ours.model.value_residual.lambda_first_bias.grad.abs().sum() > 0


def test_other_starts_warn_that_they_need_training():
    model = source("llama")
    with pytest.warns(UserWarning, match=r"other than \(0, 1\)"):
        ours = convert_to_resformer(model, mode="identity")
    assert not torch.allclose(ours(IDS).logits, model(IDS).logits, atol=1e-2)
    with pytest.warns(UserWarning, match="value projections of 3 layers"):
        small = convert_to_svformer(model)
    assert small.num_parameters() < model.num_parameters()
    with pytest.warns(UserWarning, match="2 layers"):
        assert convert_to_svformer(model, value_anchors=[0, 2]).config.value_layers == (0, 2)
    with pytest.raises(UserError, match="Layer 0 must be"):
        convert_to_svformer(model, value_anchors=[])


@pytest.mark.parametrize("mode", ["learnable", "constant"])
def test_a_bfloat16_checkpoint_keeps_its_rotary_frequencies_in_float32(mode, tmp_path):
    """As a cast of the whole model would not: at position 100 that already shows."""
    source("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = convert_to_resformer(model, mode=mode)
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = tokens(2, 100)
    assert torch.equal(ours(ids).logits, model(ids).logits)


def test_dtype_and_generation_settings_stay():
    model = source("llama").to(torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    ours = convert_to_resformer(model)
    assert ours.dtype == torch.bfloat16
    assert ours.model.value_residual.lambda_first_bias.dtype == torch.float32
    assert ours.generation_config.max_new_tokens == 7
    ours.generation_config.max_new_tokens = 8
    assert model.generation_config.max_new_tokens == 7


def test_models_that_do_not_fit_are_refused():
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1))
    with pytest.raises(UserError, match="'gpt2' model cannot be converted"):
        convert_to_resformer(gpt)
    with pytest.raises(UserError, match="sliding window"):
        convert_to_resformer(source("mistral", sliding_window=4))
    with pytest.raises(UserError, match="sliding window"):
        convert_to_resformer(source("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1))
    with pytest.raises(UserError, match="mode"):
        convert_to_resformer(llama(), mode="lernable")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(source("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="merge"):
        convert_to_resformer(adapted.base_model.model)


def test_the_verb_writes_a_model_folder(tmp_path):
    source("llama").save_pretrained(tmp_path / "llama")
    verb = Convert(
        architecture="resformer",
        model=str(tmp_path / "llama"),
        output=tmp_path / "out",
        set={"mode": "constant", "lambda_first": "0.25", "layers": "[1, 2]"},
    )
    result = verb.run(Silent())
    json.dumps(result)
    assert result["architecture"] == "resformer"
    assert "train it before use" in result["warnings"][0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.value_residual.coefficients == (0.25, 1.0)
    assert model.config.mixing_layers == (1, 2)
    with pytest.raises(UserError, match="exists already"):
        verb.run(Silent())
    small = Convert(architecture="svformer", model=str(tmp_path / "llama"), output=tmp_path / "small").run(Silent())
    assert small["parameters"] < small["parameters_before"]


def test_the_verb_names_mistakes(tmp_path):
    source("llama").save_pretrained(tmp_path / "llama")

    def convert(architecture="resformer", **settings):
        Convert(architecture=architecture, model=str(tmp_path / "llama"), output=tmp_path / "out", set=settings).run(
            Silent()
        )

    with pytest.raises(UserError, match="did you mean 'resformer'"):
        convert("resformr")
    with pytest.raises(UserError, match="did you mean 'mode'"):
        convert(mod="identity")
    with pytest.raises(UserError, match="layer 9"):
        convert(layers="[9]")
    assert not (tmp_path / "out").exists()
