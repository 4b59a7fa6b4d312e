"""Numbers in 8, 4, 2 or 1 bits: quantised in groups between their least and greatest, and really packed into bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

#: Bits of a code that bytes are packed from.
BITS = (8, 4, 2, 1)
#: Bytes of a chunk of floats that is unpacked at a time: what a core's cache holds, and what fills a GPU.
_CHUNK = {"cpu": 4 << 20, "other": 256 << 20}


@dataclass(frozen=True)
class Packed:
    """Keys or values of whole segments of tokens.

    A byte holds ``8 / bits`` tokens of the same feature: bits ``k * bits`` and up of row j of a segment are token
    ``k * rows + j``, so that each mask of bits is a run of neighbouring tokens. A number is ``minimum + code * scale``.

    Attributes:
        codes: (batch, heads, segments, rows, size) uint8, with ``rows = segment length * bits / 8``.
        scale: Of each group, float16 or float32. Groups along tokens: (batch, heads, segments, segment length / group
            size, size). Groups along channels: (batch, heads, segments, segment length, size / group size).
        minimum: As ``scale``: the group's least number, rounded down.
        bits: Of a code: 8, 4, 2 or 1.
        group_size: Numbers that share a scale.
        along: Whether a group is neighbouring tokens of one channel, or neighbouring channels of one token.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    bits: int
    group_size: int
    along: Literal["tokens", "channels"]

    @property
    def segments(self) -> int:
        """Segments of tokens."""
        return self.codes.shape[2]

    @property
    def segment_length(self) -> int:
        """Tokens of a segment."""
        return self.codes.shape[3] * 8 // self.bits

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return self.segments * self.segment_length

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return int(self.codes.nbytes + self.scale.nbytes + self.minimum.nbytes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Returns the same with all three tensors changed alike, along batch, heads or segments."""
        return replace(self, codes=change(self.codes), scale=change(self.scale), minimum=change(self.minimum))

    def cut(self, begin: int, end: int) -> Packed:
        """Returns some of the segments, as copies that keep nothing else alive."""
        return self.map(lambda t: t[:, :, begin:end].clone())

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the numbers, (batch, heads, tokens, size); they are computed in float32."""
        batch, heads, segments, _, size = self.codes.shape
        codes, length = unpack(self.codes, self.bits).float(), self.segment_length
        grouped = codes.view(_grouped((batch, heads, segments, length, size), self.group_size, self.along))
        axis = -2 if self.along == "tokens" else -1
        # Not one fused operation: whether that rounds once or twice may depend on how many segments there are.
        grouped.mul_(self.scale.unsqueeze(axis)).add_(self.minimum.unsqueeze(axis))
        return codes.view(batch, heads, segments * length, size).to(dtype)

    def chunks(self) -> list[tuple[int, Packed]]:
        """Returns views of runs of segments that are small once unpacked, each with its first token."""
        batch, heads, segments, _, size = self.codes.shape
        room = _CHUNK["cpu" if self.codes.device.type == "cpu" else "other"]
        step = max(1, room // (4 * batch * heads * self.segment_length * size))
        if step >= segments:
            return [(0, self)]
        return [
            (at * self.segment_length, self.map(lambda t, at=at: t[:, :, at : at + step]))  # type: ignore[misc]
            for at in range(0, segments, step)
        ]

    def at(self, bits: int) -> Packed:
        """Returns the same numbers in other bits, in the same groups; in the same bits it is what it was."""
        if bits == self.bits:
            return self
        batch, heads, segments, _, size = self.codes.shape
        numbers = self.dequantised().view(batch, heads, segments, self.segment_length, size)
        return quantise(numbers, bits, self.group_size, self.along, self.scale.dtype)


@torch.no_grad()
def quantise(
    x: Tensor, bits: int, group_size: int, along: Literal["tokens", "channels"], metadata: torch.dtype = torch.float16
) -> Packed:
    """Quantises and packs: ``code = round((x - minimum) / scale)`` with ``scale = (max - minimum) / (2**bits - 1)``.

    Scale and minimum are rounded to ``metadata`` before the codes are found, the minimum downwards, so that no number
    is more than half a scale off. (bfloat16 would be too coarse a scale for that in 8 bits.) A group of equal numbers
    has scale 1; without that guard its codes were 0 / 0. Numbers beyond the range of ``metadata`` are held as its
    bounds. All is computed in float32, where codes, scales and minima are those of KIVI's code; in float16 it rounds
    after every operation, and then a few codes (one in twenty of 8 bits) are one off ours.

    Args:
        x: (batch, heads, segments, segment length, size), of any float dtype.
        bits: 8, 4, 2 or 1.
        group_size: Divides the segment length (groups along tokens) or the size (along channels).
        along: See :class:`Packed`.
        metadata: Of scales and minima: float16 or float32.
    """
    axis = -2 if along == "tokens" else -1
    grouped = x.float().reshape(_grouped(x.shape, group_size, along))
    low, high = torch.aminmax(grouped, dim=axis)
    minimum = round_down(low, metadata)
    spread, most = high - minimum.float(), 2**bits - 1
    scale = (spread / most).clamp_(max=torch.finfo(metadata).max).to(metadata)
    if metadata == torch.float16:
        # Float16 is coarse near 0: the next number up where the greatest would else be cut off.
        above = (scale.view(torch.int16) + 1).view(metadata)
        scale = torch.where((spread > (most + 0.5) * scale.float()) & torch.isfinite(above), above, scale)
    scale = torch.where(spread > 0, scale, torch.ones_like(scale))
    codes = (grouped - minimum.float().unsqueeze(axis)).div_(scale.float().unsqueeze(axis)).round_()
    codes = codes.clamp_(0, 2**bits - 1).to(torch.uint8).view(x.shape)
    return Packed(pack(codes, bits), scale, minimum, bits, group_size, along)


def _grouped(shape: Sequence[int], group_size: int, along: str) -> tuple[int, ...]:
    batch, heads, segments, length, size = shape
    if along == "tokens":
        return batch, heads, segments, length // group_size, group_size, size
    return batch, heads, segments, length, size // group_size, group_size


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the greatest numbers of a dtype, float16 or float32, that are not above ``x`` (float32).

    Numbers beyond float16's range become its bounds.
    """
    if dtype == torch.float32:
        return x
    x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    near = x.to(dtype)
    # Neighbours of a float differ by 1 when they are read as whole numbers. (torch.nextafter lacks float16.)
    bits = near.view(torch.int16)
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, torch.full_like(bits, -(2**15) + 1)))
    return torch.where(near.float() > x, below.view(dtype), near)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (…, length, size) uint8 below ``2**bits`` into bytes (…, length * bits / 8, size)."""
    if bits == 8:
        return codes
    each = 8 // bits
    runs = codes.view(*codes.shape[:-2], each, codes.shape[-2] // each, codes.shape[-1])
    packed = runs[..., 0, :, :].clone()
    for k in range(1, each):
        packed |= runs[..., k, :, :] << (k * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Returns the codes (…, length, size) uint8 of :func:`pack`."""
    if bits == 8:
        return packed
    runs = (packed.unsqueeze(-3) >> _shifts(bits, packed.device)).bitwise_and_(2**bits - 1)
    return runs.view(*packed.shape[:-2], 8 // bits * packed.shape[-2], packed.shape[-1])


@functools.cache
def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).view(-1, 1, 1)
