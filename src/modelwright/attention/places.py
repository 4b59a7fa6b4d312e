"""Where queries and keys stand, as one small tensor that a mask function hands to an attention function.

transformers makes a mask once for a forward pass and gives it to every layer. A mask says what is seen and not how far
away it is, and it has rows times keys entries. Here the plain causal case is places alone, which are numbers that no
device move or gradient checkpoint loses, and everything else (windows, packed sequences) is a matrix of distances.
The dtype tells both from a mask of the caller's own, which is bool or is added to the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask


def places_mask(**given: Any) -> torch.Tensor:
    """Makes the mask of a forward pass; transformers calls it by keyword.

    Returns:
        Plain causal: (batch or 1, 1, 1, rows + keys) int64, the queries' places and then the keys', counted from the
        first real token; -1 for a key that is padding. (Four dimensions, because ``generate`` makes the masks of a
        static cache itself and hands them in, where two would be taken for padding.) Otherwise: (batch, 1, rows, keys)
        int32 distances, -1 where hidden.
    """
    rows, keys, device = given["q_length"], given["kv_length"], given.get("device")
    query = (torch.arange(rows, device=device) + given.get("q_offset", 0))[None]
    first = given.get("kv_offset", 0)
    key = (torch.arange(keys, device=device) + first)[None]
    if given.get("mask_function") is not causal_mask_function or given.get("local_size") is not None:
        seen = sdpa_mask(**{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        distance = (query[:, :, None] - key[:, None]).clamp(min=0)[:, None]
        return distance.masked_fill(~seen, -1).to(torch.int32)
    real = given.get("attention_mask")
    if real is not None:
        real = real.to(torch.bool)
        left = (real.cumsum(-1) == 0).sum(-1, keepdim=True)
        real = torch.nn.functional.pad(real[:, first : first + keys], (0, max(0, keys - real[:, first:].shape[1])))
        query = query - left
        key = (key - left).masked_fill(~real, -1)
    return torch.cat((query, key), dim=1)[:, None, None]


@dataclass(frozen=True)
class Places:
    """Places of one call's queries and keys.

    Attributes:
        query: (batch or 1, rows) int64; negative for padding on the left.
        key: (batch or 1, keys) int64; negative for padding.
    """

    query: torch.Tensor
    key: torch.Tensor

    @classmethod
    def read(cls, mask: torch.Tensor, rows: int) -> Places:
        """Splits what :func:`places_mask` made for the plain causal case."""
        return cls(mask[:, 0, 0, :rows], mask[:, 0, 0, rows:])

    @staticmethod
    def are(mask: torch.Tensor) -> bool:
        """Whether :func:`places_mask` made a mask for the plain causal case."""
        return mask.dtype == torch.int64

    @classmethod
    def last(cls, rows: int, keys: int, device: torch.device) -> Places:
        """Returns the places of queries that belong to the last keys."""
        place = torch.arange(keys, device=device)[None]
        return cls(place[:, keys - rows :], place)

    def distance(self, start: int, stop: int) -> torch.Tensor:
        """Returns (batch or 1, stop - start, keys) int64 distances of some rows, -1 where a key is hidden."""
        found = self.query[:, start:stop, None] - self.key[:, None]
        return found.masked_fill((found < 0) | (self.key[:, None] < 0), -1)

    @property
    def plain(self) -> bool:
        """Whether one sequence's places serve the whole batch, and no padding stands before a real key."""
        if self.query.shape[0] > 1:
            return False
        real = self.key >= 0
        return bool(real[:, 0].all()) and not bool((real[:, 1:] & ~real[:, :-1]).any())
