"""The sweeps of :mod:`modelwright.kernels.pair_tiles` for CUDA: tiles by Triton, products of tiles by the BLAS.

*Operands are float16*, scaled by powers of two so that their range is no matter: as many digits as tf32 at twice its
rate. A second float16 holds the rest of each number where float32's accuracy is wanted, for three products instead of
one (``precision=``):

- ``"fp16"``: 11 bits, as tf32 (about 1e-3 relative); of 16-bit rows nothing is lost.
- ``"fp16x3"``: 22 bits, nearly float32.
- None, the default, follows torch: ``"fp16"`` where ``torch.set_float32_matmul_precision`` or
  ``torch.backends.cuda.matmul`` allow tf32, or rows are stored in 16 bits; else ``"fp16x3"``.

Everything is added up in float32.

*Forward*, one product of matrices for both directions, of which nothing is stored: programs form a grid over groups of
row blocks and groups of column blocks. A program takes its column blocks one after the other, each against all its row
blocks, and keeps the running sum of the columns in registers; those of its rows wait in global memory, where only this
program touches them. What the groups found is added up afterwards.

*Backward*, a product for the tile and two for the gradients, none made twice: a kernel writes a tile's weights (the
derivative of the loss with respect to the logits) as float16 into a buffer of a fixed size, and the BLAS multiplies it
by the keys and, transposed, by the queries.

Deterministic: no atomics, each number is added up in a fixed order. Memory beyond inputs and results: the float16
operands, and one tile of weights (128 MiB, or twice that for ``"fp16x3"``; less for small batches).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from modelwright.errors import UserError
from modelwright.kernels import pair_tiles
from modelwright.kernels import pair_tiles_kernels as kernels


class Launch(NamedTuple):
    """How a kernel is cut.

    Attributes:
        rows: Of a block.
        cols: Of a block.
        slice: Width of the rows that is multiplied at a time.
        warps: Per program.
        stages: Of the pipelined loop over slices.
    """

    rows: int
    cols: int
    slice: int
    warps: int
    stages: int


# The one place to change for another card. These are the fastest of those that `benchmarks/inf_cl_gpu.py --tune` tries
# on an H100.
FORWARD = {"fp16": Launch(256, 128, 64, 8, 3), "fp16x3": Launch(128, 256, 32, 8, 3)}
WEIGHTS = {"fp16": Launch(128, 256, 64, 8, 3), "fp16x3": Launch(128, 128, 32, 8, 3)}
SIGMOID = {"fp16": Launch(128, 128, 64, 8, 3), "fp16x3": Launch(128, 128, 32, 8, 3)}
PROGRAMS = 1
"""Of the forward kernel, for each multiprocessor."""
TILE = 8192
"""Largest side of the tile of weights that the BLAS multiplies."""

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)
_LARGEST = 15
"""Operands are scaled to a maximum below 2 to this power, half of what float16 holds."""
_WEIGHT = 14
"""And weights by 2 to this power: one of each direction, at most 1 each, make less than 2 ** 15 together."""
_MIXED_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()  # since torch 2.8, and not on the CPU
_FIXED, _LOWEST = 100.0, 2.0**-80
"""A logarithm to base 2 up to which sums of exponentials cannot overflow, and the sum below which digits were lost."""


class Operands(NamedTuple):
    """Rows as the tensor cores take them: ``values * 2 ** exponent`` is ``high + low``.

    Attributes:
        high: (rows, width) float16, the width padded with zeros.
        low: What is missing, or ``high`` again where it is not wanted.
        factor: One element, float32, 2 ** -exponent.
        width: Without the padding.
    """

    high: Tensor
    low: Tensor
    factor: Tensor
    width: int

    def restore(self, gradient: Tensor, scale: Tensor | float) -> Tensor:
        """Returns products with these rows in their own width and size."""
        return gradient.mul_(self.factor * scale)[:, : self.width].contiguous()


def softmax_sweep(
    q: Tensor, k: Tensor, *, block_size: int | None = None, columns: bool = True, precision: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of every row, and of every column, of ``q @ k.T``.

    Args:
        q: (m, d), float32, bfloat16 or float16, the scale already inside.
        k: (n, d), same device.
        block_size: Largest side of a block, rounded down to a power of two of at least 16.
        columns: Also reduce over rows.
        precision: Of the products; see the module's docstring.

    Returns:
        ``row_lse`` (m,) over keys, ``col_lse`` (n,) over queries or None, float32.

    Raises:
        UserError: A dtype, precision or device that the kernels cannot take.
    """
    precision = _check(q, k, precision)
    (m, _), n = q.shape, len(k)
    if not m or not n:
        return pair_tiles.softmax_sweep(q.float(), k.float(), columns=columns)
    rows, cols = _operands(q, precision), _operands(k, precision)
    options = _options(FORWARD[precision], precision, block_size, rows.high.shape[1])
    groups = _groups(triton.cdiv(m, options["ROWS"]), triton.cdiv(n, options["COLS"]), _programs(q.device))
    row_groups, rows_each, col_groups, cols_each = groups
    unit = (rows.factor * cols.factor * _LOG2_E).reshape(1)
    lengths = [torch.linalg.vector_norm(t, dim=1, dtype=torch.float32).amax() for t in (q, k)]
    bound = 1.001 * _LOG2_E * (lengths[0] * lengths[1]).item()  # of |x|, by a hair larger for the operands' rounding

    def sweep(fixed: bool, shift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_max, row_sum = torch.full((2, col_groups, m), -torch.inf, device=q.device)
        col_max, col_sum = row_max.new_empty((2, row_groups, n) if columns else (2, 1, 1))
        row_sum.zero_()
        with _on(q.device):
            kernels.softmax_kernel[row_groups, col_groups](
                *(rows.high, rows.low, cols.high, cols.low, unit, row_max, row_sum, col_max, col_sum),
                *(shift, m, n, rows_each, cols_each),
                FIXED=fixed,
                COLUMNS=columns,
                **options,
            )
        return row_max, row_sum, col_max, col_sum

    if bound <= 2 * _FIXED:
        # One exponential for both directions, all shifted alike; what that loses is seen in the sums.
        shift = max(bound - _FIXED, 0.0)
        _, row_sum, _, col_sum = sweep(True, shift)
        row_sum, col_sum = row_sum.sum(0), col_sum.sum(0)
        lowest = torch.minimum(row_sum.amin(), col_sum.amin()) if columns else row_sum.amin()
        if bound <= _FIXED or lowest >= _LOWEST:
            logs = [s.log_().add_(shift * _LN_2) for s in (row_sum, col_sum)]
            return logs[0], logs[1] if columns else None
    row_max, row_sum, col_max, col_sum = sweep(False, 0.0)
    row_lse = row_max.mul_(_LN_2).add_(row_sum.log_()).logsumexp(0)
    return row_lse, col_max.mul_(_LN_2).add_(col_sum.log_()).logsumexp(0) if columns else None


def softmax_sweep_backward(
    q: Tensor,
    k: Tensor,
    row_lse: Tensor,
    row_grad: Tensor,
    col_lse: Tensor | None = None,
    col_grad: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    label_grad: Tensor | None = None,
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
        labels: (m,) int64, a row of ``k`` for each of ``q``; None without ``label_grad``.
        label_grad: (m,).
        block_size: Largest side of a block and of the tile of weights.
        precision: Of the products; see the module's docstring.

    Returns:
        ``dq`` (m, d) and ``dk`` (n, d), float32.

    Raises:
        UserError: A dtype, precision or device that the kernels cannot take.
    """
    precision = _check(q, k, precision)
    if not len(q) or not len(k):
        return torch.zeros(q.shape, device=q.device), torch.zeros(k.shape, device=k.device)
    rows, cols = _operands(q, precision), _operands(k, precision)
    row_log, row_factor = row_lse.float() * _LOG2_E, row_grad.float()
    if col_lse is None or col_grad is None:
        both, col_log, col_factor = False, row_log, row_factor  # the kernel does not read them
        largest = row_factor.abs().amax()
    else:
        both, col_log, col_factor = True, col_lse.float() * _LOG2_E, col_grad.float()
        largest = torch.maximum(row_factor.abs().amax(), col_factor.abs().amax())
    own, label_factor = (row_log, row_factor) if labels is None or label_grad is None else (labels, label_grad.float())
    if labels is not None:
        largest = torch.maximum(largest, label_factor.abs().amax() / 2)  # it is near the sum of both directions'
    # Weights relative to the largest gradient, so that float16 holds them.
    largest = torch.where(largest > 0, largest, 1.0)
    row_factor, col_factor, label_factor = (
        f.mul(2.0**_WEIGHT / largest) for f in (row_factor, col_factor, label_factor)
    )
    shift = pair_tiles._common_shift(row_log, col_log if both else None, 60.0)
    if shift is not None:
        # exp(x - lse) = exp(x - shift) * exp(shift - lse): one exponential for both directions.
        row_factor, col_factor = row_factor * (shift - row_log).exp2(), col_factor * (shift - col_log).exp2()
    unit = (rows.factor * cols.factor * _LOG2_E).reshape(1)
    dq, dk = (torch.zeros(t.high.shape, device=q.device) for t in (rows, cols))
    for i, j, weights in _tiles(rows, cols, precision, block_size):
        _launch(
            kernels.softmax_weights_kernel,
            *(rows, cols, i, j, weights, precision, block_size),
            *(unit, row_log[i], row_factor[i], col_log[j] if both else col_log, col_factor[j] if both else col_factor),
            *(own[i], label_factor[i], j.start, shift or 0.0),
            BOTH=both,
            LABELS=labels is not None,
            COMMON=shift is not None,
        )
        _accumulate(dq[i], dk[j], weights, rows, cols, i, j, precision)
    back = largest * 2.0**-_WEIGHT
    return cols.restore(dq, back), rows.restore(dk, back)


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
        gradients: Also return the gradients, from the same tiles.
        block_size: Largest side of a block and of the tile of weights.
        precision: Of the products; see the module's docstring.

    Returns:
        The sum, (); and its gradients ``dq`` (m, d), ``dk`` (n, d), ``dbias`` (), each None without ``gradients``. All
        float32.

    Raises:
        UserError: A dtype, precision or device that the kernels cannot take.
    """
    precision = _check(q, k, precision)
    if not len(q) or not len(k):
        return pair_tiles.sigmoid_sweep(q.float(), k.float(), bias.float(), diagonal=diagonal, gradients=gradients)
    rows, cols = _operands(q, precision), _operands(k, precision)
    unit = (rows.factor * cols.factor).reshape(1)
    bias = bias.detach().float().reshape(1)
    dq, dk = (torch.zeros(t.high.shape if gradients else (1, 1), device=q.device) for t in (rows, cols))
    total, slope = torch.zeros(2, dtype=torch.float64, device=q.device)
    for i, j, weights in _tiles(rows, cols, precision, block_size, gradients):
        height, width = i.stop - i.start, j.stop - j.start
        # One number for each row and column block: none is written by two programs.
        sums = torch.zeros((2, triton.cdiv(width, 16), height), device=q.device)
        _launch(
            kernels.sigmoid_kernel,
            *(rows, cols, i, j, weights, precision, block_size),
            *(unit, bias, sums[0], sums[1], i.start - j.start),
            DIAGONAL=diagonal,
            GRADIENTS=gradients,
        )
        total += sums[0].sum(dtype=torch.float64)
        if gradients:
            slope += sums[1].sum(dtype=torch.float64)
            _accumulate(dq[i], dk[j], weights, rows, cols, i, j, precision)
    if not gradients:
        return total.float(), None, None, None
    back = 2.0**-_WEIGHT
    return total.float(), cols.restore(dq, back), rows.restore(dk, back), slope.float()


_INTERPRETED = not isinstance(kernels.softmax_kernel, triton.JITFunction)


def _check(q: Tensor, k: Tensor, precision: str | None) -> str:
    """Refuses what the kernels do not take; returns the precision."""
    for t in (q, k):
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"The Triton kernels take float32 or narrower, not {t.dtype}: use backend='torch'.")
        if t.device.type != "cuda" and not _INTERPRETED:
            raise UserError(f"The Triton kernels run on CUDA, not on {t.device.type}: use backend='torch'.")
    if precision is None:
        narrow = q.element_size() == 2 and k.element_size() == 2
        return "fp16" if narrow or _tf32_allowed() else "fp16x3"
    if precision not in FORWARD:
        raise UserError(f"precision={precision!r} is not known: use one of {', '.join(FORWARD)}.")
    return precision


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where to ask the older way may raise
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


@torch.no_grad()
def _operands(t: Tensor, precision: str) -> Operands:
    rows, width = t.shape
    smallest, largest = torch.aminmax(t)  # not of t.abs(), which would be a copy
    largest = torch.maximum(-smallest, largest).float()
    exponent = torch.where(largest > 0, _LARGEST - 1 - torch.log2(largest).floor(), 0.0).clamp(-120, 120)
    padded = _padded(width)
    high = torch.zeros((rows, padded), dtype=torch.float16, device=t.device)
    low = torch.zeros_like(high) if precision == "fp16x3" else high
    power, each = exponent.exp2(), max(1, 2**24 // max(width, 1))
    for start in range(0, rows, each):  # in parts: no copy of all rows in float32
        part = slice(start, start + each)
        scaled = t[part].float() * power
        high[part, :width] = scaled
        if precision == "fp16x3":
            low[part, :width] = scaled.sub_(high[part, :width])
    return Operands(high, low, power.reciprocal(), width)


def _options(launch: Launch, precision: str, block_size: int | None, width: int) -> dict[str, Any]:
    """What a kernel is compiled for; the width is that of the operands."""
    rows, cols = (side if block_size is None else _power_of_two(min(block_size, side)) for side in launch[:2])
    warps = launch.warps if rows * cols >= 4096 else 4
    return {
        "ROWS": rows, "COLS": cols, "SLICE": min(launch.slice, width), "WIDTH": width, "SPLIT": precision == "fp16x3",
        # Multiply-add fused, said because Triton is about to change what it does when nothing is said.
        "num_warps": warps, "num_stages": launch.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _padded(width: int) -> int:
    """How wide operands are stored: slices need no mask."""
    return triton.cdiv(width, 64) * 64 if width > 32 else _power_of_two(2 * width - 1)


def _power_of_two(side: int) -> int:
    """The largest up to ``side``, and at least 16, which a product on tensor cores needs."""
    return max(16, 1 << max(side, 1).bit_length() - 1)


def _tiles(
    rows: Operands, cols: Operands, precision: str, block_size: int | None, wanted: bool = True
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yields row slice, column slice and the memory of their weights, one tensor or two, which later tiles write."""
    m, n = len(rows.high), len(cols.high)
    # At most a quarter of the longer side: no tensor has the size of the matrix.
    side = _power_of_two(min(TILE if block_size is None else block_size, max(m, n) // 4))
    shape = (min(side, m), min(side, n) if wanted else 1)
    memory = [rows.high.new_empty(shape) for _ in range(2 if precision == "fp16x3" else 1)]
    for top in range(0, m, side):
        for left in range(0, n, side):
            i, j = slice(top, min(top + side, m)), slice(left, min(left + side, n))
            yield i, j, [part[: i.stop - i.start, : j.stop - j.start] for part in memory]


def _launch(
    kernel: Any,
    rows: Operands,
    cols: Operands,
    i: slice,
    j: slice,
    weights: list[Tensor],
    precision: str,
    block_size: int | None,
    *arguments: Any,
    **switches: Any,
) -> None:
    m, n = i.stop - i.start, j.stop - j.start
    launch = (SIGMOID if kernel is kernels.sigmoid_kernel else WEIGHTS)[precision]
    options = _options(launch, precision, min(block_size or TILE, _power_of_two(max(m, n))), rows.high.shape[1])
    grid = (triton.cdiv(m, options["ROWS"]), triton.cdiv(n, options["COLS"]))
    with _on(rows.high.device):
        kernel[grid](
            *(
                rows.high[i],
                rows.low[i],
                cols.high[j],
                cols.low[j],
                weights[0],
                weights[-1],
                m,
                n,
                weights[0].stride(0),
            ),
            *arguments,
            **switches,
            **options,
        )


def _accumulate(
    dq: Tensor, dk: Tensor, weights: list[Tensor], rows: Operands, cols: Operands, i: slice, j: slice, precision: str
) -> None:
    """``dq += weights @ keys`` and ``dk += weights.T @ queries``."""
    keys, queries = [cols.high[j], cols.low[j]], [rows.high[i], rows.low[i]]
    pairs = [(0, 0)] if precision == "fp16" else [(1, 0), (0, 1), (0, 0)]
    for a, b in pairs:
        _add_product(dq, weights[a], keys[b])
        _add_product(dk, weights[a].T, queries[b])


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``: float16 operands, a float32 sum."""
    if out.device.type == "cuda" and _MIXED_PRODUCTS:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


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
