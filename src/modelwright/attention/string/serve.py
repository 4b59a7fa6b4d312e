"""Which path serves a call: one Triton pass, torch's fused kernels over parts, or scores held a few rows at a time."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import torch

from modelwright.attention.string.hook import Call
from modelwright.attention.string.masked import masked_attention
from modelwright.attention.string.two_pass import can_two_pass, two_pass_attention
from modelwright.kernels import triton_or_none
from modelwright.kernels.shifted_attention import Turn, shifted_attention
from modelwright.models.loading import first_line

Path = Literal["cpu", "flash", "cudnn", "triton"]

#: What serves a GPU's calls: the first that can. On an H100 plain attention is cuDNN's, and the one pass of Triton has
#: two thirds of its speed; cuDNN in parts is nearer, but costs calls, copies and memory, which only long calls repay.
FEW: tuple[Path, ...] = ("triton", "flash")
MANY: tuple[Path, ...] = ("triton", "flash")
LONG: tuple[Path, ...] = ("cudnn", "triton", "flash")
#: Rows from which a call is long.
LONG_ROWS = 32_768
#: Rows times heads of a group that are few.
FEW_ROWS = 64


def serve(call: Call, *, shift: int, window: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with STRING's positions.

    Args:
        call: A layer's call.
        shift: Distance in tokens from which keys are far.
        window: Positions kept for true neighbours.

    Returns:
        Outputs (batch, heads, rows, value size), and weights (batch, heads, rows, keys) or None.
    """
    return by_path(call, path_of(call), shift=shift, window=window)


def by_path(call: Call, path: Path | None, *, shift: int, window: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends as :func:`serve`, by a path that can serve the call."""
    rotation = call.rotation
    if rotation is None:  # positions do not matter to it, so no key is far
        shift = max(shift, call.key.shape[2])

    def to_far(query: torch.Tensor) -> torch.Tensor:
        return query if rotation is None else rotation.by(query, window - shift)

    if path is None:
        return masked_attention(
            call.query, call.key, call.value, to_far, shift,
            scaling=call.scaling, mask=call.mask, places=call.places, softcap=call.softcap, dropout=call.dropout,
            weights=call.weights,
        )  # fmt: skip
    if path == "triton":
        size, device = call.query.shape[-1], call.query.device
        turn = _still(size, device) if rotation is None else rotation.turn(window - shift, size, device)
        lefts = call.lefts if call.mask is not None else None
        return _triton().shifted_attention(
            call.query, call.key, call.value, turn, shift, scaling=call.scaling, lefts=lefts
        ), None
    if call.mask is None:
        out = two_pass_attention(
            call.query, call.key, call.value, to_far, shift, scaling=call.scaling, kernel=path
        )  # fmt: skip
        return out, None
    # Each row of the batch without its padding, as if it were alone.
    assert call.lefts is not None
    out = call.query.new_zeros((*call.query.shape[:3], call.value.shape[-1]))
    rows, keys = call.query.shape[2], call.key.shape[2]
    for row, left in enumerate(call.lefts):
        own = min(rows, keys - left)
        if own < 1:
            continue
        out[row : row + 1, :, rows - own :] = two_pass_attention(
            call.query[row : row + 1, :, rows - own :], call.key[row : row + 1, :, left:],
            call.value[row : row + 1, :, left:], to_far, shift, scaling=call.scaling, kernel=path,
        )  # fmt: skip
    return out, None


def path_of(call: Call) -> Path | None:
    """Returns the fastest path that serves a call; None for the one that serves every call."""
    padded = call.mask is not None
    if call.softcap is not None or call.dropout or call.weights or (padded and call.lefts is None):
        return None
    query, key, value = call.query, call.key, call.value
    rows, groups = query.shape[2], query.shape[1] // key.shape[1]
    device = query.device.type
    paths: tuple[Path, ...] = ("cpu",) if device == "cpu" else ()
    if device == "cuda":
        paths = FEW if rows * groups <= FEW_ROWS else LONG if rows >= LONG_ROWS and not padded else MANY
    for path in paths:
        if path == "triton":
            if (kernels := _triton()) is None or not kernels.can_shift(query, key, value):
                continue
        elif (padded and rows == 1) or not can_two_pass(query, value, path):
            continue
        if path == "cpu" or works(path, query.device, query.dtype, query.shape[-1], groups):
            return path
    return None


@functools.cache
def works(path: Path, device: torch.device, dtype: torch.dtype, size: int, groups: int) -> bool:
    """Whether a path gives the right answer with this torch, on this device: tried once, on something small."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 160, size, generator=generator).to(device, dtype) for heads in (groups, 1, 1)
    )
    still = _still(size, device)
    back = Turn(-still.cos, still.sin, still.partner)  # every feature turned by half a turn
    options: dict[str, Any] = {"scaling": size**-0.5}

    def attend(part: torch.Tensor) -> torch.Tensor:
        if path == "triton":
            return _triton().shifted_attention(part, key, value, back, 70, **options)
        return two_pass_attention(part, key, value, torch.neg, 70, kernel=path, **options)

    try:
        with torch.no_grad():
            for rows in (160, 1):
                part = query[:, :, -rows:]
                expected = shifted_attention(part.double(), key.double(), value.double(), back, 70, **options)
                for _ in range(2):  # the second call of a kernel may take a shorter way
                    found = attend(part)
                    if not float((found.double() - expected).abs().max()) < 0.1:
                        raise RuntimeError("its answer is wrong")
    except Exception as error:  # whatever it is, another path serves
        warnings.warn(
            f"The path '{path}' for shifted attention does not work here ({first_line(error)}): a slower one is used.",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _still(size: int, device: torch.device) -> Turn:
    return Turn(
        torch.ones(size, device=device), torch.zeros(size, device=device),
        torch.arange(size, device=device, dtype=torch.int32),
    )  # fmt: skip


def _triton() -> Any:
    return triton_or_none("shifted_attention_triton")
