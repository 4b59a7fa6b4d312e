"""Canaries: what STRING uses of torch and transformers though they do not promise it. A failure says what moved."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modelwright.attention.string.hook import Hook
from modelwright.models.tiny import tiny_model


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"],
        ),
        (
            "_flash_attention_forward",
            [
                "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
                "return_debug_mask", "scale", "window_size_left", "window_size_right",
            ],
        ),
        (
            "_scaled_dot_product_cudnn_attention",
            [
                "query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal",
                "return_debug_mask", "scale",
            ],
        ),
    ],
)  # fmt: skip
def test_fused_kernels_of_torch(name, taken):
    schema = getattr(torch.ops.aten, name).default._schema
    assert [argument.name for argument in schema.arguments][: len(taken)] == taken
    assert [str(result.type) for result in schema.returns[:2]] == ["Tensor", "Tensor"]


def test_the_cpu_kernel_returns_natural_logarithms_and_is_causal_from_the_first_key():
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=0.3)
    scores = (0.3 * query @ key.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(out, scores.softmax(-1) @ value, rtol=0, atol=1e-12)


def test_registries_of_transformers():
    for registry in (AttentionInterface, AttentionMaskInterface):
        assert isinstance(registry._global_mapping, dict)
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS
    assert "sdpa" in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    assert callable(masking_utils.causal_mask_function)
    model = tiny_model("llama")
    assert model.config._attn_implementation == model.config._attn_implementation_internal == "sdpa"
    assert model.model.layers[0].self_attn.config is model.config


@torch.no_grad()
def test_what_attention_and_mask_functions_are_given(monkeypatch):
    """By keyword for masks; rotated queries, the cache's keys, and position_ids for attention."""
    from modelwright.attention.string import StringConfig, apply_string

    masks, calls = [], []
    mask, attention = Hook.mask, Hook.attention

    def spy_mask(self, *args, **kwargs):
        masks.append((args, kwargs))
        return mask(self, *args, **kwargs)

    def spy_attention(self, module, *args, **kwargs):
        calls.append((module, args, kwargs))
        return attention(self, module, *args, **kwargs)

    monkeypatch.setattr(Hook, "mask", spy_mask)
    monkeypatch.setattr(Hook, "attention", spy_attention)
    model = tiny_model("llama", max_position_embeddings=96)
    with apply_string(model, StringConfig(shift=30, window=7)):
        masks.clear()
        calls.clear()
        model(torch.arange(3, 60)[None])
    assert len(masks) == 1
    args, kwargs = masks[0]
    assert args == ()
    assert kwargs["mask_function"] is masking_utils.causal_mask_function
    assert (kwargs["q_length"], kwargs["kv_length"], int(kwargs["q_offset"]), int(kwargs["kv_offset"])) == (
        57,
        57,
        0,
        0,
    )
    module, (query, key, value, given), kwargs = calls[0]
    assert module.layer_idx == 0
    assert query.shape[2] == key.shape[2] == value.shape[2] == 57
    assert given.shape == (1, 1)
    assert kwargs["position_ids"].shape == (1, 57)
    assert kwargs["scaling"] == query.shape[-1] ** -0.5
