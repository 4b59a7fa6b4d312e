"""Sums over all pairs of rows of two matrices, tile by tile, so that the matrix of their products never exists.

With ``x = q @ k.T``, (m, n): log-sum-exps of the rows and of the columns of ``x``, the gradient of both, and the sum
of the sigmoid loss over all pairs with its gradient. One sweep over tiles serves both directions: in a tile that is
shifted by one number, one exponential gives the sums of its rows and of its columns. Where that would underflow, rows
and columns are shifted on their own.

Tiles hold logarithms to base 2 (the matrix product multiplies by log2(e) at no cost), because torch's exp2 is four
times as fast as its exp on a CPU, and tens of times where the result underflows.

Plain torch, for any device: the specification of the Triton kernels beside it. Memory beyond inputs and results: two
tiles. Inputs are float32 or float64 (callers convert narrower ones), and everything is added up in that dtype.
Nothing here is differentiable: ``modelwright.training.inf_cl.loss`` makes autograd functions of it. Autocast does not
matter: it leaves operations that write into given memory alone, and the products here are such.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class _Range(NamedTuple):
    """What exponentials of a dtype can hold.

    Attributes:
        fixed: If no |x| * log2(e) is above it, no shift is needed: 2 ** 100 leaves room for sums of 2 ** 27 terms.
        spread: How far a row's maximum may lie under the shift. What then underflows is smaller than the row's sum by
            2 ** -40 in float32, whose smallest normal number is 2 ** -126, and by 2 ** -162 in float64.
    """

    fixed: float
    spread: float


_RANGES = {torch.float32: _Range(100.0, 86.0), torch.float64: _Range(940.0, 860.0)}
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)


def default_block_size(device: torch.device, width: int) -> int:
    """Returns the side of a tile when none is asked for.

    On a CPU a tile should stay in the cache of a core; on an accelerator it should fill the device, at 64 MiB.

    Args:
        device: Where the tiles are made.
        width: Columns of ``q`` and ``k``.
    """
    if device.type == "cpu":
        return 768 if width <= 128 else 512
    return 4096


@torch.no_grad()
def softmax_sweep(
    q: Tensor, k: Tensor, *, block_size: int | None = None, columns: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of every row, and of every column, of ``q @ k.T``.

    Args:
        q: (m, d), float32 or float64, the scale already inside.
        k: (n, d), same dtype and device.
        block_size: Side of a tile; None chooses one for the device.
        columns: Also reduce over rows.

    Returns:
        ``row_lse`` (m,) over keys, ``col_lse`` (n,) over queries or None, in the dtype of ``q``.
    """
    limits = _limits(q, k)
    rows_sum, cols_sum = q.new_zeros(len(q)), q.new_zeros(len(k)) if columns else None
    if _bound(q, k) * _LOG2_E <= limits.fixed:
        for i, j, x in _tiles(q, k, block_size, _LOG2_E):
            x.exp2_()
            rows_sum[i] += x.sum(1)
            if cols_sum is not None:
                cols_sum[j] += x.sum(0)
        return rows_sum.log_(), None if cols_sum is None else cols_sum.log_()

    rows_max = torch.full_like(rows_sum, -torch.inf)
    cols_max = None if cols_sum is None else torch.full_like(cols_sum, -torch.inf)
    other = None
    for i, j, x in _tiles(q, k, block_size, _LOG2_E):
        row_shift = x.amax(1)
        if cols_sum is None or cols_max is None:
            _merge(rows_max[i], rows_sum[i], row_shift, row_shift, x.sub_(row_shift[:, None]).exp2_().sum(1))
            continue
        col_shift = x.amax(0)
        shift = row_shift.amax()
        if _one_shift_serves(shift, row_shift, col_shift, limits.spread):
            x.sub_(shift).exp2_()
            _merge(rows_max[i], rows_sum[i], row_shift, shift, x.sum(1))
            _merge(cols_max[j], cols_sum[j], col_shift, shift, x.sum(0))
        else:
            other = _like(x, other)
            _merge(cols_max[j], cols_sum[j], col_shift, col_shift, torch.sub(x, col_shift, out=other).exp2_().sum(0))
            _merge(rows_max[i], rows_sum[i], row_shift, row_shift, x.sub_(row_shift[:, None]).exp2_().sum(1))
    return _natural(rows_max, rows_sum), None if cols_max is None or cols_sum is None else _natural(cols_max, cols_sum)


