"""STRING under any mask, with gradients, soft-capped scores or positions of one's own: a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Scores held at a time, over batch and heads. 2**24 float32 numbers are 64 MiB.
SCORES = 2**24


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    to_far: Callable[[torch.Tensor], torch.Tensor],
    shift: int,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    places: tuple[torch.Tensor, torch.Tensor] | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    weights: bool = False,
    scores_at_once: int = SCORES,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends as :func:`~modelwright.attention.string.reference.string_attention_reference`, in chunks of rows.

    A far score is computed only where a row of the chunk is far enough from the key, and a near one likewise, so that
    a decoding step scores every key once. Differentiable.

    Args:
        query: (batch, heads, rows, size), rotated; they belong to the last ``rows`` keys.
        key: (batch, key heads, keys, size), rotated.
        value: (batch, key heads, keys, value size).
        to_far: Turns queries by ``window - shift`` positions.
        shift: Distance from which a key is far.
        scaling: Factor of the scores.
        mask: (batch or 1, keys) bool, true for real tokens, on top of the causal rule; or (batch or 1, heads or 1,
            rows, keys) in its place: bool, or numbers that are added to the scores.
        places: Positions of the queries (batch, rows) and keys (batch, keys) that distances are counted by; by default
            their places in the sequence.
        softcap: As in Gemma-2.
        dropout: Share of weights that are dropped.
        weights: Whether to return them.
        scores_at_once: Scores held at a time.

    Returns:
        Outputs (batch, heads, rows, value size) in the query's dtype, and weights (batch, heads, rows, keys) or None.
    """
    batch, heads, rows, _ = query.shape
    kept, keys = key.shape[1], key.shape[2]
    chunk = rows if weights else max(1, min(rows, scores_at_once // max(1, batch * heads * keys)))
    outputs, kept_weights = [], []
    for start in range(0, rows, chunk):
        stop = min(rows, start + chunk)
        part = query[:, :, start:stop]
        grouped = part.unflatten(1, (kept, heads // kept)).flatten(2, 3)
        last = keys - rows + stop  # keys that the chunk's last row sees by the causal rule
        first_near = max(0, keys - rows + start - shift + 1)  # the first key that is near to the chunk's first row
        first_mixed = min(first_near, max(0, last - shift))
        if places is not None or (mask is not None and mask.ndim == 4):
            last = keys  # a mask of one's own may let a row see later keys
        if places is not None:
            first_near = first_mixed = 0
        last_far = last if places is not None else max(0, keys - rows + stop - shift)
        pieces = []
        far_query = to_far(part).unflatten(1, (kept, heads // kept)).flatten(2, 3) if last_far else grouped
        if first_mixed:
            pieces.append(far_query @ key[:, :, :first_mixed].mT)
        if last_far > first_mixed:
            # Keys that are far to some rows of the chunk and near to others.
            span = slice(first_mixed, last_far)
            far = far_query @ key[:, :, span].mT
            near = grouped @ key[:, :, span].mT
            if places is None:
                row = torch.arange(keys - rows + start, keys - rows + stop, device=query.device)
                is_far = row[:, None] - torch.arange(first_mixed, last_far, device=query.device) >= shift
                is_far = is_far.repeat(heads // kept, 1)
            else:
                is_far = places[0][:, start:stop, None] - places[1][:, None, span] >= shift
                is_far = is_far.repeat(1, heads // kept, 1)[:, None]
            pieces.append(torch.where(is_far, far, near))
        if last > (begin := max(first_mixed, last_far)):
            pieces.append(grouped @ key[:, :, begin:last].mT)
        scores = torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]
        scores = scores.unflatten(2, (heads // kept, stop - start)).flatten(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = _hide(scores, mask, keys - rows + start, start, stop, last)
        chosen = scores.softmax(-1).to(query.dtype)
        if dropout:
            chosen = torch.nn.functional.dropout(chosen, dropout)
        mixed = chosen.unflatten(1, (kept, heads // kept)).flatten(2, 3) @ value[:, :, :last]
        outputs.append(mixed.unflatten(2, (heads // kept, stop - start)).flatten(1, 2))
        if weights:
            kept_weights.append(torch.nn.functional.pad(chosen, (0, keys - last)))
    found = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return found, kept_weights[0] if weights else None


def _hide(
    scores: torch.Tensor, mask: torch.Tensor | None, place: int, start: int, stop: int, last: int
) -> torch.Tensor:
    """Hides what a mask hides from scores (batch, heads, stop - start, last) whose first row is the place's query."""
    lowest = torch.finfo(scores.dtype).min
    if mask is not None and mask.ndim == 4:
        part = mask[:, :, start:stop, :last]
        return scores.masked_fill(~part, lowest) if part.dtype == torch.bool else scores + part.to(scores.dtype)
    if stop - start > 1 or last > place + 1:
        row = torch.arange(place, place + stop - start, device=scores.device)
        seen = torch.arange(last, device=scores.device) <= row[:, None]
        if mask is not None:
            seen = seen & mask[:, None, None, :last]
        return scores.masked_fill(~seen, lowest)
    return scores if mask is None else scores.masked_fill(~mask[:, None, None, :last], lowest)
