"""The chosen blocks as flex_attention's block mask: one fused kernel that loads nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modelwright.attention.flex import compiled


def flex_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    block: int,
    *,
    scaling: float,
    correction: torch.Tensor | None = None,
    softcap: float | None = None,
    attention: Callable[..., torch.Tensor] = compiled,
) -> torch.Tensor:
    """Attends as :func:`~modelwright.attention.prflash.blocks.block_attention` from place 0 on, without padding.

    Args:
        query: (batch, heads, tokens, size).
        key: (batch, key heads, tokens, size).
        value: (batch, key heads, tokens, value size).
        kept: (heads or 1, blocks, blocks) bool.
        block: Tokens of a block.
        scaling: Factor of the scores.
        correction: (blocks,) float, added to the scores by distance.
        softcap: As in Gemma-2.
        attention: What calls the kernel.
    """
    tokens = query.shape[2]
    block_mask = as_block_mask(kept, block, tokens, query.device)
    added = None if correction is None else correction.to(query.device)

    def change(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if added is not None:
            score = score + added[(q // block - k // block).clamp(min=0)]
        return score

    score_mod = change if softcap is not None or added is not None else None
    return attention(query, key, value, score_mod, block_mask, scaling)


def as_block_mask(kept: torch.Tensor, block: int, tokens: int, device: torch.device) -> Any:
    """Returns flex_attention's ``BlockMask`` of (heads or 1, blocks, blocks) kept; only the diagonal is partial."""
    from torch.nn.attention.flex_attention import BlockMask

    off = kept.clone()
    number = torch.arange(kept.shape[1])
    off[:, number, number] = False
    # Kept columns first, in order; what stands after them is not read.
    order = off.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = off.sum(-1).to(torch.int32)
    diagonal = torch.zeros_like(order)
    diagonal[..., 0] = number.to(torch.int32)
    one = torch.ones_like(count)
    ones, diagonals, counts, orders = (t[None].to(device) for t in (one, diagonal, count, order))

    there, several = kept.to(device), kept.shape[0] > 1

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        # The kernel asks for entries of the diagonal only; flex_attention without a kernel asks for all.
        return (q >= k) & there[h if several else h * 0, q // block, k // block]

    return BlockMask.from_kv_blocks(
        ones, diagonals, counts, orders, BLOCK_SIZE=block, mask_mod=seen, seq_lengths=(tokens, tokens)
    )
