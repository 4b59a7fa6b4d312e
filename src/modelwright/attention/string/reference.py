"""STRING's definition, short enough to check by eye; section 4 and figure 4 of the paper.

With ``m`` the query's place and ``n <= m`` the key's, the position that rotary attention sees is::

    p(m, n) = m - n               where m - n <  shift    (near)
    p(m, n) = m - n - shift + w   where m - n >= shift    (far)

Positions of rotary embeddings count by their difference only, so a far score is that of a query that was rotated by
``w - shift`` once more. Keys, values and the cache stay as they are.
"""

from __future__ import annotations

import torch


def string_positions(length: int, shift: int, window: int) -> torch.Tensor:
    """Returns p(m, n) as (length, length) int64; -1 above the diagonal, where nothing is seen."""
    place = torch.arange(length)
    distance = place[:, None] - place
    position = torch.where(distance >= shift, distance - shift + window, distance)
    return position.masked_fill(distance < 0, -1)


def string_attention_reference(
    query: torch.Tensor,
    far_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shift: int,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends by two whole score matrices and one softmax: the specification of the fast paths.

    Args:
        query: (batch, heads, rows, size), rotated at their own positions; they belong to the last ``rows`` keys.
        far_query: The same, rotated by ``window - shift`` positions once more.
        key: (batch, key heads, keys, size), rotated; each serves ``heads / key heads`` neighbouring query heads.
        value: (batch, key heads, keys, value size).
        shift: Distance from which the far query counts.
        scaling: Factor of the scores.
        mask: (batch or 1, heads or 1, rows, keys), true where a key may be seen, in place of the causal rule; or
            (batch or 1, keys), true for real tokens, on top of it.
        softcap: Scores are brought to ``softcap * tanh(score / softcap)``, as Gemma-2 does.

    Returns:
        Outputs (batch, heads, rows, value size) and weights (batch, heads, rows, keys), in the query's dtype; the
        softmax is taken in float32, or float64 for float64 inputs.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - rows, keys, device=query.device)[:, None] - torch.arange(keys, device=query.device)
    scores = torch.where(distance >= shift, far_query @ key.mT, query @ key.mT).to(
        torch.promote_types(query.dtype, torch.float32)
    )
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = distance >= 0
    if mask is not None:
        seen = mask if mask.ndim == 4 else seen & mask[:, None, None, :]
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).to(query.dtype)
    return weights @ value, weights
