"""The attention function ``staircase``: reads packed states as they are, also of padded prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modelwright.attention.saq.stored import StoredStates, attend

#: For ``attn_implementation`` and ``model.set_attn_implementation``.
NAME = "staircase"


def staircase_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends to packed states where a few queries read them, and else as transformers' ``sdpa`` does.

    Args:
        module: The layer's attention.
        query: (batch, heads, rows, size).
        key: (batch, key heads, tokens, size); :class:`~modelwright.attention.saq.stored.StoredStates` are read packed.
        value: As ``key``.
        attention_mask: None: all is seen, or, with as many queries as keys, what came before; else as in ``sdpa``.
        dropout: Share of weights dropped.
        scaling: Factor of the scores; by default one over the root of the size.
        **kwargs: For ``sdpa``.

    Returns:
        (batch, rows, heads, size), and None for weights.
    """
    plain = not dropout and kwargs.get("softcap") is None and kwargs.get("position_bias") is None
    # Without a mask several queries would be causal among themselves.
    seen = attention_mask is not None or query.shape[2] == 1
    if isinstance(key, StoredStates) and isinstance(value, StoredStates) and plain and seen:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found = attend(query, key, value, mask=attention_mask, scaling=scale)
        if found is not None:
            return found.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, staircase_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
