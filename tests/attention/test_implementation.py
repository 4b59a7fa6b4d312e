"""Canaries: what attention functions of ours use of transformers though it does not promise it."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils

import modelwright.attention.prflash
import modelwright.attention.rope_alibi  # noqa: F401
from modelwright.models.tiny import tiny_model

NAMES = ("prob_flash", "rope_alibi_harmonic")


def test_a_name_with_flash_in_it_is_not_imported_as_a_kernel():
    assert modeling_utils.is_flash_attention_requested(requested_attention_implementation="prob_flash")
    assert hasattr(modeling_utils.lazy_import_flash_attention, "modelwright")
    assert modeling_utils.lazy_import_flash_attention("prob_flash") is None


def test_both_are_attentions_with_masks():
    for name in NAMES:
        assert name in AttentionInterface().valid_keys()
        assert name in AttentionMaskInterface().valid_keys()
        model = tiny_model("llama")
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert model(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_modules_of_attention_read_the_config_that_the_model_holds():
    model = tiny_model("llama")
    holders = [module for module in model.modules() if module.__dict__.get("config") is model.config]
    assert {type(module).__name__ for module in holders} >= {"LlamaForCausalLM", "LlamaModel", "LlamaAttention"}
