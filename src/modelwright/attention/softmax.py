"""Softmax attention with numbers added to the scores, by torch's fused kernel where that can."""

from __future__ import annotations

import torch
from torch.nn import functional


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends.

    Args:
        query: (batch, heads, rows, size).
        key: (batch, key heads, keys, size).
        value: (batch, key heads, keys, value size).
        bias: (batch or 1, heads or 1, rows, keys) float32, added to the scores; the lowest number hides a key.
        scaling: Factor of the scores.
        dropout: Share of weights dropped.
        softcap: As in Gemma-2: scores are capped before the bias is added.
        weights: Whether to return them.

    Returns:
        Outputs (batch, heads, rows, value size) in the query's dtype, and weights (batch, heads, rows, keys) or None.
    """
    groups = query.shape[1] // key.shape[1]
    if softcap is None and not weights:
        dtype = query.dtype
        if query.is_cuda:  # its kernels want the bias in the queries' dtype, and a bias of hundreds is no bfloat16
            query, key, value = (t.to(bias.dtype) for t in (query, key, value))
        elif dtype == torch.float64:
            bias = bias.to(dtype)
        if groups > 1 and query.is_cuda:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=key.shape[1] < query.shape[1],
        )
        return out.to(dtype), None
    grouped = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)
    scores = (grouped @ key.mT).unflatten(2, (groups, query.shape[2])).flatten(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    chosen = (scores + bias).softmax(-1).to(query.dtype)
    chosen = functional.dropout(chosen, dropout) if dropout else chosen
    mixed = chosen.unflatten(1, (key.shape[1], groups)).flatten(2, 3) @ value
    return mixed.unflatten(2, (groups, query.shape[2])).flatten(1, 2), chosen if weights else None
