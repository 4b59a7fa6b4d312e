"""Attention of a few queries over packed keys and values; the plain definition, which unpacks a chunk at a time.

The kernel beside this file, :mod:`modelwright.kernels.packed_attention_triton`, computes the same without unpacking
anything to memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelwright.kernels.packed import Packed


@dataclass(frozen=True)
class Held:
    """Keys or values as a cache holds them: packed segments from the oldest on, and then tokens as they came.

    Attributes:
        parts: Packed segments.
        rest: (batch, heads, further tokens, size).
    """

    parts: tuple[Packed, ...]
    rest: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of both."""
        return sum(part.tokens for part in self.parts) + self.rest.shape[2]

    def dequantised(self) -> Tensor:
        """Returns all in the dtype of ``rest``, (batch, heads, tokens, size)."""
        if not self.parts:
            return self.rest
        out = self.rest.new_empty(*self.rest.shape[:2], self.tokens, self.rest.shape[3])
        begin = 0
        for part in self.parts:
            for at, chunk in part.chunks():
                out[:, :, begin + at : begin + at + chunk.tokens] = chunk.dequantised()
            begin += part.tokens
        out[:, :, begin:] = self.rest
        return out


def packed_attention(query: Tensor, keys: Held, values: Held, *, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Attends: ``softmax(scaling * query @ keys + mask) @ values``.

    Args:
        query: (batch, heads, rows, size).
        keys: Of (batch, key heads, tokens, size); each key head serves ``heads / key heads`` neighbouring heads.
        values: As ``keys``, of the same tokens.
        scaling: Factor of the scores.
        mask: What a query sees, (batch or 1, heads or 1, rows or 1, tokens): bool, or floats that are added. None: each
            query sees all.

    Returns:
        (batch, heads, rows, size) in the query's dtype. Sums are float32, or float64 if the query is. A query that sees
        nothing of a bool mask gets zeros.
    """
    batch, heads, rows, size = query.shape
    kept = keys.rest.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, kept, heads // kept * rows, size) * scaling
    scores = [grouped @ chunk.dequantised(wide).mT for part in keys.parts for _, chunk in part.chunks()]
    scores.append(grouped @ keys.rest.to(wide).mT)
    weights = _weights(torch.cat(scores, -1), (batch, heads, rows), mask)
    found = weights[..., values.tokens - values.rest.shape[2] :] @ values.rest.to(wide)
    begin = 0
    for part in values.parts:
        for at, chunk in part.chunks():
            found += weights[..., begin + at : begin + at + chunk.tokens] @ chunk.dequantised(wide)
        begin += part.tokens
    return found.view(batch, heads, rows, -1).to(query.dtype)


def _weights(scores: Tensor, shape: Sequence[int], mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    own = scores.view(*shape, scores.shape[-1])
    if mask.dtype == torch.bool:
        # A row that sees nothing would be NaN.
        weights = own.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    else:
        weights = (own + mask).softmax(-1)
    return weights.view(scores.shape)
