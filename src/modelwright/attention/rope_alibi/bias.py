"""The slopes and distances of the two readings."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch

Slopes = Literal["harmonic", "geometric"]
Distance = Literal["linear", "harmonic"]


def head_slopes(kind: Slopes, heads: int, first: float = 0.25) -> torch.Tensor:
    """Returns (heads,) float32: the slope m of each query head.

    Args:
        kind: ``harmonic``: first / h for h = 1 … heads. ``geometric``: ALiBi's 2^(-8h/heads); where the number of heads
            is no power of two, those of the power below and then every other one of the power above, as ALiBi does.
        heads: Query heads.
        first: The first slope, for ``harmonic``.
    """
    if kind == "harmonic":
        return first / torch.arange(1, heads + 1, dtype=torch.float32)

    def of(power: int) -> list[float]:
        return [2.0 ** (-8 * h / power) for h in range(1, power + 1)]

    below = 2 ** math.floor(math.log2(heads))
    return torch.tensor([*of(below), *of(2 * below)[0::2][: heads - below]], dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def _harmonic_numbers(length: int) -> torch.Tensor:
    steps = torch.arange(1, length, dtype=torch.float64)
    return torch.cat((torch.zeros(1, dtype=torch.float64), (1 / steps).cumsum(0))).float()


def harmonic_numbers(length: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns (at least length,) float32: 1 + 1/2 + … + 1/n for n = 0, 1, …; summed in float64."""
    return _harmonic_numbers(2 ** max(10, math.ceil(math.log2(max(length, 1))))).to(device)


def penalty(distance: torch.Tensor, kind: Distance) -> torch.Tensor:
    """Returns b of whole distances, float32 of the same shape; 0 for negative ones (hidden keys)."""
    distance = distance.clamp(min=0)
    if kind == "linear":
        return distance.float()
    longest = int(distance.max()) + 1 if distance.numel() else 1
    return harmonic_numbers(longest, distance.device)[distance.long()]
