"""STRING at the speed of plain causal attention: fused attention over parts of the triangle, merged by log-sum-exp.

The near band and the far triangle together hold exactly the pairs of plain causal attention, so nothing is computed
twice and nothing of (rows, keys) is ever held. With torch's flash kernel on a GPU they are two calls: a sliding window,
and a causal triangle of far queries. The CPU's kernel and cuDNN's know no window, so a block of rows there sees its
near keys in three parts: the causal triangle of its own rows, the keys that all its rows see, and, turned round in both
directions so that it is causal too, the triangle in which the window ends.

The calls that return log-sum-exps are private in torch: ``_scaled_dot_product_flash_attention_for_cpu``,
``_flash_attention_forward`` and ``_scaled_dot_product_cudnn_attention`` of ``torch.ops.aten``. On a GPU each is asked
for a small answer before it is trusted with more (:func:`modelwright.attention.string.serve.works`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch

from modelwright.kernels import triton_or_none

Kernel = Literal["cpu", "flash", "cudnn"]

#: Rows of which the merge holds a float32 copy at a time.
MERGED_ROWS = 4096


def can_two_pass(query: torch.Tensor, value: torch.Tensor, kernel: Kernel) -> bool:
    """Whether a fused kernel takes these tensors (and no gradient is wanted: they give none for the log-sum-exp)."""
    if torch.is_grad_enabled() and (query.requires_grad or value.requires_grad):
        return False
    size = query.shape[-1]
    if value.shape[-1] != size or (query.device.type == "cpu") != (kernel == "cpu"):
        return False
    if kernel == "cpu":
        return query.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    most = 128 if kernel == "cudnn" else 256
    return query.dtype in (torch.float16, torch.bfloat16) and size <= most and size % 8 == 0


def two_pass_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    to_far: Callable[[torch.Tensor], torch.Tensor],
    shift: int,
    *,
    scaling: float,
    kernel: Kernel = "cpu",
) -> torch.Tensor:
    """Attends causally over all keys, near ones with the query, far ones with the far query; no padding, no gradient.

    Args:
        query: (batch, heads, rows, size), rotated; they belong to the last ``rows`` keys.
        key: (batch, key heads, keys, size), rotated.
        value: (batch, key heads, keys, size).
        to_far: Turns queries by ``window - shift`` positions.
        shift: Distance from which a key is far.
        scaling: Factor of the scores.
        kernel: Which of torch's fused kernels does the parts.

    Returns:
        (batch, heads, rows, size) in the query's dtype. Log-sum-exps and the merge are float32, or float64 for
        float64 inputs.
    """
    rows, keys = query.shape[2], key.shape[2]
    first = keys - rows
    far_row = max(shift - first, 0)  # first of our rows that sees a far key
    if far_row >= rows:
        return _near(query, key, value, shift, scaling, kernel)[0]
    if shift == 0:
        return _causal(to_far(query), key, value, scaling, kernel)[0]
    out, lse = _near(query, key, value, shift, scaling, kernel)
    far_out, far_lse = _causal(
        to_far(query[:, :, far_row:]), key[:, :, : keys - shift], value[:, :, : keys - shift], scaling, kernel
    )
    _merge(out[:, :, far_row:], lse[:, :, far_row:], far_out, far_lse, last=True)
    return out


def _near(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shift: int, scaling: float, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends over distances 0 to shift - 1; a window of shift keys, the row's own among them."""
    rows, keys = query.shape[2], key.shape[2]
    if rows == 1:
        return _fused(query, key[:, :, -shift:], value[:, :, -shift:], scaling, kernel, causal=False)
    if kernel == "flash":
        return _fused(query, key, value, scaling, kernel, causal=True, window=shift)
    first = keys - rows
    blocks = [(first + a, first + b) for a, b in _blocks(first, rows, shift)]
    if len(blocks) == 1 and first == 0:
        return _fused(query, key, value, scaling, kernel, causal=True)
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    lses = query.new_empty(query.shape[:3], dtype=wide)
    for begin, end in blocks:
        part = query[:, :, begin - first : end - first]
        found, lse = _fused(part, key[:, :, begin:end], value[:, :, begin:end], scaling, kernel, causal=True)
        if kernel == "cpu":
            found = found.to(wide)  # merged up to three times
        common = max(0, end - shift)
        if common < begin:  # keys before the block that all its rows see
            span = slice(common, begin)
            _merge(found, lse, *_fused(part, key[:, :, span], value[:, :, span], scaling, kernel, causal=False))
        if begin >= shift and end - begin > 1:
            # Row i of the block sees keys i, i + 1, … of these; read backwards that is a causal triangle.
            span = slice(begin - shift + 1, end - shift)
            before, before_lse = _fused(
                part[:, :, :-1].flip(2), key[:, :, span].flip(2), value[:, :, span].flip(2), scaling, kernel,
                causal=True,
            )  # fmt: skip
            _merge(found[:, :, :-1], lse[:, :, :-1], before.flip(2), before_lse.flip(2))
        out[:, :, begin - first : end - first] = found
        lses[:, :, begin - first : end - first] = lse
    return out, lses


