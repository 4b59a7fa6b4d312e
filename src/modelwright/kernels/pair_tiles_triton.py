# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Kernels cannot be annotated: Triton looks the names up.
"""The sweeps of :mod:`modelwright.kernels.pair_tiles` as Triton kernels, for CUDA.

Checked against them in Triton's interpreter and compiled for two generations of cards; not yet run or timed on one.

Every kernel is deterministic: no atomics, each number is added up by one program in a fixed order. Rows may be stored
as float32, bfloat16 or float16; they are widened right after loading, and everything is added up in float32. Memory
beyond inputs and results grows with the number of rows, not with its square. Widths need not be powers of two.

*Forward*, one matrix product for both directions: the programs form a grid over groups of row blocks and groups of
column blocks. A program takes its column blocks one after the other, each against all its row blocks, and keeps the
running maximum and sum of the columns in registers; those of its rows wait in global memory, where only this program
touches them. What the groups found is joined by ``logsumexp`` afterwards.

*Backward*, two launches of one kernel, with the roles of rows and columns exchanged: a program owns a block of rows,
recomputes each tile and uses it for both directions' terms. The gradient of narrow rows stays on the chip; that of wide
ones is added up in global memory, a part of the width at a time.

Precision of the products (``precision=``): ``"tf32x3"`` uses the tensor cores three times for nearly float32's
accuracy, ``"tf32"`` once (about 1e-3 relative), ``"ieee"`` not at all. None, the default, follows torch: tf32 where
``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul`` allow it, or rows are stored in 16 bits (tf32
holds those exactly); else tf32x3.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelwright.errors import UserError
from modelwright.kernels import pair_tiles


class Launch(NamedTuple):
    """How a kernel is cut.

    Attributes:
        block: Side of a tile.
        slice: Width of the rows that is multiplied at a time.
        warps: Per program.
        stages: Of the pipelined loop over slices.
        on_chip: Largest padded width of a gradient that stays in registers.
        part: Width of a wider gradient that is added up at a time.
    """

    block: int
    slice: int
    warps: int = 8
    stages: int = 2
    on_chip: int = 0
    part: int = 0


# The one place to change once they have been timed. For now: the largest that the compiler fits into the registers of
# Hopper with next to no spilling (Ampere spills in tf32x3), and into the 99 KiB of shared memory that every card since
# Ampere has.
FORWARD = {"tf32": Launch(128, 32), "tf32x3": Launch(128, 16), "ieee": Launch(128, 16)}
GRADIENT = {
    "tf32": Launch(128, 32, on_chip=64, part=32),
    "tf32x3": Launch(64, 32, on_chip=128, part=64),
    "ieee": Launch(64, 16, on_chip=64, part=32),
}
PROGRAMS = 2
"""Of the forward kernel, for each multiprocessor."""

_LOG2_E = tl.constexpr(math.log2(math.e))


def softmax_sweep(
    q: Tensor, k: Tensor, *, block_size: int | None = None, columns: bool = True, precision: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of every row, and of every column, of ``q @ k.T``.

    Args:
        q: (m, d), float32, bfloat16 or float16, the scale already inside.
        k: (n, d), same device.
        block_size: Largest side of a tile; at most 128 is used, rounded down to a power of two.
        columns: Also reduce over rows.
        precision: Of the products; see the module's docstring.

    Returns:
        ``row_lse`` (m,) over keys, ``col_lse`` (n,) over queries or None, float32.

    Raises:
        UserError: A dtype, precision or device that the kernels cannot take.
    """
    q, k, precision = _prepare(q, k, precision)
    options = _options(FORWARD[precision], precision, block_size, q.shape[1])
    (m, width), n = q.shape, len(k)
    if not m or not n:
        return pair_tiles.softmax_sweep(q.float(), k.float(), columns=columns)
    row_blocks, col_blocks = triton.cdiv(m, options["BLOCK"]), triton.cdiv(n, options["BLOCK"])
    row_groups, rows_each, col_groups, cols_each = _groups(row_blocks, col_blocks, _programs(q.device))
    row_max = torch.full((col_groups, m), -torch.inf, device=q.device)
    row_sum = torch.zeros_like(row_max)
    col_lse = row_max.new_empty((row_groups, n) if columns else 1)
    with _on(q.device):
        _softmax_kernel[row_groups, col_groups](
            q, k, row_max, row_sum, col_lse, m, n, width, rows_each, cols_each, COLUMNS=columns, **options
        )
    rows = row_max.add_(row_sum.log_()).logsumexp(0)
    return rows, col_lse.logsumexp(0) if columns else None


