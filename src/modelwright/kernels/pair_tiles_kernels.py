# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Kernels cannot be annotated: Triton looks the names up.
"""The Triton kernels of :mod:`modelwright.kernels.pair_tiles_triton`, which says how they are used.

Logits are to base 2 for the softmax kernels (``unit``, by which products are multiplied, holds log2(e)). Matrices are
contiguous, their widths multiples of a slice.
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    q,
    q_low,
    k,
    k_low,
    row,
    col,
    m,
    n,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLICE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A block of ``q @ k.T`` from ``row`` and ``col`` on. Beyond the last row and column it repeats them."""
    # The block's place in 64 bits: two million rows of width 1024 have more elements than 32 bits can count.
    r = tl.minimum(tl.arange(0, ROWS), m - 1 - row)
    c = tl.minimum(tl.arange(0, COLS), n - 1 - col)
    d = tl.arange(0, SLICE)
    row_at = row.to(tl.int64) * WIDTH + (r[:, None] * WIDTH + d[None, :])
    col_at = col.to(tl.int64) * WIDTH + (c[None, :] * WIDTH + d[:, None])
    x = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, WIDTH, SLICE):
        a = tl.load(q + row_at + start)
        b = tl.load(k + col_at + start)
        if SPLIT:
            x = tl.dot(tl.load(q_low + row_at + start), b, x)
            x = tl.dot(a, tl.load(k_low + col_at + start), x)
        x = tl.dot(a, b, x)
    return x


@triton.jit
def _merge(running_max, running_sum, x, AXIS: tl.constexpr):
    """Adds a block to the running maximum and sum of powers of two of its rows (axis 1) or columns (axis 0)."""
    new_max = tl.maximum(running_max, tl.max(x, AXIS))
    # Rows and columns beyond the last have nothing but -inf: -inf - -inf would be NaN.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    terms = tl.exp2(x - tl.expand_dims(shift, AXIS))
    return new_max, running_sum * tl.exp2(running_max - shift) + tl.sum(terms, AXIS)