def _blocks(first: int, rows: int, shift: int) -> list[tuple[int, int]]:
    """Returns our rows in blocks of at most ``shift``; none has rows on both sides of the first far one."""
    edges = [0]
    while edges[-1] < rows:
        place = first + edges[-1]
        edges.append(min(rows, (place // shift + 1) * shift - first))
    return list(pairwise(edges))


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends causally when the last row sees the last key."""
    rows, keys = query.shape[2], key.shape[2]
    if rows == 1:
        return _fused(query, key, value, scaling, kernel, causal=False)
    if rows == keys or kernel == "flash":
        return _fused(query, key, value, scaling, kernel, causal=True)
    # These kernels let the first row see the first key only, so what all rows see is a call of its own.
    before = keys - rows
    out, lse = _fused(query, key[:, :, before:], value[:, :, before:], scaling, kernel, causal=True)
    _merge(out, lse, *_fused(query, key[:, :, :before], value[:, :, :before], scaling, kernel, causal=False))
    return out, lse


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    kernel: Kernel,
    *,
    causal: bool,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls torch's kernel: outputs (batch, heads, rows, size) and their log-sum-exps (batch, heads, rows)."""
    aten = torch.ops.aten
    rows, groups = query.shape[2], query.shape[1] // key.shape[1]
    if kernel == "cpu":
        if causal or groups == 1 or rows > 16:
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scaling)
        # Few rows: the heads of a group as rows of one, so that their keys are read once.
        packed = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(packed, key, value, 0.0, False, scale=scaling)
        return out.unflatten(2, (groups, rows)).flatten(1, 2), lse.unflatten(2, (groups, rows)).flatten(1, 2)
    if kernel == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scaling
        )
        return out, lse.reshape(query.shape[:3])
    # Its causal rule is that the last row sees the last key, and so is its window's.
    out, lse, *_ = aten._flash_attention_forward(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, None, rows, key.shape[2], 0.0,
        causal and window is None, False, scale=scaling,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _merge(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor, *, last: bool = False
) -> None:
    """Merges attention over further keys into ``out`` (batch, heads, rows, size), and ``lse`` unless ``last``."""
    if out.is_cuda and (kernels := triton_or_none("shifted_attention_triton")) is not None:
        kernels.merge(out, lse, more, more_lse)
        return
    share = torch.sigmoid(more_lse - lse)[..., None]
    if out.dtype == share.dtype:
        out.lerp_(more.to(share.dtype), share)
    else:
        for begin in range(0, out.shape[2], MERGED_ROWS):
            rows = slice(begin, begin + MERGED_ROWS)
            old = out[:, :, rows].to(share.dtype)
            out[:, :, rows] = old.lerp_(more[:, :, rows].to(share.dtype), share[:, :, rows]).to(out.dtype)
    if not last:
        lse.copy_(torch.logaddexp(lse, more_lse))