@torch.no_grad()
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
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`softmax_sweep`; tiles of ``x = q @ k.T`` are made once more, once for both directions.

    With ``G = row_grad[:, None] * exp(x - row_lse[:, None]) + col_grad * exp(x - col_lse)``, returns ``G @ k`` and
    ``G.T @ q``. With labels ``G[i, labels[i]]`` is larger by ``label_grad[i]``: the derivative by each row's own logit,
    which nearly cancels the rest there and so must meet it before the products round.

    ``row_lse`` and ``col_lse`` may be of more keys and queries than are given here (other processes'
    parts), but not of fewer: no x may be above the log-sum-exp of its row or column.

    Args:
        q: (m, d), as in the forward sweep.
        k: (n, d).
        row_lse: (m,).
        row_grad: (m,) gradient of the loss with respect to ``row_lse``.
        col_lse: (n,), or None for rows only.
        col_grad: (n,), None exactly if ``col_lse`` is.
        labels: (m,) int64, a row of ``k`` for each of ``q``; None without ``label_grad``.
        label_grad: (m,).
        block_size: Side of a tile; None chooses one for the device.

    Returns:
        ``dq`` (m, d) and ``dk`` (n, d).
    """
    limits = _limits(q, k)
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    row_lse, col_lse = row_lse * _LOG2_E, None if col_lse is None else col_lse * _LOG2_E
    shift = _common_shift(row_lse, col_lse, limits.spread)
    if shift is not None:
        # exp(x - lse) = exp(x - shift) * exp(shift - lse), the second factor outside the loop.
        row_factor = row_grad * (shift - row_lse).exp2_()
        col_factor = None if col_lse is None or col_grad is None else col_grad * (shift - col_lse).exp2_()
    other = None
    for i, j, x in _tiles(q, k, block_size, _LOG2_E):
        if col_lse is not None:
            other = _like(x, other)
        if shift is None:
            if col_lse is not None and col_grad is not None:
                torch.sub(x, col_lse[j], out=other).exp2_().mul_(col_grad[j])
            x.sub_(row_lse[i, None]).exp2_().mul_(row_grad[i, None])
            if other is not None:
                x.add_(other)
        else:
            if shift:
                x.sub_(shift)
            x.exp2_()
            if col_factor is None:
                x.mul_(row_factor[i, None])
            else:
                x.mul_(torch.add(row_factor[i, None], col_factor[j], out=other))
        if labels is not None and label_grad is not None:
            place = labels[i] - j.start
            here = (place >= 0) & (place < x.shape[1])
            x.scatter_add_(1, place.clamp(0, x.shape[1] - 1)[:, None], (label_grad[i] * here)[:, None])
        dq[i].addmm_(x, k[j])
        dk[j].addmm_(x.T, q[i])
    return dq, dk


@torch.no_grad()
def sigmoid_sweep(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    *,
    diagonal: bool,
    gradients: bool,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Sum of the sigmoid loss over all pairs, and its gradients from the same sweep: they need no sum over a row first.

    With ``x = q @ k.T + bias``: ``softplus(-x)`` for a positive pair, ``softplus(x)`` for any other.

    Args:
        q: (m, d), float32 or float64, the scale already inside.
        k: (n, d), same dtype and device.
        bias: One element, same dtype and device.
        diagonal: Whether row i of ``q`` and row i of ``k`` are a positive pair (m <= n); otherwise no pair is.
        gradients: Also return the gradients.
        block_size: Side of a tile; None chooses one for the device.

    Returns:
        The sum, (); and its gradients ``dq`` (m, d), ``dk`` (n, d), ``dbias`` (), each None without ``gradients``.
    """
    _limits(q, k)
    bias = bias.reshape(())
    # Sums of rows first, then of their vector: a single running number would lose digits over many tiles.
    loss, slope = q.new_zeros(len(q)), q.new_zeros(len(q))
    dq, dk = (torch.zeros_like(q), torch.zeros_like(k)) if gradients else (None, None)
    other = None
    for i, j, x in _tiles(q, k, block_size):
        x.add_(bias)
        if diagonal and i.start == j.start:  # tiles are squares, so the diagonal is theirs
            # A positive pair has no part in the sum of negatives: softplus(-inf) = sigmoid(-inf) = 0.
            x.fill_diagonal_(-torch.inf)
        other = _like(x, other)
        # softplus(x) = max(x, 0) + log1p(exp(-|x|))
        loss[i] += torch.abs(x, out=other).mul_(-_LOG2_E).exp2_().log1p_().sum(1)
        loss[i] += torch.clamp(x, min=0, out=other).sum(1)
        if dq is not None and dk is not None:
            x.sigmoid_()
            slope[i] += x.sum(1)
            dq[i].addmm_(x, k[j])
            dk[j].addmm_(x.T, q[i])
    if diagonal:
        positives = (q * k[: len(q)]).sum(1).add_(bias)
        loss += torch.nn.functional.softplus(-positives, threshold=50)
        if dq is not None and dk is not None:
            pull = (-positives).sigmoid_()
            slope -= pull
            dq.addcmul_(k[: len(q)], pull[:, None], value=-1)
            dk[: len(q)].addcmul_(q, pull[:, None], value=-1)
    return loss.sum(), dq, dk, slope.sum() if gradients else None