@triton.jit
def softmax_kernel(
    q,
    q_low,
    k,
    k_low,
    unit,
    row_max,
    row_sum,
    col_max,
    col_sum,
    fixed_shift,
    m,
    n,
    rows_each,
    cols_each,
    FIXED: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLICE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Sums of powers of two of the rows of a group over the columns of a group, and of the columns over the rows.

    With FIXED all logits are shifted by one number; else each row and column by its own maximum, which is kept too.
    """
    row_group, col_group = tl.program_id(0), tl.program_id(1)
    row_end = tl.minimum((row_group + 1) * rows_each, tl.cdiv(m, ROWS))
    col_end = tl.minimum((col_group + 1) * cols_each, tl.cdiv(n, COLS))
    factor = tl.load(unit)
    for col_block in range(col_group * cols_each, col_end):
        col = col_block * COLS
        cols = col + tl.arange(0, COLS)
        c_max = tl.full((COLS,), -float("inf"), tl.float32)
        c_sum = tl.zeros((COLS,), tl.float32)
        for row_block in range(row_group * rows_each, row_end):
            row = row_block * ROWS
            rows = row + tl.arange(0, ROWS)
            x = _product(q, q_low, k, k_low, row, col, m, n, WIDTH, ROWS, COLS, SLICE, SPLIT) * factor
            if col + COLS > n:
                x = tl.where((cols < n)[None, :], x, -float("inf"))
            if row + ROWS > m:
                x = tl.where((rows < m)[:, None], x, -float("inf"))
            at = col_group.to(tl.int64) * m + rows
            r_sum = tl.load(row_sum + at, mask=rows < m, other=0.0)
            if FIXED:
                terms = tl.exp2(x - fixed_shift)
                r_sum += tl.sum(terms, 1)
                c_sum += tl.sum(terms, 0)
            else:
                r_max = tl.load(row_max + at, mask=rows < m, other=-float("inf"))
                r_max, r_sum = _merge(r_max, r_sum, x, 1)
                tl.store(row_max + at, r_max, mask=rows < m)
                if COLUMNS:
                    c_max, c_sum = _merge(c_max, c_sum, x, 0)
            tl.store(row_sum + at, r_sum, mask=rows < m)
            # The next column block reads what is stored here, perhaps in other threads of this program.
            tl.debug_barrier()
        if COLUMNS:
            at = row_group.to(tl.int64) * n + cols
            tl.store(col_max + at, c_max, mask=cols < n)
            tl.store(col_sum + at, c_sum, mask=cols < n)


@triton.jit
def _store(
    weights, weights_low, gradient, row, col, m, n, stride, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr
):
    """Stores weights, scaled already, as one float16 or two."""
    r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    inside = (r < m)[:, None] & (c < n)[None, :]
    at = r[:, None] * stride + c[None, :]
    high = gradient.to(tl.float16)
    tl.store(weights + at, high, mask=inside)
    if SPLIT:
        tl.store(weights_low + at, (gradient - high.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def softmax_weights_kernel(
    q,
    q_low,
    k,
    k_low,
    weights,
    weights_low,
    m,
    n,
    stride,
    unit,
    row_log,
    row_factor,
    col_log,
    col_factor,
    labels,
    label_factor,
    first_col,
    shift,
    BOTH: tl.constexpr,
    COMMON: tl.constexpr,
    LABELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLICE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The derivative with respect to the logits: of the rows' log-sum-exps, with BOTH of the columns' too.

    With LABELS also of each row's own logit.
    """
    row, col = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    x = _product(q, q_low, k, k_low, row, col, m, n, WIDTH, ROWS, COLS, SLICE, SPLIT) * tl.load(unit)
    rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    r_factor = tl.load(row_factor + rows, mask=rows < m, other=0.0)
    # Rows and columns beyond the last are not stored.
    if COMMON:
        terms = tl.exp2(x - shift)
        if BOTH:
            gradient = terms * (r_factor[:, None] + tl.load(col_factor + cols, mask=cols < n, other=0.0)[None, :])
        else:
            gradient = terms * r_factor[:, None]
    else:
        r_log = tl.load(row_log + rows, mask=rows < m, other=0.0)
        gradient = r_factor[:, None] * tl.exp2(x - r_log[:, None])
        if BOTH:
            c_log = tl.load(col_log + cols, mask=cols < n, other=0.0)
            c_factor = tl.load(col_factor + cols, mask=cols < n, other=0.0)
            gradient += c_factor[None, :] * tl.exp2(x - c_log[None, :])
    if LABELS:
        label = tl.load(labels + rows, mask=rows < m, other=-1) - first_col
        if (tl.max(label, 0) >= col) & (tl.min(label, 0) < col + COLS):
            own = tl.load(label_factor + rows, mask=rows < m, other=0.0)
            gradient += tl.where(label[:, None] == cols[None, :], own[:, None], 0.0)
    _store(weights, weights_low, gradient, row, col, m, n, stride, ROWS, COLS, SPLIT)


@triton.jit
def sigmoid_kernel(
    q,
    q_low,
    k,
    k_low,
    weights,
    weights_low,
    m,
    n,
    stride,
    unit,
    bias,
    loss,
    slope,
    below_diagonal,
    DIAGONAL: tl.constexpr,
    GRADIENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLICE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Each row's loss over a block's columns; with GRADIENTS its derivative by the bias, and by the logits."""
    row, col = tl.program_id(0) * ROWS, tl.program_id(1) * COLS
    x = _product(q, q_low, k, k_low, row, col, m, n, WIDTH, ROWS, COLS, SLICE, SPLIT) * tl.load(unit) + tl.load(bias)
    rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    inside = (cols < n)[None, :] & (rows < m)[:, None]
    z = tl.where(inside, x, 0.0)
    positive = (rows + below_diagonal)[:, None] == cols[None, :]
    if DIAGONAL:
        z = tl.where(positive, -z, z)
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
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
    at = tl.program_id(1) * m + rows
    tl.store(loss + at, tl.sum(tl.where(inside, tl.maximum(z, 0.0) + 2.0 * s * series, 0.0), 1), mask=rows < m)
    if GRADIENTS:
        gradient = tl.where(z >= 0, 1.0, e) / (1.0 + e)
        if DIAGONAL:
            gradient = tl.where(positive, -gradient, gradient)
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(slope + at, tl.sum(gradient, 1), mask=rows < m)
        _store(weights, weights_low, gradient * 16384.0, row, col, m, n, stride, ROWS, COLS, SPLIT)
