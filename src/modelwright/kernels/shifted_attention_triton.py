# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Kernels cannot be annotated: Triton looks the names up.
"""Attention of :mod:`modelwright.kernels.shifted_attention` as Triton kernels, for CUDA: one pass, no merge in memory.

A program owns a block of query rows, and of every row all heads that share a key head, so that keys and values are read
once for them. It goes over its keys once: those that are far to all its rows, the few that are far to some and near to
others (only these are scored twice), those that are near to all, and the diagonal. The far query is made from the query
as it is loaded. A call of few rows, as in decoding, is cut along the keys as well, and what the cuts found is joined by
a second, small kernel. Rows of the batch may be padded on the left.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelwright.errors import UserError
from modelwright.kernels.shifted_attention import Turn


class Launch(NamedTuple):
    """How the kernel is cut.

    Attributes:
        rows: Query rows times heads of a group that a program owns, at most.
        keys: Keys at a time.
        warps: Per program.
        stages: Of the pipelined loop over keys.
    """

    rows: int
    keys: int
    warps: int
    stages: int


#: By the padded size of a head: for many rows, and for the few of a decoding step.
MANY = {64: Launch(128, 64, 4, 3), 128: Launch(128, 64, 8, 3), 256: Launch(64, 32, 8, 2)}
FEW = {64: Launch(64, 64, 4, 3), 128: Launch(64, 64, 4, 3), 256: Launch(64, 32, 4, 2)}
#: Float32 is held in more memory, and multiplied three times for its accuracy.
FLOAT32 = {64: Launch(64, 32, 4, 2), 128: Launch(64, 32, 8, 2), 256: Launch(32, 16, 4, 1)}
#: Rows times heads of a group up to which a call is cut along its keys.
FEW_ROWS = 64
#: Programs for each multiprocessor that a cut call is to have, and keys that a cut has at least.
PROGRAMS, LEAST_KEYS = 2, 256

_LOG2_E = math.log2(math.e)


def can_shift(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take these tensors; they give no gradient."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and 16 <= query.shape[-1] <= 256
        and value.shape[-1] == query.shape[-1]
    )


def shifted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turn: Turn,
    shift: int,
    *,
    scaling: float,
    lefts: Sequence[int] | None = None,
    launch: Launch | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attends as :func:`modelwright.kernels.shifted_attention.shifted_attention` says.

    Args:
        query: (batch, heads, rows, size), float32, bfloat16 or float16, of at most 256 features.
        key: (batch, key heads, keys, size), same dtype.
        value: (batch, key heads, keys, size), same dtype.
        turn: Float32 tables on the same device.
        shift: Distance from which a key is far.
        scaling: Factor of the scores, above 0.
        lefts: Padding on the left.
        launch: How the kernel is cut; by default by the size.
        splits: Cuts along the keys; by default as many as fill the card when there are few rows, else one.

    Returns:
        (batch, heads, rows, size) in the query's dtype, a view of (batch, rows, heads, size); scores and sums are
        float32.

    Raises:
        UserError: The tensors are not on CUDA, or the scaling is not above 0.
    """
    batch, heads, rows, size = query.shape
    kept, keys = key.shape[1], key.shape[2]
    if query.device.type != "cuda" and not _INTERPRETED:
        raise UserError(f"The kernels of shifted attention run on CUDA, not on {query.device.type}: use the plain one.")
    if not scaling > 0:
        raise UserError(f"scaling is {scaling}: give a number above 0.")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    groups = heads // kept
    padded = max(16, _power(size))
    few = rows * groups <= FEW_ROWS
    wide = query.dtype == torch.float32
    if launch is None:
        launch = (FLOAT32 if wide else FEW if few else MANY)[max(64, padded)]
    block = min(launch.rows, max(16, _power(rows * groups)))
    blocks = _cuts(rows * groups, block)
    if splits is None:
        wanted = PROGRAMS * _multiprocessors(query.device) // (batch * kept * blocks) if few else 1
        splits = max(1, min(wanted, keys // LEAST_KEYS))
    # Each cut begins at a whole block of keys.
    span = _cuts(_cuts(keys, splits), launch.keys) * launch.keys
    splits = _cuts(keys, span)
    out = query.new_empty(batch, rows, heads, size)
    partial, lse = out, out
    if splits > 1:
        partial = query.new_empty((splits, batch, rows, heads, size), dtype=torch.float32)
        lse = query.new_empty((splits, batch, rows, heads), dtype=torch.float32)
    hidden = None if lefts is None or not any(lefts) else torch.tensor(lefts, dtype=torch.int32, device=query.device)
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]
    numbers = batch, kept, rows, keys, shift, span
    # In the order of the kernel's last parameters.
    constants = (
        groups, size, padded, block, launch.keys, hidden is not None, splits > 1, _INTERPRETED or wide,
        "tf32x3" if wide else "ieee",
    )  # fmt: skip
    known = None
    pointers = query.data_ptr() | key.data_ptr() | value.data_ptr()
    if few and not _INTERPRETED and pointers % 16 == 0 and all(n % 16 == 0 and n < 2**31 for n in strides):
        # All that decides how the kernel is compiled; the numbers that are left out are not specialised upon.
        known = query.device, query.dtype, batch, kept, shift, launch, constants
    with _on(query.device):
        _run(
            _attention_kernel, (blocks, splits, batch * kept),
            (
                query, key, value, partial, lse, *turn, turn.partner if hidden is None else hidden, *strides, *numbers,
                scaling * _LOG2_E, *constants,
            ),
            launch, known,
        )  # fmt: skip
        if splits > 1:
            _run(
                _join_kernel, (batch * rows * heads, 1, 1),
                (partial, lse, out, batch * rows * heads, splits, size, padded, _power(splits)), _JOIN,
                None if known is None else (query.device, query.dtype, size, _power(splits)),
            )  # fmt: skip
    return out.transpose(1, 2)


_JOIN = Launch(0, 0, 4, 3)
_READY: dict[tuple[object, ...], Any] = {}


def _run(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    launch: Launch,
    known: tuple[object, ...] | None,
) -> None:
    """Launches a kernel; one that is known by all it was compiled for, without being looked up argument by argument.

    That saves more than half of what a launch costs, and a decoding step is made of launches.
    """
    if known is not None and (ready := _READY.get((kernel, *known))) is not None:
        ready[grid](*arguments)
        return
    made = kernel[grid](*arguments, num_warps=launch.warps, num_stages=launch.stages)
    if known is not None:
        _READY[kernel, *known] = made


def _power(n: int) -> int:
    """Returns the least power of two from n on; Triton's own function takes longer than a launch may."""
    return 1 << (n - 1).bit_length()


def _cuts(n: int, size: int) -> int:
    return -(-n // size)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merges attention over further keys into ``out`` and ``lse``, in place, in one pass over memory.

    Args:
        out: (batch, heads, rows, size), features next to each other in memory.
        lse: (batch, heads, rows) float32: logarithms of the sums that ``out`` was divided by.
        more: As ``out``.
        more_lse: As ``lse``.
    """
    batch, heads, rows, size = out.shape
    padded, block = _power(size), 32
    with _on(out.device):
        _merge_kernel[(_cuts(rows, block), batch * heads)](
            out, lse, more, more_lse, heads, rows,
            *out.stride()[:3], *more.stride()[:3], *lse.stride(), *more_lse.stride(),
            SIZE=size, PADDED=padded, BLOCK=block, num_warps=4,
        )  # fmt: skip


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _steps(
    acc,
    total,
    highest,
    near,
    far,
    place,
    k_base,
    v_base,
    k_stride,
    v_stride,
    begin,
    end,
    keys,
    left,
    shift,
    scale,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    EDGE: tl.constexpr,
    LEFT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes a run of keys into the running softmax: near ones, far ones, or both kinds; EDGE: some are not seen."""
    d = tl.arange(0, PADDED)
    for start in range(begin, end, KEYS):
        n = start + tl.arange(0, KEYS)
        n_wide = n.to(tl.int64)
        k_at = k_base + n_wide[None, :] * k_stride + d[:, None]
        v_at = v_base + n_wide[:, None] * v_stride + d[None, :]
        if EDGE or PADDED != SIZE:
            k = tl.load(k_at, mask=(n < keys)[None, :] & (d < SIZE)[:, None], other=0.0)
            v = tl.load(v_at, mask=(n < keys)[:, None] & (d < SIZE)[None, :], other=0.0)
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        distance = place[:, None] - n[None, :]
        if NEAR and FAR:
            scores = tl.where(
                distance >= shift,
                tl.dot(far, k, input_precision=PRECISION),
                tl.dot(near, k, input_precision=PRECISION),
            )
        elif FAR:
            scores = tl.dot(far, k, input_precision=PRECISION)
        else:
            scores = tl.dot(near, k, input_precision=PRECISION)
        scores = scores * scale
        if EDGE:
            scores = tl.where(distance >= 0, scores, -float("inf"))
        if LEFT:
            scores = tl.where((n >= left)[None, :], scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        if EDGE or LEFT:
            # A row that has seen nothing yet: -inf - -inf would be NaN.
            base = tl.where(new == -float("inf"), 0.0, new)
        else:
            base = new
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        total = total * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision=PRECISION)
        highest = new
    return acc, total, highest


@triton.jit(do_not_specialize=["rows", "keys", "span"])
def _attention_kernel(
    query,
    key,
    value,
    out,
    lse,
    cos,
    sin,
    partner,
    lefts,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    batch,
    kept,
    rows,
    keys,
    shift,
    span,
    scale,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    LEFT: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last rows see most keys: first things first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    split, both = tl.program_id(1), tl.program_id(2)
    b, h = (both // kept).to(tl.int64), (both % kept).to(tl.int64)
    m = block * BLOCK + tl.arange(0, BLOCK)
    row, member = m // GROUPS, m % GROUPS
    real = row < rows
    first = keys - rows
    place = first + row
    lowest = first + block * BLOCK // GROUPS  # places of the program's first and last row
    highest_place = first + tl.minimum(rows - 1, (block * BLOCK + BLOCK - 1) // GROUPS)

    d = tl.arange(0, PADDED)
    inside = real[:, None] & (d < SIZE)[None, :]
    q_base = query + b * q_batch + (h * GROUPS + member)[:, None] * q_head + row.to(tl.int64)[:, None] * q_row
    near = tl.load(q_base + d[None, :], mask=inside, other=0.0)
    c = tl.load(cos + d, mask=d < SIZE, other=0.0)
    s = tl.load(sin + d, mask=d < SIZE, other=0.0)
    other = tl.load(partner + d, mask=d < SIZE, other=0)
    fellow = tl.load(q_base + other[None, :], mask=inside, other=0.0)
    far = near.to(tl.float32) * c[None, :] + fellow.to(tl.float32) * s[None, :]
    far = far.to(near.dtype)
    if WIDE:
        near = near.to(tl.float32)
        far = far.to(tl.float32)
    k_base = key + b * k_batch + h * k_head
    v_base = value + b * v_batch + h * v_head

    begin = split * span
    end = tl.minimum(begin + span, highest_place + 1)
    left = 0
    if LEFT:
        left = tl.load(lefts + b)
        begin = tl.maximum(begin, left // KEYS * KEYS)
    # Where keys stop being far to all rows, to any row, and where some row stops seeing them: whole blocks.
    far_end = tl.maximum(lowest - shift + 1, 0) // KEYS * KEYS
    mixed_end = tl.cdiv(tl.maximum(highest_place - shift + 1, 0), KEYS) * KEYS
    near_end = tl.maximum(mixed_end, (lowest + 1) // KEYS * KEYS)

    acc = tl.zeros((BLOCK, PADDED), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    acc, total, highest = _steps(
        acc, total, highest, near, far, place, k_base, v_base, k_row, v_row, begin, tl.minimum(far_end, end), keys,
        left, shift, scale, SIZE, PADDED, KEYS, False, True, False, LEFT, WIDE, PRECISION,
    )  # fmt: skip
    acc, total, highest = _steps(
        acc, total, highest, near, far, place, k_base, v_base, k_row, v_row, tl.maximum(begin, far_end),
        tl.minimum(mixed_end, end), keys, left, shift, scale, SIZE, PADDED, KEYS, True, True, True, LEFT, WIDE,
        PRECISION,
    )  # fmt: skip
    acc, total, highest = _steps(
        acc, total, highest, near, far, place, k_base, v_base, k_row, v_row, tl.maximum(begin, mixed_end),
        tl.minimum(near_end, end), keys, left, shift, scale, SIZE, PADDED, KEYS, True, False, False, LEFT, WIDE,
        PRECISION,
    )  # fmt: skip
    acc, total, highest = _steps(
        acc, total, highest, near, far, place, k_base, v_base, k_row, v_row, tl.maximum(begin, near_end), end, keys,
        left, shift, scale, SIZE, PADDED, KEYS, True, False, True, LEFT, WIDE, PRECISION,
    )  # fmt: skip

    found = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLIT:
        b += split.to(tl.int64) * batch
    at = (b * rows + row) * (kept * GROUPS) + h * GROUPS + member
    tl.store(out + at[:, None] * SIZE + d[None, :], found.to(out.dtype.element_ty), mask=inside)
    if SPLIT:
        tl.store(lse + at, tl.where(total == 0.0, -float("inf"), highest + tl.log2(total)), mask=real)


@triton.jit(do_not_specialize=["count", "splits"])
def _join_kernel(partial, lse, out, count, splits, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Joins what cuts along the keys found; their log-sum-exps are of base 2."""
    at = tl.program_id(0).to(tl.int64)
    cut, d = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, PADDED)
    own = tl.load(lse + cut * count + at, mask=cut < splits, other=-float("inf"))
    highest = tl.max(own, 0)
    shares = tl.exp2(own - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(shares, 0)
    parts = tl.load(
        partial + (cut[:, None] * count + at) * SIZE + d[None, :],
        mask=(cut < splits)[:, None] & (d < SIZE)[None, :],
        other=0.0,
    )
    found = tl.sum(parts * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + at * SIZE + d, found.to(out.dtype.element_ty), mask=d < SIZE)


@triton.jit
def _merge_kernel(
    out,
    lse,
    more,
    more_lse,
    heads,
    rows,
    o_batch,
    o_head,
    o_row,
    m_batch,
    m_head,
    m_row,
    l_batch,
    l_head,
    l_row,
    n_batch,
    n_head,
    n_row,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    both = tl.program_id(1)
    b, h = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    d = tl.arange(0, PADDED)
    l_at = lse + b * l_batch + h * l_head + row * l_row
    own = tl.load(l_at, mask=row < rows, other=0.0)
    added = tl.load(more_lse + b * n_batch + h * n_head + row * n_row, mask=row < rows, other=0.0)
    highest = tl.maximum(own, added)
    share, other_share = tl.exp(own - highest), tl.exp(added - highest)
    total = share + other_share
    mask = (row < rows)[:, None] & (d < SIZE)[None, :]
    o_at = out + b * o_batch + h * o_head + row[:, None] * o_row + d[None, :]
    old = tl.load(o_at, mask=mask, other=0.0).to(tl.float32)
    new = tl.load(more + b * m_batch + h * m_head + row[:, None] * m_row + d[None, :], mask=mask, other=0.0)
    found = (old * share[:, None] + new.to(tl.float32) * other_share[:, None]) / total[:, None]
    tl.store(o_at, found.to(out.dtype.element_ty), mask=mask)
    tl.store(l_at, highest + tl.log(total), mask=row < rows)


_INTERPRETED = not isinstance(_attention_kernel, triton.runtime.JITFunction)
