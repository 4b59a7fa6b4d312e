"""PrFlashAttention as a masked dense softmax in float64: the definition, for a given choice of blocks."""

from __future__ import annotations

import torch


def prob_flash_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    block: int,
    *,
    scaling: float,
    log_probabilities: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attends causally over the kept blocks.

    Args:
        query: (batch, heads, tokens, size).
        key: (batch, key heads, tokens, size).
        value: (batch, key heads, tokens, value size).
        kept: (heads or 1, blocks, blocks) bool.
        block: Tokens of a block.
        scaling: Factor of the scores.
        log_probabilities: (blocks,) ln pi by distance, which is taken from the scores of kept blocks; None for none.

    Returns:
        Output (batch, heads, tokens, value size), numerator of the same shape, and denominator (batch, heads, tokens,
        1), all float64: output = numerator / denominator.
    """
    query, key, value = query.double(), key.double(), value.double()
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    place = torch.arange(tokens)
    row, column = place[:, None] // block, place[None] // block
    seen = (place[:, None] >= place) & kept[:, row, column]
    scores = query @ key.mT * scaling
    if log_probabilities is not None:
        scores = scores - log_probabilities.double()[(row - column).clamp(min=0)].nan_to_num(neginf=0.0)
    share = scores.exp().masked_fill(~seen, 0.0)
    numerator, denominator = share @ value, share.sum(-1, keepdim=True)
    return numerator / denominator, numerator, denominator
