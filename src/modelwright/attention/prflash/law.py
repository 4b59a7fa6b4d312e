"""Which blocks take part: the laws of participation, and draws from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from modelwright.errors import UserError

Law = Literal["harmonic", "exponential", "linear", "uniform", "table"]
Mode = Literal["shared", "independent"]


@dataclass(frozen=True, kw_only=True)
class Participation:
    """The probability pi of a block by its distance, in blocks, from the diagonal.

    Attributes:
        law: ``harmonic`` 1 / (1 + distance); ``exponential`` exp(-rate distance); ``linear`` max(0, 1 - distance /
            reach); ``uniform`` share, but 1 on the diagonal; ``table`` the numbers given, the last for all beyond.
        rate: For ``exponential``, at least 0.
        reach: For ``linear``, the first distance that never takes part.
        share: For ``uniform``.
        table: For ``table``: begins with 1 and never increases.
    """

    law: Law = "harmonic"
    rate: float = 0.5
    reach: float = 8.0
    share: float = 0.5
    table: tuple[float, ...] = field(default=())

    def check(self) -> None:
        """Raises :class:`UserError` for a law that is no such probability."""
        if self.law == "exponential" and not 0 <= self.rate < float("inf"):
            raise UserError(f"rate is {self.rate}: give a number of at least 0, so that farther blocks are rarer.")
        if self.law == "linear" and not 0 < self.reach < float("inf"):
            raise UserError(f"reach is {self.reach}: give a number of blocks above 0.")
        if self.law == "uniform" and not 0 <= self.share <= 1:
            raise UserError(f"share is {self.share}: give a probability, 0 to 1.")
        if self.law == "table":
            if not self.table:
                raise UserError("The law 'table' needs a table of probabilities, the first of them 1.")
            if self.table[0] != 1:
                raise UserError(
                    f"The table begins with {self.table[0]}: a block on the diagonal must take part, so begin with 1."
                )
            if not all(0 <= p <= 1 for p in self.table):
                raise UserError("The table holds a number that is no probability: give numbers from 0 to 1.")
            if any(b > a for a, b in zip(self.table, self.table[1:])):
                raise UserError("The table increases: a farther block must not be more probable than a nearer one.")

    def probabilities(self, blocks: int) -> torch.Tensor:
        """Returns (blocks,) float64: pi of distances 0, 1, …"""
        distance = torch.arange(blocks, dtype=torch.float64)
        if self.law == "harmonic":
            return 1 / (1 + distance)
        if self.law == "exponential":
            return torch.exp(-self.rate * distance)
        if self.law == "linear":
            return (1 - distance / self.reach).clamp(min=0)
        if self.law == "uniform":
            return torch.where(distance == 0, 1.0, torch.full_like(distance, self.share))
        given = torch.tensor(self.table, dtype=torch.float64)
        return given[distance.long().clamp(max=len(given) - 1)]

    def density(self, blocks: int) -> float:
        """Returns the expected share of the causal blocks of a sequence of so many blocks that take part."""
        pi = self.probabilities(blocks)
        count = blocks - torch.arange(blocks, dtype=torch.float64)
        return float((pi * count).sum() / count.sum())


def block_distances(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns (len(rows), columns) int64 distances of block rows, by number, from block columns."""
    return rows[:, None] - torch.arange(columns)


def draw_blocks(
    probabilities: torch.Tensor,
    rows: torch.Tensor,
    columns: int,
    mode: Mode,
    generator: torch.Generator,
    heads: int = 1,
) -> torch.Tensor:
    """Draws which causal blocks take part.

    Args:
        probabilities: (at least columns,) pi by distance; those of at least 1 are certain.
        rows: (rows,) int64 numbers of the block rows.
        columns: Block columns.
        mode: ``shared``: one draw for each distance, so that every row sees the same distances and the kept blocks,
            gathered, are a lower triangle again. ``independent``: one for each block.
        generator: On the CPU.
        heads: How many draws.

    Returns:
        (heads, rows, columns) bool; the diagonal is always there.
    """
    distance = block_distances(rows, columns)
    causal = distance >= 0
    pi = probabilities.double()
    if mode == "shared":
        kept = torch.rand(heads, len(pi), generator=generator, dtype=torch.float64) < pi
        return kept[:, distance.clamp(min=0)] & causal
    # A whole square is drawn, so that a row's draw does not depend on which other rows are asked for.
    uniform = torch.rand(heads, len(pi), len(pi), generator=generator, dtype=torch.float64)
    return (uniform[:, rows, :columns] < pi[distance.clamp(min=0)]) & causal


def fixed_blocks(distances: tuple[int, ...], rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Returns (1, rows, columns) bool: the blocks at these distances."""
    return torch.isin(block_distances(rows, columns), torch.tensor(distances))[None]
