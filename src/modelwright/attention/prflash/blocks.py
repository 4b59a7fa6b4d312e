"""Attention over chosen blocks, in torch: what is not chosen is neither loaded nor computed.

Rows of blocks that keep equally many blocks are one call of torch's fused attention over their gathered keys. With one
draw for all rows these are as many calls as there are kept distances. Each block of keys that a row keeps is copied
once for that row, which is the price of gathering: kept blocks times block times size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from modelwright.attention.softmax import attend


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    block: int,
    *,
    scaling: float,
    first: int = 0,
    correction: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attends causally over the kept blocks.

    Args:
        query: (batch, heads, rows, size), at the places ``first``, ``first + 1``, …
        key: (batch, key heads, keys, size), at the places 0, 1, …
        value: (batch, key heads, keys, value size).
        kept: (heads or 1, block rows, block columns) bool, the block rows being those of the queries; every row keeps
            the block that it stands in, and none a later one.
        block: Tokens of a block, of queries and of keys.
        scaling: Factor of the scores.
        first: Place of the first query.
        correction: (block columns,) float, added to the scores of kept blocks by their distance.
        real: (batch, keys) bool, false for padding; a query always sees itself.
        dropout: Share of weights dropped.
        softcap: As in Gemma-2.

    Returns:
        (batch, heads, rows, value size) in the query's dtype.
    """
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    pieces: list[tuple[slice, torch.Tensor, torch.Tensor]] = []  # heads, rows, outputs
    if kept.shape[0] == 1:
        slices = [(slice(0, heads), slice(0, key.shape[1]))]
    else:
        slices = [(slice(h, h + 1), slice(h // groups, h // groups + 1)) for h in range(heads)]
    for number, (own, shared) in enumerate(slices):
        q, k, v = query[:, own], key[:, shared], value[:, shared]
        for rows, columns in _tiles(kept[number], first, query.shape[2], block):
            pieces.append(
                (own, rows, _tile(q, k, v, rows, columns, block, scaling, first, correction, real, dropout, softcap))
            )
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _assembled(pieces, out.shape[2])
    for own, rows, found in pieces:
        out[:, own, rows.flatten().to(out.device)] = found
    return out


def _assembled(pieces: list[tuple[slice, torch.Tensor, torch.Tensor]], rows: int) -> torch.Tensor:
    """Puts outputs in order by one gather, which is cheaper to differentiate than writes in place."""
    by_heads: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for own, places, found in pieces:
        by_heads.setdefault(own.start, []).append((places.flatten(), found))
    outs = []
    for parts in by_heads.values():
        order = torch.cat([places for places, _ in parts]).argsort()
        joined = torch.cat([found for _, found in parts], dim=2)
        outs.append(joined.index_select(2, order.to(joined.device)))
    assert outs[0].shape[2] == rows
    return torch.cat(outs, dim=1)


def _tiles(kept: torch.Tensor, first: int, rows: int, block: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields queries (tiles, length), by number from 0, and the block columns (tiles, kept) that they see."""
    begin = first // block
    groups: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = {}
    for number, columns in enumerate(kept):
        start = max(first, (begin + number) * block)
        stop = min(first + rows, (begin + number + 1) * block)
        chosen = columns.nonzero().flatten()
        groups.setdefault((stop - start, len(chosen)), []).append((start - first, chosen))
    for (length, _), tiles in groups.items():
        starts = torch.tensor([start for start, _ in tiles])
        yield starts[:, None] + torch.arange(length), torch.stack([chosen for _, chosen in tiles])


def _tile(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    block: int,
    scaling: float,
    first: int,
    correction: torch.Tensor | None,
    real: torch.Tensor | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attends for tiles of equal shape: (batch, heads, tiles * length, value size)."""
    device, keys = query.device, key.shape[2]
    rows, columns = rows.to(device), columns.to(device)
    tiles, length = rows.shape
    places = (columns[:, :, None] * block + torch.arange(block, device=device)).flatten(1)  # (tiles, kept * block)
    if tiles == 1:  # a decoding step, or a last block: no key beyond the end is loaded
        places = places[:, places[0] < keys]
    at = rows + first
    seen = places[:, None] <= at[:, :, None]  # keys beyond the end are later than every query
    bias = torch.zeros(seen.shape, dtype=torch.float32, device=device)
    if correction is not None:
        distance = (at[:, :1] // block - places // block)[:, None]
        bias = bias + correction.to(device)[distance.clamp(min=0)]
    lowest = torch.finfo(torch.float32).min
    bias = bias.masked_fill(~seen, lowest)
    places = places.clamp(max=keys - 1)
    batch, _heads, groups = query.shape[0], query.shape[1], query.shape[1] // key.shape[1]
    own_key, own_value = (
        t[:, :, places].flatten(0, 1) for t in (key, value)
    )  # (batch * heads, tiles, kept * block, …)
    # Heads of a group are rows of one call, so that their keys are gathered and read once.
    packed = query[:, :, rows].unflatten(1, (key.shape[1], groups))
    packed = packed.permute(0, 1, 3, 2, 4, 5).flatten(0, 1).flatten(2, 3)
    bias = bias.repeat(1, groups, 1)[None]
    if real is not None:
        hidden = ~real[:, places][:, :, None] & (places[:, None] != at[:, :, None])  # (batch, tiles, length, keys)
        bias = bias.masked_fill(hidden.repeat(1, 1, groups, 1), lowest).repeat_interleave(key.shape[1], 0)
    found, _ = attend(packed, own_key, own_value, bias, scaling=scaling, dropout=dropout, softcap=softcap)
    found = found.unflatten(0, (batch, -1)).unflatten(3, (groups, length)).permute(0, 1, 3, 2, 4, 5)
    return found.flatten(1, 2).flatten(2, 3)
