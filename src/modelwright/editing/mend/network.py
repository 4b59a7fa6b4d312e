"""MEND's networks: they map a gradient's two factors to two better ones (arXiv 2110.11309, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

#: What is added to a standard deviation before it divides.
EPSILON = 1e-7


class RunningMoments(nn.Module):
    """Mean and standard deviation of all rows seen so far (Welford's sums, merged batch by batch).

    Args:
        size: Numbers in a row.
    """

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("squares", torch.zeros(size))

    @torch.no_grad()
    def update(self, rows: torch.Tensor) -> None:
        """Adds rows (n, size)."""
        if not len(rows):
            return
        rows = rows.to(self.mean)
        n, mean = len(rows), rows.mean(0)
        gap, total = mean - self.mean, float(self.count) + n
        self.squares += (rows - mean).square().sum(0) + gap.square() * (float(self.count) * n / total)
        self.mean += gap * (n / total)
        self.count += n

    def deviation(self) -> torch.Tensor:
        """Returns (size,): the standard deviation, of n − 1 degrees of freedom."""
        return (self.squares / max(float(self.count) - 1, 1)).sqrt()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the rows with mean 0 and standard deviation 1."""
        return (rows - self.mean) / (self.deviation() + EPSILON)


class IdentityBlock(nn.Module):
    """z ← z + max(0, s ⊙ (U V z + b) + o), where U starts at 0, so that the block starts as the identity.

    Args:
        size: Numbers in z.
        rank: Rows of V.
        modes: Layers that share the block; each has its own scale s and shift o.
    """

    def __init__(self, size: int, rank: int, modes: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(size, rank))
        self.down = nn.Parameter(torch.randn(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(modes, size))
        self.shift = nn.Parameter(torch.zeros(modes, size))

    def forward(self, z: torch.Tensor, mode: int) -> torch.Tensor:
        """Returns (n, size) for (n, size)."""
        before = self.scale[mode] * ((z @ self.down.T) @ self.up.T + self.bias) + self.shift[mode]
        # clamp's gradient at 0 is 1, relu's is 0: at the start, all is 0, and relu would never learn.
        return z + before.clamp(min=0)


class GradientTransform(nn.Module):
    """One network for all weights of one shape.

    Args:
        in_features: Inputs of the linear maps.
        out_features: Their outputs.
        modes: How many maps share the network.
        rank: Of the blocks; more than ``in_features + out_features`` would add nothing, and is cut to that.
        hidden: Blocks before the last.
        normalise: Whether factors are normalised before they enter.
    """

    def __init__(
        self, in_features: int, out_features: int, modes: int, rank: int = 1920, hidden: int = 1, normalise: bool = True
    ) -> None:
        super().__init__()
        size = in_features + out_features
        self.in_features = in_features
        self.normalise = normalise
        self.inputs = RunningMoments(in_features)
        self.gradients = RunningMoments(out_features)
        self.blocks = nn.ModuleList(IdentityBlock(size, min(rank, size), modes) for _ in range(hidden + 1))

    def observe(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Adds rows to the running moments; done in training only."""
        self.inputs.update(inputs)
        self.gradients.update(gradients)

    def forward(self, inputs: torch.Tensor, gradients: torch.Tensor, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps the factors of one weight's gradient.

        Args:
            inputs: (n, in_features): the map's inputs x, float32.
            gradients: (n, out_features): the loss's gradients δ at its outputs, float32.
            mode: Number of the map among those that share the network.

        Returns:
            x̃ and δ̃, of the same shapes.
        """
        if self.normalise:
            inputs, gradients = self.inputs(inputs), self.gradients(gradients)
        z = torch.cat((inputs, gradients), dim=1)
        for block in self.blocks:
            z = block(z, mode)
        return z[:, : self.in_features], z[:, self.in_features :]


def nonzero_rows(inputs: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows where both factors are not zero: the others add nothing to the gradient, and would disturb the
    moments.

    Args:
        inputs: (…, in_features).
        gradients: (…, out_features).
    """
    inputs, gradients = inputs.flatten(0, -2), gradients.flatten(0, -2)
    kept = (inputs != 0).any(1) & (gradients != 0).any(1)
    return inputs[kept], gradients[kept]


class MendNetworks(nn.Module):
    """The networks of all weights that are edited, and each weight's learned rate.

    Args:
        maps: Name, inputs and outputs of each linear map. Maps of one shape share a network.
        rank: See :class:`GradientTransform`.
        hidden: See :class:`GradientTransform`.
        normalise: See :class:`GradientTransform`.
        rate: Where each weight's rate starts. The change is *plus* the rate times the transformed gradient, as in the
            original code, so a positive one starts as a tiny step up the loss and training has to turn it round; with a
            negative one it starts as descent.
    """

    def __init__(
        self,
        maps: Sequence[tuple[str, int, int]],
        *,
        rank: int = 1920,
        hidden: int = 1,
        normalise: bool = True,
        rate: float = 1e-4,
    ) -> None:
        super().__init__()
        self.maps = [(name, inputs, outputs) for name, inputs, outputs in maps]
        self.options: dict[str, Any] = {"rank": rank, "hidden": hidden, "normalise": normalise, "rate": rate}
        shapes = [(inputs, outputs) for _, inputs, outputs in self.maps]
        self._keys = [f"{inputs}x{outputs}" for inputs, outputs in shapes]
        self._modes = [self._keys[:i].count(key) for i, key in enumerate(self._keys)]
        self.transforms = nn.ModuleDict(
            {
                f"{inputs}x{outputs}": GradientTransform(
                    inputs, outputs, shapes.count((inputs, outputs)), rank, hidden, normalise
                )
                for inputs, outputs in dict.fromkeys(shapes)
            }
        )
        self.rates = nn.Parameter(torch.full((len(self.maps),), rate))

    def observe(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Adds the factors of a gradient, map by map, to the running moments."""
        for key, (inputs, gradients) in zip(self._keys, factors, strict=True):
            cast(GradientTransform, self.transforms[key]).observe(inputs, gradients)

    def trained(self) -> bool:
        """Whether the moments have seen what normalising needs."""
        return all(
            not transform.normalise or float(transform.inputs.count) >= 2
            for transform in map(partial(cast, GradientTransform), self.transforms.values())
        )

    def forward(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns each map's change ΔW = leftᵀ right, as left (n, out_features) and right (n, in_features).

        Args:
            factors: x and δ of each map, as :func:`~modelwright.editing.mend.factors.gradient_factors` gives them.
        """
        changes = []
        for number, (key, mode, (inputs, gradients)) in enumerate(zip(self._keys, self._modes, factors, strict=True)):
            right, left = self.transforms[key](inputs, gradients, mode)
            changes.append((self.rates[number] * left, right))
        return changes
