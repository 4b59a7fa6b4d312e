# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Kernels cannot be annotated: Triton looks the names up.
"""Attention of :mod:`modelwright.kernels.packed_attention` as Triton kernels, for CUDA: nothing is unpacked to memory.

A program owns a run of segments of one key head, and all query rows that share that head. It loads a tile of bytes,
takes each of its masks of bits as a tile of keys, and goes on with one running softmax. Scales of keys, which
neighbouring tokens share, are multiplied into the query instead of into the keys. What the programs found is joined by
a second, small kernel. Each number of bits is a launch of its own, and so are the tokens that are not quantised.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelwright.kernels.packed import Packed
from modelwright.kernels.packed_attention import Held
from modelwright.kernels.shifted_attention_triton import Launch, _join_kernel, _multiprocessors, _on, _power, _run

#: Query rows times heads of a group, at most.
MOST_ROWS = 64
#: Programs for each multiprocessor that the oldest segments are shared out to.
PROGRAMS = 2
#: Tokens at a time of those that are not quantised.
REST = 64
_LAUNCH = Launch(0, 0, 4, 3)
_LOG2_E = math.log2(math.e)


def can_attend(query: Tensor, keys: Held, values: Held, mask: Tensor | None = None) -> bool:
    """Whether the kernels take these; they give no gradient, and tiles need powers of two."""
    if torch.is_grad_enabled() and query.requires_grad:
        return False
    size, parts = query.shape[-1], (*keys.parts, *values.parts)
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and query.dtype == keys.rest.dtype == values.rest.dtype
        and 16 <= size <= 256
        and values.rest.shape[-1] == size
        and query.shape[1] // keys.rest.shape[1] * query.shape[2] <= MOST_ROWS
        and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1))
        and all(_power(n) == n >= 16 for part in parts for n in (part.group_size, part.codes.shape[3]))
    )


def packed_attention(
    query: Tensor,
    keys: Held,
    values: Held,
    *,
    scaling: float,
    mask: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attends as :func:`modelwright.kernels.packed_attention.packed_attention` says.

    Args:
        query: (batch, heads, rows, size): float32, bfloat16 or float16; at most 64 rows share a key head.
        keys: Of the same dtype where they are not quantised; groups along tokens.
        values: As ``keys``; groups along channels.
        scaling: Factor of the scores.
        mask: (batch or 1, 1, rows or 1, tokens) bool, or None.
        splits: Programs that share the segments of a number of bits; by default as many as fill the card.

    Returns:
        (batch, heads, rows, size) in the query's dtype; scores and sums are float32.
    """
    batch, heads, rows, size = query.shape
    kept = keys.rest.shape[1]
    shared = heads // kept * rows
    query = query.reshape(batch, kept, shared, size).contiguous()
    seen = query if mask is None else mask.expand(batch, 1, rows, mask.shape[3]).view(torch.uint8)
    steps = (seen.stride(0), seen.stride(2), seen.stride(3)) if mask is not None else (0, 0, 0)
    wide = _INTERPRETED or query.dtype == torch.float32
    cuts = [_cuts(part, batch * kept, splits, query.device) for part in keys.parts]
    number = sum(count for count, _ in cuts) + 1
    rows_of_all = batch * kept * shared
    partial = torch.empty(number, rows_of_all, size, dtype=torch.float32, device=query.device)
    lse = torch.empty(number, rows_of_all, dtype=torch.float32, device=query.device)
    shape = (
        shared, max(16, _power(shared)), size, _power(size), rows, mask is not None, wide,
        "tf32x3" if query.dtype == torch.float32 and not _INTERPRETED else "ieee",
    )  # fmt: skip
    rest_k, rest_v = (rest if rest.is_contiguous() else rest.contiguous() for rest in (keys.rest, values.rest))
    # All that decides how a kernel is compiled, but for its constants; other numbers are not specialised upon.
    known = query.device, query.dtype, keys.rest.dtype, kept
    quick = not _INTERPRETED and mask is None and size % 16 == query.data_ptr() % 16 == 0
    scale, at, before = scaling * _LOG2_E, 0, 0
    with _on(query.device):
        for key, value, (programs, span) in zip(keys.parts, values.parts, cuts, strict=True):
            tensors = key.codes, key.scale, key.minimum, value.codes, value.scale, value.minimum
            constants = (
                key.bits, key.segment_length, key.codes.shape[3], key.group_size,
                min(key.codes.shape[3], key.group_size), *shape,
            )  # fmt: skip
            aligned = quick and all(t.data_ptr() % 16 == 0 for t in tensors)
            _run(
                _part_kernel, (programs, batch * kept, 1),
                (
                    query, *tensors, partial, lse, seen, *steps, kept, key.segments, span, at, rows_of_all, before,
                    scale, *constants,
                ),
                _LAUNCH, (*known, key.scale.dtype, constants) if aligned else None,
            )  # fmt: skip
            at, before = at + programs, before + key.tokens
        aligned = quick and (rest_k.data_ptr() | rest_v.data_ptr()) % 16 == 0
        _run(
            _rest_kernel, (1, batch * kept, 1),
            (
                query, rest_k, rest_v, partial, lse, seen, *steps, kept, rest_k.shape[2], at, rows_of_all, before,
                scale, REST, *shape,
            ),
            _LAUNCH, (*known, shape) if aligned else None,
        )  # fmt: skip
        out = torch.empty_like(query)
        _join_kernel[(rows_of_all,)](
            partial, lse, out, rows_of_all, number, SIZE=size, PADDED=_power(size), SPLITS=_power(number), num_warps=4
        )
    return out.view(batch, heads, rows, size)