def _limits(q: Tensor, k: Tensor) -> _Range:
    if q.dtype not in _RANGES or k.dtype != q.dtype:
        raise TypeError(f"Sweeps take float32 or float64, both alike, not {q.dtype} and {k.dtype}.")
    return _RANGES[q.dtype]


def _bound(q: Tensor, k: Tensor) -> float:
    """An upper bound of |x| over all pairs: the longest rows multiplied. The one value that the host waits for."""
    if not len(q) or not len(k):
        return 0.0
    return (q.norm(dim=1).amax() * k.norm(dim=1).amax()).item()


def _tiles(q: Tensor, k: Tensor, block_size: int | None, factor: float = 1.0) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields row slice, column slice and their tile of ``factor * q @ k.T``.

    All tiles lie in the same memory, which the caller may write.
    """
    size = default_block_size(q.device, q.shape[1]) if block_size is None else block_size
    memory = q.new_empty(min(size, len(q)) * min(size, len(k)))
    for top in range(0, len(q), size):
        i = slice(top, min(top + size, len(q)))
        for left in range(0, len(k), size):
            j = slice(left, min(left + size, len(k)))
            height, width = i.stop - i.start, j.stop - j.start
            tile = memory[: height * width].view(height, width)
            yield i, j, torch.addmm(tile, q[i], k[j].T, beta=0, alpha=factor, out=tile)


def _like(x: Tensor, memory: Tensor | None) -> Tensor:
    """A second tile of the shape of ``x``, in the storage of an earlier one if that is large enough."""
    if memory is None or memory.untyped_storage().nbytes() < x.nbytes:
        return torch.empty_like(x)
    if memory.shape == x.shape:
        return memory
    return memory.new_empty(0).set_(memory.untyped_storage())[: x.numel()].view(x.shape)


def _one_shift_serves(shift: Tensor, row_max: Tensor, col_max: Tensor, spread: float) -> bool:
    """Whether every row and column of a tile keeps its maximum above underflow when all are shifted alike."""
    if shift.device.type != "cpu":
        return False  # to ask would make the host wait at every tile
    return bool(torch.minimum(row_max.amin(), col_max.amin()) >= shift - spread)


def _merge(running_max: Tensor, running_sum: Tensor, tile_max: Tensor, shift: Tensor, tile_sum: Tensor) -> None:
    """Adds a tile's sums of 2 ** (x - shift) to running sums of 2 ** (x - running_max), whose maxima start at -inf."""
    new_max = torch.maximum(running_max, tile_max)
    running_sum.mul_(running_max.sub_(new_max).exp2_()).add_(tile_sum.mul_((shift - new_max).exp2_()))
    running_max.copy_(new_max)


def _natural(maximum: Tensor, total: Tensor) -> Tensor:
    """Natural logarithm of ``total * 2 ** maximum``."""
    return maximum.mul_(_LN_2).add_(total.log_())


def _common_shift(row_lse: Tensor, col_lse: Tensor | None, spread: float) -> float | None:
    """A number by which all x can be shifted in the backward sweep, or None if there is none.

    No x is above the largest log-sum-exp of its side, so 2 ** (x - shift) stays below 2 ** spread if the shift
    is at least that minus the spread; and 2 ** (shift - lse) does if it is at most the smallest log-sum-exp plus the
    spread. All are to base 2.
    """
    sides = [row_lse] if col_lse is None else [row_lse, col_lse]
    if not all(len(side) for side in sides):
        return 0.0
    ends = torch.stack([end for side in sides for end in torch.aminmax(side)]).tolist()
    low, high = min(ends[1::2]) - spread, min(ends[::2]) + spread
    if not low <= high:  # also if one is not a number
        return None
    return 0.0 if low <= 0 <= high else (low + high) / 2
