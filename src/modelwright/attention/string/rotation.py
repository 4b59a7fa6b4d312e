"""The rotation that a model gives its queries, found by looking, and the same rotation by any other distance.

How a family lays its rotary embedding out (halves or neighbouring pairs, all of a head or a part of it, one frequency
table or one per kind of layer) is not in its config. But it shows: one token read at two positions gives two queries
per layer that differ by nothing but the rotation, since a single token attends to itself alone. So a candidate is
accepted when it turns the one query into the other, and a layer that does not rotate is seen too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from modelwright.kernels.shifted_attention import Turn

#: A rotation is taken for the layer's when it misses by less than this share of the query's length. Right ones miss by
#: rounding (bfloat16: 0.01; float32 angles at position 100,000: 0.005), wrong ones by about 1.
TOLERANCE = 0.05


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, start: int = 0
) -> torch.Tensor:
    """Rotates pairs of features; the product is taken in float32, or in float64 for float64 inputs.

    Args:
        x: (..., size), any floating dtype.
        cos: (..., pairs), of the angles; broadcast against ``x``.
        sin: As ``cos``.
        interleaved: Whether a pair is two neighbours; else a pair is a feature of the first half with its fellow of
            the second.
        start: Where the rotated features begin; what lies outside passes through.
    """
    size = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    part = x[..., start : start + size].to(wide)
    cos, sin = cos.to(wide), sin.to(wide)
    if interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part.chunk(2, dim=-1)
    halves = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin))
    turned = torch.stack(halves, dim=-1).flatten(-2) if interleaved else torch.cat(halves, dim=-1)
    turned = turned.to(x.dtype)
    if size == x.shape[-1]:
        return turned
    return torch.cat((x[..., :start], turned, x[..., start + size :]), dim=-1)


@dataclass
class Rotation:
    """A layer's rotary embedding.

    Attributes:
        module: Module that owns the frequencies.
        name: Its buffer with the inverse frequencies, ``(pairs,)``, in radians per position.
        interleaved: See :func:`rotate`.
        start: See :func:`rotate`.
    """

    module: nn.Module
    name: str
    interleaved: bool = False
    start: int = 0
    _last: tuple[object, ...] = field(default=(), repr=False)
    _kept: tuple[torch.Tensor, torch.Tensor, Turn] | None = field(default=None, repr=False)

    @property
    def frequencies(self) -> torch.Tensor:
        """The inverse frequencies as they are now; some models change them with the length of the prompt."""
        return getattr(self.module, self.name)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines, (..., pairs) float64, of positions (...,), which may be negative or fractions."""
        angles = positions.to(torch.float64)[..., None] * self.frequencies.to(positions.device, torch.float64)
        return angles.cos(), angles.sin()

    def by(self, x: torch.Tensor, distance: float) -> torch.Tensor:
        """Rotates all of ``x`` (..., size) by one distance in positions; products are float32, or wider."""
        if distance == 0:
            return x
        cos, sin, _ = self._all(distance, x.shape[-1], x.device, torch.promote_types(x.dtype, torch.float32))
        return rotate(x, cos, sin, interleaved=self.interleaved, start=self.start)

    def turn(self, distance: float, size: int, device: torch.device) -> Turn:
        """Returns the same rotation of heads of a size as float32 tables of all their features, for a kernel."""
        return self._all(distance, size, device, torch.float32)[2]

    def _all(
        self, distance: float, size: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, Turn]:
        # The angles are taken in float64: in bfloat16 or float16 they would be wrong beyond a few hundred positions.
        frequencies = self.frequencies
        # The same for every layer and step, unless the model has set other frequencies since.
        now = (frequencies, frequencies._version, distance, size, device, dtype)
        if self._kept is None or self._last[0] is not frequencies or self._last[1:] != now[1:]:
            cos, sin = (
                table.to(dtype)
                for table in self.tables(torch.tensor(float(distance), device=device, dtype=torch.float64))
            )
            features = torch.arange(size, device=device)
            rotated = features[self.start : self.start + 2 * len(cos)]
            first, second = (rotated[0::2], rotated[1::2]) if self.interleaved else rotated.chunk(2)
            turn = Turn(torch.ones_like(features, dtype=dtype), torch.zeros_like(features, dtype=dtype), features.int())
            turn.cos[first] = turn.cos[second] = cos
            turn.sin[first], turn.sin[second] = -sin, sin
            turn.partner[first], turn.partner[second] = second.int(), first.int()
            self._kept, self._last = (cos, sin, turn), now
        return self._kept

    def at(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotates ``x`` (batch, heads, rows, size) row by row, at positions (rows,) or (batch, rows)."""
        cos, sin = self.tables(positions)
        if positions.ndim == 2:
            cos, sin = cos[:, None], sin[:, None]
        return rotate(x, cos, sin, interleaved=self.interleaved, start=self.start)


def candidates(modules: Iterable[nn.Module], size: int) -> list[Rotation]:
    """Returns every rotation that the frequencies kept in some modules allow for queries of a size."""
    found = []
    for module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name or buffer.ndim != 1 or 2 * len(buffer) > size:
                continue
            starts = {0, size - 2 * len(buffer)}
            found += [Rotation(module, name, pairs, start) for start in sorted(starts) for pairs in (False, True)]
    return found


def match(
    queries: Mapping[int, torch.Tensor], distance: int, modules: Iterable[nn.Module]
) -> dict[int, Rotation | None]:
    """Finds each layer's rotation.

    Args:
        queries: Layer to its queries (2 * tokens, heads, 1, size): the tokens at position 0, then at ``distance``.
        distance: Positions between the two.
        modules: Modules that may own the frequencies.

    Returns:
        Layer to its rotation, or None for one whose queries do not depend on the position. A layer whose queries
        depend on it in a way that is no rotation is left out.
    """
    modules = list(modules)
    found: dict[int, Rotation | None] = {}
    known: list[Rotation] = []
    for layer, both in queries.items():
        wide = torch.promote_types(both.dtype, torch.float32)
        here, there = both.to(wide).chunk(2)
        length = here.norm().clamp(min=torch.finfo(wide).tiny)
        best, choice = float((there - here).norm() / length), None
        # Layers share one object where they can, and with it the tables: others are tried where none of these is right.
        for rotations in (known, candidates(modules, both.shape[-1])):
            if best < TOLERANCE:
                break
            for rotation in rotations:
                if rotation.start + 2 * len(rotation.frequencies) > both.shape[-1]:
                    continue
                miss = float((rotation.by(there, -distance) - here).norm() / length)
                if miss < best:
                    best, choice = miss, rotation
        if best < TOLERANCE:
            found[layer] = choice
            if choice is not None and choice not in known:
                known.append(choice)
    return found
