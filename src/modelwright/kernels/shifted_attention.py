"""Causal attention whose far keys meet a query that was turned once more; the plain definition.

The kernels beside this file, :mod:`modelwright.kernels.shifted_attention_triton`, compute the same in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Turn(NamedTuple):
    """A rotation of some pairs of features by angles of their own, however the pairs are laid out.

    Feature i becomes ``cos[i] * x[i] + sin[i] * x[partner[i]]``.

    Attributes:
        cos: (size,), 1 for features that do not turn.
        sin: (size,), with the sign of the feature's side of the pair; 0 for features that do not turn.
        partner: (size,) int32.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Turns ``x`` (..., size); the products are taken in the tables' dtype, or wider."""
        wide = torch.promote_types(x.dtype, self.cos.dtype)
        turned = torch.addcmul(x.to(wide) * self.cos, x.index_select(-1, self.partner).to(wide), self.sin.to(wide))
        return turned.to(x.dtype)


def shifted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turn: Turn,
    shift: int,
    *,
    scaling: float,
    lefts: Sequence[int] | None = None,
) -> Tensor:
    """Attends causally: keys nearer than ``shift`` with the query, the others with the turned query; one softmax.

    Args:
        query: (batch, heads, rows, size); they belong to the last ``rows`` keys.
        key: (batch, key heads, keys, size); each serves ``heads / key heads`` neighbouring query heads.
        value: (batch, key heads, keys, size).
        turn: What turns far queries.
        shift: Distance from which a key is far, in keys.
        scaling: Factor of the scores, above 0.
        lefts: Keys that are hidden at the beginning of each row of the batch, as padding; none by default.

    Returns:
        (batch, heads, rows, size) in the query's dtype; 0 for rows that see nothing.
    """
    groups, rows, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    place = torch.arange(keys, device=query.device)
    distance = place[keys - rows :, None] - place
    scores = torch.where(distance >= shift, turn.of(query) @ key.mT, query @ key.mT)
    seen = (distance >= 0).expand(query.shape[0], 1, rows, keys)
    if lefts is not None:
        seen = seen & (place >= torch.tensor(lefts, device=query.device)[:, None])[:, None, None]
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights.to(query.dtype) @ value