def _cuts(part: Packed, heads: int, splits: int | None, device: torch.device) -> tuple[int, int]:
    """Returns how many programs share a part's segments, and how many segments each has."""
    wanted = splits or max(1, PROGRAMS * _multiprocessors(device) // heads)
    span = -(-part.segments // min(wanted, part.segments))
    return -(-part.segments // span), span


@triton.jit
def _hidden(scores, seen, s_row, s_token, token, row, row_ok, ROWS: tl.constexpr):
    """Takes out what a mask hides; ``token`` are the numbers of the keys."""
    at = seen + (row % ROWS)[:, None] * s_row + token.to(tl.int64)[None, :] * s_token
    return tl.where(tl.load(at, mask=row_ok[:, None], other=0) != 0, scores, -float("inf"))


@triton.jit
def _softmax(acc, total, highest, scores, v, PRECISION: tl.constexpr):
    """Takes scores (in bits) and values of some keys into the running softmax."""
    new = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(new == -float("inf"), 0.0, new)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(highest - base)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
    return acc, total, new


@triton.jit
def _keep(acc, total, highest, partial, lse, at, d, row_ok, SIZE: tl.constexpr):
    """Stores what a program found, and its log-sum-exp of base 2."""
    some = tl.where(total == 0.0, 1.0, total)
    tl.store(partial + at[:, None] * SIZE + d[None, :], acc / some[:, None], mask=row_ok[:, None] & (d < SIZE)[None, :])
    tl.store(lse + at, tl.where(total == 0.0, -float("inf"), highest + tl.log2(some)), mask=row_ok)


@triton.jit(do_not_specialize=["segments", "span", "first", "count", "before"])
def _part_kernel(
    query,
    k_codes,
    k_scale,
    k_minimum,
    v_codes,
    v_scale,
    v_minimum,
    partial,
    lse,
    seen,
    s_batch,
    s_row,
    s_token,
    kept,
    segments,
    span,
    first,
    count,
    before,
    scale,
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split, both = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, d, j = tl.arange(0, BLOCK), tl.arange(0, PADDED), tl.arange(0, TILE)
    row_ok, d_ok = row < SHARED, d < SIZE
    q = tl.load(
        query + (both * SHARED + row)[:, None] * SIZE + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0
    )
    kind = tl.float32 if WIDE else q.dtype
    q = q.to(tl.float32)
    channels: tl.constexpr = SIZE // GROUP
    acc = tl.zeros((BLOCK, PADDED), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    highest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    own = seen + (both // kept) * s_batch
    for segment in range(split * span, tl.minimum((split + 1) * span, segments)):
        here = both * segments + segment
        for tile in tl.static_range(STORED // TILE):
            byte = here * STORED + tile * TILE + j
            k_byte = tl.load(k_codes + byte[None, :] * SIZE + d[:, None], mask=d_ok[:, None], other=0).to(tl.int32)
            v_byte = tl.load(v_codes + byte[:, None] * SIZE + d[None, :], mask=d_ok[None, :], other=0).to(tl.int32)
            for run in tl.static_range(8 // BITS):
                # These tokens of the segment, all of one group of keys.
                token = run * STORED + tile * TILE
                group = here * (LENGTH // GROUP) + token // GROUP
                k_step = tl.load(k_scale + group * SIZE + d, mask=d_ok, other=0.0).to(tl.float32)
                k_least = tl.load(k_minimum + group * SIZE + d, mask=d_ok, other=0.0).to(tl.float32)
                k = ((k_byte >> (run * BITS)) & ((1 << BITS) - 1)).to(kind)
                scores = tl.dot((q * k_step[None, :]).to(kind), k, input_precision=PRECISION)
                scores = (scores + tl.sum(q * k_least[None, :], 1)[:, None]) * scale
                if MASKED:
                    scores = _hidden(
                        scores, own, s_row, s_token, before + segment * LENGTH + token + j, row, row_ok, ROWS
                    )
                at = (here * LENGTH + token + j)[:, None] * channels + (d // GROUP)[None, :]
                v_step = tl.load(v_scale + at, mask=d_ok[None, :], other=0.0).to(tl.float32)
                v_least = tl.load(v_minimum + at, mask=d_ok[None, :], other=0.0).to(tl.float32)
                v = ((v_byte >> (run * BITS)) & ((1 << BITS) - 1)).to(tl.float32) * v_step + v_least
                acc, total, highest = _softmax(acc, total, highest, scores, v.to(kind), PRECISION)
    at = (first + split).to(tl.int64) * count + both * SHARED + row
    _keep(acc, total, highest, partial, lse, at, d, row_ok, SIZE)


@triton.jit(do_not_specialize=["tokens", "first", "count", "before"])
def _rest_kernel(
    query,
    key,
    value,
    partial,
    lse,
    seen,
    s_batch,
    s_row,
    s_token,
    kept,
    tokens,
    first,
    count,
    before,
    scale,
    TILE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    both = tl.program_id(1).to(tl.int64)
    row, d, j = tl.arange(0, BLOCK), tl.arange(0, PADDED), tl.arange(0, TILE)
    row_ok, d_ok = row < SHARED, d < SIZE
    q = tl.load(
        query + (both * SHARED + row)[:, None] * SIZE + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0
    )
    kind = tl.float32 if WIDE else q.dtype
    acc = tl.zeros((BLOCK, PADDED), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    highest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    for start in range(0, tokens, TILE):
        token = start + j
        ok = token < tokens
        far = both * tokens + token
        k = tl.load(key + far[None, :] * SIZE + d[:, None], mask=ok[None, :] & d_ok[:, None], other=0.0).to(kind)
        v = tl.load(value + far[:, None] * SIZE + d[None, :], mask=ok[:, None] & d_ok[None, :], other=0.0).to(kind)
        scores = tl.dot(q.to(kind), k, input_precision=PRECISION) * scale
        if MASKED:
            scores = _hidden(
                scores,
                seen + (both // kept) * s_batch,
                s_row,
                s_token,
                before + tl.minimum(token, tokens - 1),
                row,
                row_ok,
                ROWS,
            )
        scores = tl.where(ok[None, :], scores, -float("inf"))
        acc, total, highest = _softmax(acc, total, highest, scores, v, PRECISION)
    _keep(acc, total, highest, partial, lse, first.to(tl.int64) * count + both * SHARED + row, d, row_ok, SIZE)


_INTERPRETED = not isinstance(_part_kernel, triton.runtime.JITFunction)
