"""From scores of gates to a selection with exactly as many parameters as asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from modelwright.compression.selections import Block, Layout, Masks
from modelwright.errors import UserError


def check_ratio(ratio: float) -> None:
    """Refuses a share that is no share, or takes nothing out.

    Raises:
        UserError: It is not between 0 and 1, both excluded.
    """
    if not 0 < ratio < 1:
        raise UserError(f"The ratio is the share of the blocks' parameters to keep, between 0 and 1, not {ratio:g}.")


def check_round(blocks: Iterable[Block], round_to: int) -> None:
    """Refuses a multiple that no width can be.

    Raises:
        UserError: It is below 1, or above the width of the residual stream or of an MLP.
    """
    most = min(min(block.hidden, block.middle) for block in blocks)
    if not 1 <= round_to <= most:
        raise UserError(f"Widths cannot be rounded to multiples of {round_to}: give 1 to {most}.")


@dataclass(frozen=True)
class _Unit:
    """Gates of one selection that stay or go together."""

    selection: int
    gates: torch.Tensor
    score: float


def choose(layout: Layout, scores: Sequence[torch.Tensor], ratio: float, round_to: int = 1) -> Masks:
    """Keeps the gates with the highest scores, as many as the parameters allow.

    All gates stand in one order, the best first (ties: in network order). The longest beginning of it that does not
    exceed the target stays; then further gates in the same order, as long as they still fit. The result is at most the
    target, and less than one gate (or ``round_to`` gates) below it.

    Args:
        layout: The gates.
        scores: One (size,) tensor a selection.
        ratio: Share of the blocks' parameters to keep.
        round_to: Widths are multiples of this (except where a whole selection is none): gates of a selection then go
            in their order by ``round_to`` at a time, with their mean as score. Heads are never bundled.

    Raises:
        UserError: The ratio is no share, or ``round_to`` is below 1 or above a width.
    """
    check_ratio(ratio)
    check_round(layout.blocks, round_to)
    units = sorted(_units(layout, scores, round_to), key=lambda unit: -unit.score)  # sorted() is stable
    target = ratio * layout.total

    def widths(count: int) -> list[int]:
        # Counted anew each time: the search below asks only some twenty times.
        found = [0] * len(layout.selections)
        for unit in units[:count]:
            found[unit.selection] += len(unit.gates)
        return found

    low, high = 0, len(units)
    while low < high:  # the largest count that fits
        middle = (low + high + 1) // 2
        if layout.parameters(widths(middle)) <= target:
            low = middle
        else:
            high = middle - 1
    now = widths(low)
    chosen, full = list(units[:low]), set[int]()
    for unit in units[low:]:
        if len(full) == len(layout.selections):
            break
        if unit.selection in full:
            continue
        more = list(now)
        more[unit.selection] += len(unit.gates)
        if layout.parameters(more) <= target:
            now, chosen = more, [*chosen, unit]
        else:
            full.add(unit.selection)  # the next of this selection would cost as much
    kept = [torch.zeros(selection.size, dtype=torch.bool) for selection in layout.selections]
    for unit in chosen:
        kept[unit.selection][unit.gates] = True
    return layout.masks(kept)


def _units(layout: Layout, scores: Sequence[torch.Tensor], round_to: int) -> list[_Unit]:
    found: list[_Unit] = []
    for i, (selection, own) in enumerate(zip(layout.selections, scores, strict=True)):
        values = own.detach().double().cpu()
        if values.shape != (selection.size,) or not values.isfinite().all():
            raise ValueError(f"{selection.name} needs {selection.size} finite scores.")
        order = values.sort(descending=True, stable=True).indices
        if selection.whole:
            order_list = [order[j : j + 1] for j in range(len(order))]
            means = [float("inf"), *values[order[1:]].tolist()]
        else:
            order_list = list(order.split(round_to))
            means = [float(values[gates].mean()) for gates in order_list] if round_to > 1 else values[order].tolist()
        found += [_Unit(i, gates, score) for gates, score in zip(order_list, means, strict=True)]
    return found


def by_rank(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Replaces scores by their rank within their selection, from 0 to 1, so that every selection keeps the same share.

    For scores that cannot be compared from one selection to another, such as norms of matrices of different shape.
    """
    found = []
    for own in scores:
        ranks = torch.empty(len(own), dtype=torch.float64)
        ranks[own.detach().cpu().double().sort(stable=True).indices] = torch.arange(len(own), dtype=torch.float64)
        found.append((ranks + 0.5) / len(own))
    return found