def softmax_sweep_backward(
    q: Tensor,
    k: Tensor,
    row_lse: Tensor,
    row_grad: Tensor,
    col_lse: Tensor | None = None,
    col_grad: Tensor | None = None,
    *,
    block_size: int | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`softmax_sweep`, as :func:`modelwright.kernels.pair_tiles.softmax_sweep_backward` says.

    Args:
        q: (m, d), as in the forward sweep.
        k: (n, d).
        row_lse: (m,).
        row_grad: (m,) gradient of the loss with respect to ``row_lse``.
        col_lse: (n,), or None for rows only.
        col_grad: (n,), None exactly if ``col_lse`` is.
        block_size: Largest side of a tile; at most 128 is used, rounded down to a power of two.
        precision: Of the products; see the module's docstring.

    Returns:
        ``dq`` (m, d) and ``dk`` (n, d), float32.

    Raises:
        UserError: A dtype, precision or device that the kernels cannot take.
    """
    q, k, precision = _prepare(q, k, precision)
    options = _options(GRADIENT[precision], precision, block_size, q.shape[1])
    rows = row_lse.float().contiguous(), row_grad.float().contiguous()
    if col_lse is None or col_grad is None:
        cols, both = rows, False  # never read
    else:
        cols, both = (col_lse.float().contiguous(), col_grad.float().contiguous()), True

    def gradient(own: Tensor, other: Tensor, mine: Any, theirs: Any, own_term: bool, other_term: bool) -> Tensor:
        out = torch.zeros(own.shape, device=own.device)
        if out.numel() and len(other):
            with _on(own.device):
                _softmax_gradient_kernel[(triton.cdiv(len(own), options["BLOCK"]),)](
                    *(own, other, *mine, *theirs, out, len(own), len(other), own.shape[1]),
                    OWN=own_term,
                    OTHER=other_term,
                    **options,
                )
        return out

    return gradient(q, k, rows, cols, True, both), gradient(k, q, cols, rows, both, True)


def sigmoid_sweep(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    *,
    diagonal: bool,
    gradients: bool,
    block_size: int | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum of the sigmoid loss over all pairs, and its gradients.

    Args:
        q: (m, d), float32, bfloat16 or float16, the scale already inside.
        k: (n, d), same device.
        bias: One element.
        diagonal: Whether row i of ``q`` and row i of ``k`` are a positive pair; otherwise no pair is.
        gradients: Also return the gradients: the tiles are then made twice, once for each side's.
        block_size: Largest side of a tile; at most 128 is used, rounded down to a power of two.
        precision: Of the products; see the module's docstring.

    Returns:
        The sum, (); and its gradients ``dq`` (m, d), ``dk`` (n, d), ``dbias`` (), each None without ``gradients``. All
        float32.

    Raises:
        UserError: A dtype, precision or device that the kernels cannot take.
    """
    q, k, precision = _prepare(q, k, precision)
    options = _options(GRADIENT[precision], precision, block_size, q.shape[1])
    bias = bias.detach().float().reshape(1)

    def sweep(own: Tensor, other: Tensor, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.zeros(own.shape if gradients else 1, device=own.device)
        loss, slope = torch.zeros(2, len(own), device=own.device)
        if len(own) and len(other):
            with _on(own.device):
                _sigmoid_kernel[(triton.cdiv(len(own), options["BLOCK"]),)](
                    *(own, other, bias, out, loss, slope, len(own), len(other), own.shape[1]),
                    DIAGONAL=diagonal,
                    SUMS=sums,
                    GRADIENTS=gradients,
                    **options,
                )
        return out, loss, slope

    dq, loss, slope = sweep(q, k, True)
    total = loss.sum(dtype=torch.float64).float()
    if not gradients:
        return total, None, None, None
    return total, dq, sweep(k, q, False)[0], slope.sum(dtype=torch.float64).float()


@triton.jit
def _tile(
    own,
    other,
    rows,
    cols,
    m,
    n,
    width,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of ``own @ other.T``, with -inf in the columns beyond the last."""
    # In 64 bits: two million rows of width 1024 have more elements than 32 bits can count.
    row_at = own + rows.to(tl.int64)[:, None] * width
    col_at = other + cols.to(tl.int64)[None, :] * width
    x = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, SLICE):
        d = start + tl.arange(0, SLICE)
        a = tl.load(row_at + d[None, :], mask=(rows < m)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        b = tl.load(col_at + d[:, None], mask=(cols < n)[None, :] & (d < width)[:, None], other=0.0).to(tl.float32)
        x = tl.dot(a, b, x, input_precision=PRECISION)
    return tl.where((cols < n)[None, :], x, -float("inf"))


@triton.jit
def _merge(running_max, running_sum, x, AXIS: tl.constexpr):
    """Adds a tile to the running maximum and sum of exponentials of its rows (axis 1) or columns (axis 0)."""
    new_max = tl.maximum(running_max, tl.max(x, AXIS))
    # Rows and columns beyond the last have nothing but -inf: -inf - -inf would be NaN.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    # Subtracted before it is multiplied: near the maximum the difference is exact, also where x is 1e4.
    terms = tl.exp2((x - tl.expand_dims(shift, AXIS)) * _LOG2_E)
    return new_max, running_sum * tl.exp2((running_max - shift) * _LOG2_E) + tl.sum(terms, AXIS)


@triton.jit
def _softmax_kernel(
    q,
    k,
    row_max,
    row_sum,
    col_lse,
    m,
    n,
    width,
    rows_each,
    cols_each,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_group, col_group = tl.program_id(0), tl.program_id(1)
    row_end = tl.minimum((row_group + 1) * rows_each, tl.cdiv(m, BLOCK))
    col_end = tl.minimum((col_group + 1) * cols_each, tl.cdiv(n, BLOCK))
    for col_block in range(col_group * cols_each, col_end):
        cols = col_block * BLOCK + tl.arange(0, BLOCK)
        c_max = tl.full((BLOCK,), -float("inf"), tl.float32)
        c_sum = tl.zeros((BLOCK,), tl.float32)
        for row_block in range(row_group * rows_each, row_end):
            rows = row_block * BLOCK + tl.arange(0, BLOCK)
            x = _tile(q, k, rows, cols, m, n, width, BLOCK, SLICE, PRECISION)
            at = col_group.to(tl.int64) * m + rows
            r_max = tl.load(row_max + at, mask=rows < m, other=-float("inf"))
            r_sum = tl.load(row_sum + at, mask=rows < m, other=0.0)
            r_max, r_sum = _merge(r_max, r_sum, x, 1)
            tl.store(row_max + at, r_max, mask=rows < m)
            tl.store(row_sum + at, r_sum, mask=rows < m)
            if COLUMNS:
                c_max, c_sum = _merge(c_max, c_sum, tl.where((rows < m)[:, None], x, -float("inf")), 0)
            # The next column block reads what is stored here, perhaps in other threads of this program.
            tl.debug_barrier()
        if COLUMNS:
            at = row_group.to(tl.int64) * n + cols
            tl.store(col_lse + at, c_max + tl.log(tl.where(cols < n, c_sum, 1.0)), mask=cols < n)


@triton.jit
def _accumulate(
    gradient,
    other,
    out,
    acc,
    rows,
    cols,
    m,
    n,
    width,
    ON_CHIP: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds ``gradient @ other[cols]`` to ``acc``, or for wide rows (ON_CHIP of 0) to ``out[rows]``."""
    col_at = other + cols.to(tl.int64)[:, None] * width
    if ON_CHIP:
        d = tl.arange(0, ON_CHIP)
        b = tl.load(col_at + d[None, :], mask=(cols < n)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(gradient, b, acc, input_precision=PRECISION)
    else:
        row_at = out + rows.to(tl.int64)[:, None] * width
        for start in range(0, width, PART):
            d = start + tl.arange(0, PART)
            b = tl.load(col_at + d[None, :], mask=(cols < n)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
            mask = (rows < m)[:, None] & (d < width)[None, :]
            # Added outside the product, so that no prefetch for the product reads what has not been stored yet.
            part = tl.dot(gradient, b, input_precision=PRECISION)
            tl.store(row_at + d[None, :], tl.load(row_at + d[None, :], mask=mask, other=0.0) + part, mask=mask)
        tl.debug_barrier()
    return acc


@triton.jit
def _store(out, acc, rows, m, width, ON_CHIP: tl.constexpr):
    """Stores what stayed on the chip."""
    if ON_CHIP:
        d = tl.arange(0, ON_CHIP)
        at = out + rows.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(at, acc, mask=(rows < m)[:, None] & (d < width)[None, :])


@triton.jit
def _softmax_gradient_kernel(
    own,
    other,
    own_lse,
    own_grad,
    other_lse,
    other_grad,
    out,
    m,
    n,
    width,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    ON_CHIP: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of ``own``: terms of the softmaxes over ``other`` (OWN), and of those over ``own`` (OTHER)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if OWN:
        r_lse = tl.load(own_lse + rows, mask=rows < m, other=0.0)
        r_grad = tl.load(own_grad + rows, mask=rows < m, other=0.0)
    acc = tl.zeros((BLOCK, ON_CHIP if ON_CHIP else 1), tl.float32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _tile(own, other, rows, cols, m, n, width, BLOCK, SLICE, PRECISION)
        # Rows beyond the last hold anything, infinities too; they meet no other row and are not stored.
        gradient = tl.zeros((BLOCK, BLOCK), tl.float32)
        if OWN:
            gradient += r_grad[:, None] * tl.exp2((x - r_lse[:, None]) * _LOG2_E)
        if OTHER:
            c_lse = tl.load(other_lse + cols, mask=cols < n, other=0.0)
            c_grad = tl.load(other_grad + cols, mask=cols < n, other=0.0)
            gradient += c_grad[None, :] * tl.exp2((x - c_lse[None, :]) * _LOG2_E)
        acc = _accumulate(gradient, other, out, acc, rows, cols, m, n, width, ON_CHIP, PART, PRECISION)
    _store(out, acc, rows, m, width, ON_CHIP)


@triton.jit
def _sigmoid_kernel(
    own,
    other,
    bias,
    out,
    loss,
    slope,
    m,
    n,
    width,
    DIAGONAL: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    ON_CHIP: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of ``own``; with SUMS also each own row's loss and the derivative of that by the bias."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shift = tl.load(bias)
    r_loss = tl.zeros((BLOCK,), tl.float32)
    r_slope = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, ON_CHIP if ON_CHIP else 1), tl.float32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = (cols < n)[None, :] & (rows < m)[:, None]
        x = _tile(own, other, rows, cols, m, n, width, BLOCK, SLICE, PRECISION) + shift
        positive = rows[:, None] == cols[None, :]
        z = tl.where(inside, x, 0.0)
        if DIAGONAL:
            z = tl.where(positive, -z, z)
        e = tl.exp2(-tl.abs(z) * _LOG2_E)
        if SUMS:
            # log1p(e) = 2 artanh(e / (2 + e)): a series in s <= 1/3, accurate also where 1 + e would round to 1.
            s = e / (2.0 + e)
            t = s * s
            series = 1.0 / 15.0
            series = series * t + 1.0 / 13.0
            series = series * t + 1.0 / 11.0
            series = series * t + 1.0 / 9.0
            series = series * t + 1.0 / 7.0
            series = series * t + 1.0 / 5.0
            series = series * t + 1.0 / 3.0
            series = series * t + 1.0
            r_loss += tl.sum(tl.where(inside, tl.maximum(z, 0.0) + 2.0 * s * series, 0.0), 1)
        if GRADIENTS:
            gradient = tl.where(z >= 0, 1.0, e) / (1.0 + e)
            if DIAGONAL:
                gradient = tl.where(positive, -gradient, gradient)
            gradient = tl.where(inside, gradient, 0.0)
            r_slope += tl.sum(gradient, 1)
            acc = _accumulate(gradient, other, out, acc, rows, cols, m, n, width, ON_CHIP, PART, PRECISION)
    if SUMS:
        tl.store(loss + rows, r_loss, mask=rows < m)
        tl.store(slope + rows, r_slope, mask=rows < m)
    if GRADIENTS:
        _store(out, acc, rows, m, width, ON_CHIP)


_INTERPRETED = not isinstance(_tile, triton.JITFunction)


def _prepare(q: Tensor, k: Tensor, precision: str | None) -> tuple[Tensor, Tensor, str]:
    """The two matrices as the kernels read them, and the precision of their products."""
    for t in (q, k):
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"The Triton kernels take float32 or narrower, not {t.dtype}: use backend='torch'.")
        if t.device.type != "cuda" and not _INTERPRETED:
            raise UserError(f"The Triton kernels run on CUDA, not on {t.device.type}: use backend='torch'.")
    if precision is None:
        narrow = q.element_size() == 2 and k.element_size() == 2
        precision = "tf32" if narrow or _tf32_allowed() else "tf32x3"
    elif precision not in FORWARD:
        raise UserError(f"precision={precision!r} is not known: use one of {', '.join(FORWARD)}.")
    return q.detach().contiguous(), k.detach().contiguous(), precision


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where to ask the older way may raise
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _options(launch: Launch, precision: str, block_size: int | None, width: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    # At least 16, which a product on tensor cores needs.
    block = max(16, 1 << (min(block_size or launch.block, launch.block).bit_length() - 1))
    options: dict[str, Any] = {"BLOCK": block, "SLICE": launch.slice, "PRECISION": precision}
    if launch.on_chip:
        padded = max(16, triton.next_power_of_2(width))
        options |= {"ON_CHIP": padded if padded <= launch.on_chip else 0, "PART": launch.part}
    # Multiply-add fused, said because Triton is about to change what it does when nothing is said.
    launched = {"num_warps": launch.warps if block >= 64 else 4, "num_stages": launch.stages, "enable_fp_fusion": True}
    return options | launched


def _groups(row_blocks: int, col_blocks: int, programs: int) -> tuple[int, int, int, int]:
    """Row groups and blocks in each, column groups and blocks in each: up to ``programs`` programs, none idle."""
    rows_each = triton.cdiv(row_blocks, max(1, math.isqrt(programs)))
    row_groups = triton.cdiv(row_blocks, rows_each)
    cols_each = triton.cdiv(col_blocks, max(1, programs // row_groups))
    return row_groups, rows_each, triton.cdiv(col_blocks, cols_each), cols_each


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
