"""Tiny models, and a slow float64 reference of what they must compute, written apart from the modelling file."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modelwright.architectures.resformer import (
    ResFormerConfig,
    ResFormerForCausalLM,
    SVFormerConfig,
    SVFormerForCausalLM,
    ValueResidualConfig,
)

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large, so that a wrong formula shows in the logits.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

#: Every architecture of the modelling file, by name.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"value_residual": {"mode": "none"}},
    "identity": {},
    "constant": {"value_residual": {"mode": "constant", "lambda_first": 2.0, "lambda_current": 1.0}},
    "constant-general": {"value_residual": {"mode": "constant", "lambda_first": 0.7, "lambda_current": 0.6}},
    "learnable": {"value_residual": {"mode": "learnable"}},
    "learnable-plus": {"value_residual": {"mode": "learnable_plus"}},
    "sparse": {"value_residual": {"mode": "sparse"}},
    "token-gate": {"value_residual": {"mode": "token_gate"}},
    "neutreno": {"value_residual": {"mode": "none"}, "neutreno_lambda": 0.4},
    "neutreno-resformer": {"neutreno_lambda": 0.2},
    "denseformer": {"value_residual": {"mode": "none"}, "denseformer": True},
    "cla2": {"value_residual": {"mode": "none"}, "cla_group_size": 2},
    "cla2-resformer": {"cla_group_size": 2},
    "scale": {"value_residual": {"mode": "none"}, "value_scale": 5**0.5},
    "svformer": {"value_anchors": [0]},
    "svformer-anchors": {"value_anchors": [0, 2]},
    "svformer-cla2": {"value_anchors": [0], "cla_group_size": 2},
}


def build(
    variant: str = "identity",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    perturb: bool = True,
    **overrides: Any,
) -> Any:
    """A model of the variant, in evaluation mode, with every learned coefficient away from its initial value."""
    torch.manual_seed(seed)
    settings = {**SIZES, **VARIANTS[variant], **overrides}
    if variant.startswith("svformer"):
        model = SVFormerForCausalLM(SVFormerConfig(**settings))
    else:
        model = ResFormerForCausalLM(ResFormerConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if perturb and name in model.no_weight_decay():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def llama(seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides})).to(dtype).eval()


def with_weights_of(model: Any, source: Any) -> Any:
    """Copies the weights that both have; the rest stays as it is."""
    model.load_state_dict({k: v for k, v in source.state_dict().items() if k in model.state_dict()}, strict=False)
    return model


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy in the logits' own dtype (transformers' loss rounds to float32)."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def exact_norms(model: Any) -> Any:
    """Replaces Llama's RMSNorm, which computes in float32, so that finite differences in float64 mean something."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def expected_coefficients(model: Any, layer: int) -> tuple[Any, Any]:
    """``(lambda_first, lambda_current)`` of a layer by the formulas of the method's description."""
    config = model.config
    residual: ValueResidualConfig = config.value_residual
    layers = config.num_hidden_layers
    if layer == 0 or residual.mode == "none":
        return 0.0, 1.0
    if residual.mode in ("identity", "constant"):
        return residual.lambda_first, residual.lambda_current
    if residual.mode == "sparse":
        return (residual.lambda_first, residual.lambda_current) if layer >= layers - -(-layers // 3) else (0.0, 1.0)
    learned = model.model.value_residual
    if residual.mode == "learnable":
        return learned.lambda_first_bias[layer - 1], learned.lambda_current_bias[layer - 1]
    assert residual.mode == "learnable_plus"
    weights = torch.exp(learned.theta_bias) / torch.exp(learned.theta_bias).sum()
    return learned.scale_bias[0] * weights[layer - 1], learned.lambda_current_bias[layer - 1]


def reference_logits(
    model: Any, ids: torch.Tensor, *, duplicated_keys: bool = False, detach_first: bool = False
) -> torch.Tensor:
    """Logits by the plain definition: explicit attention matrices, one head at a time.

    Args:
        model: The model whose weights to use.
        ids: ``(batch, tokens)``, no padding.
        duplicated_keys: Identity mode as in the paper's derivation: attention over ``[K_n, K_n]`` and ``[V_n, V_1]``,
            both halves causally masked.
        detach_first: Cut the gradient of ``V_1`` in later layers (a known mistake of a port).
    """
    config = model.config
    decoder = model.model
    batch, length = ids.shape
    width, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    state = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(state, position_ids=torch.arange(length).unsqueeze(0))
    causal = torch.ones(length, length).tril().bool()
    history = [state]
    first = keys = values = None

    def split(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(batch, length, -1, width).transpose(1, 2)

    for index, block in enumerate(decoder.layers):
        attention = block.self_attn
        normed = block.input_layernorm(state)
        query = split(attention.q_proj(normed))
        if attention.k_proj is not None:
            query, keys = apply_rotary_pos_emb(query, split(attention.k_proj(normed)), cos, sin)
        else:
            query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        current = None
        if attention.v_proj is not None:
            current = split(attention.v_proj(normed))
            if index == 0:
                first = current
                source = current.detach() if detach_first else current
            elif config.value_residual.mode == "token_gate":
                gate = torch.sigmoid(attention.value_gate(normed)).transpose(1, 2).unsqueeze(-1)
                current = gate * current + (1 - gate) * source
            elif not duplicated_keys:
                lambda_first, lambda_current = expected_coefficients(model, index)
                current = (lambda_first * source + lambda_current * current) * (config.value_scale if index else 1)
            values = current
        heads = []
        for head in range(config.num_attention_heads):
            key, value = keys[:, head // groups], values[:, head // groups]
            allowed = causal
            if duplicated_keys and index > 0:
                key, value = torch.cat([key, key], 1), torch.cat([value, first[:, head // groups]], 1)
                allowed = torch.cat([causal, causal], 1)
            scores = query[:, head] @ key.transpose(1, 2) / width**0.5
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            output = weights @ value
            if config.neutreno_lambda:
                # (A - lam I) V_n + lam V_1
                shifted = weights - config.neutreno_lambda * torch.eye(length, dtype=weights.dtype)
                output = shifted @ value + config.neutreno_lambda * first[:, head // groups]
            heads.append(output)
        state = state + attention.o_proj(torch.cat(heads, -1))
        state = state + block.mlp(block.post_attention_layernorm(state))
        history.append(state)
        if config.denseformer:
            alpha = decoder.layer_average.alpha_bias[index]
            state = sum(alpha[j] * past for j, past in enumerate(history))
    return model.lm_head(decoder.norm(state))
