"""Random draws: numbers fetched many at a time, and tokens drawn where their laws are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modelwright.errors import UserError

#: Gives numbers in [0, 1).
Uniform = Callable[[], float]


class Uniforms:
    """Numbers in [0, 1) of 53 random bits, fetched many at a time.

    A number from an accelerator's generator waits for all work before it. Without a generator the numbers come from
    torch's own on the CPU, which ``torch.manual_seed`` sets as well.

    Args:
        generator: Source of randomness; None for torch's own.
        at_once: How many are fetched at a time.
    """

    def __init__(self, generator: torch.Generator | None = None, at_once: int = 64) -> None:
        self.generator, self.at_once = generator, at_once
        self.held: list[float] = []

    def __call__(self) -> float:
        """Returns the next number."""
        if not self.held:
            device = "cpu" if self.generator is None else self.generator.device
            drawn = torch.rand(self.at_once, dtype=torch.float64, generator=self.generator, device=device)
            self.held = drawn.tolist()[::-1]
        return self.held.pop()


def draw_rows(weights: Tensor, points: Tensor) -> Tensor:
    """Draws an index per row, in proportion to its weights; one of weight 0 never comes. Waits for no device.

    Args:
        weights: Non-negative float64 weights ``(rows, V)``, not all 0 in a row.
        points: A number in [0, 1) per row, ``(rows,)`` float64.

    Returns:
        Indices ``(rows,)`` int64; V where weights are not numbers.
    """
    sums = weights.cumsum(-1)
    # A number of 53 bits below 1, times the total, is rounded to what is below the total.
    return torch.searchsorted(sums, points[:, None] * sums[:, -1:], right=True)[:, 0]


def draw(weights: Tensor, uniform: Uniform) -> int:
    """Returns an index, drawn in proportion to non-negative float64 weights ``(V,)``; one of weight 0 never comes.

    Raises:
        UserError: A weight is not a number.
    """
    sums = weights.cumsum(0)
    index = int(torch.searchsorted(sums, uniform() * sums[-1:], right=True))
    if index >= len(weights):
        raise UserError("The model's scores of the next token are not numbers: try another dtype.")
    return index
