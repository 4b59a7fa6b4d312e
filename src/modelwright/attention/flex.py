"""torch's flex_attention, compiled, as transformers compiles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def usable(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the compiled kernel is worth calling: on a GPU, for several queries, for heads of at least 16."""
    return query.is_cuda and query.shape[2] > 1 and not dropout and min(query.shape[-1], value.shape[-1]) >= 16


def compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None,
    block_mask: Any,
    scaling: float,
) -> torch.Tensor:
    """Attends; (batch, heads, rows, value size) in the query's dtype. Heads of a group share keys where flex can."""
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    heads = query.shape[1]
    if heads & (heads - 1):  # as transformers does: the kernel packs groups in powers of two
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    # (Its flag for training matters to one old release of torch; to change it compiles anew.)
    found: torch.Tensor = compile_friendly_flex_attention(
        query, key, value, training=True, score_mod=score_mod, block_mask=block_mask, scale=scaling,
        enable_gqa=key.shape[1] < heads,
    )  # fmt: skip
    return found
