"""What is added to a weight: factors of low rank, some columns, or a whole tensor; or what stands in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


class Delta(ABC):
    """What is done to one parameter. Shapes are the parameter's own, which Conv1D keeps as (in, out)."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the parameter."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """Returns the whole addition, in the parameter's layout."""

    def norm(self) -> float:
        """Returns its Frobenius norm."""
        return float(self.dense().double().norm())

    def is_finite(self) -> bool:
        """Whether it holds numbers only."""
        return all(bool(t.isfinite().all()) for t in self.to_tensors()[1].values() if t.is_floating_point())

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the sum, computed in float32 or better, in the weight's dtype and on its device."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.detach().to(wide) + self.to(weight.device, wide).dense()).to(weight.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Delta:
        """Returns it on a device, its numbers in a dtype."""
        described, tensors = self.to_tensors()
        moved = {n: t.to(device, dtype if t.is_floating_point() else t.dtype) for n, t in tensors.items()}
        return from_tensors(described, moved)

    @abstractmethod
    def to_tensors(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns a description (JSON) and tensors, from which :func:`from_tensors` makes it again."""


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """``u @ v`` for a weight that maps in to out.

    Attributes:
        u: (out, rank).
        v: (rank, in).
        transposed: The parameter is kept as (in, out).
    """

    u: torch.Tensor
    v: torch.Tensor
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """See :class:`Delta`."""
        sides = (self.u.shape[0], self.v.shape[1])
        return torch.Size(sides[::-1] if self.transposed else sides)

    @property
    def rank(self) -> int:
        """Number of factors, an upper bound of the matrix's rank."""
        return self.u.shape[1]

    def dense(self) -> torch.Tensor:
        """See :class:`Delta`."""
        return self.v.T @ self.u.T if self.transposed else self.u @ self.v

    def norm(self) -> float:
        """See :class:`Delta`; from the factors' Gram matrices."""
        u, v = self.u.double(), self.v.double()
        return float(((u.T @ u) * (v @ v.T)).sum().clamp(min=0).sqrt())

    def to_tensors(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See :class:`Delta`."""
        return {"form": "low rank", "transposed": self.transposed}, {"u": self.u, "v": self.v}


@dataclass(frozen=True, eq=False)
class Columns(Delta):
    """Additions to some columns of a weight that maps in to out: to what leaves some of its inputs.

    Attributes:
        index: (k,) int64: which inputs.
        values: (out, k).
        inputs: Inputs of the weight.
        transposed: The parameter is kept as (in, out).
    """

    index: torch.Tensor
    values: torch.Tensor
    inputs: int
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """See :class:`Delta`."""
        sides = (self.values.shape[0], self.inputs)
        return torch.Size(sides[::-1] if self.transposed else sides)

    def dense(self) -> torch.Tensor:
        """See :class:`Delta`; a column named twice gets both additions."""
        whole = self.values.new_zeros(self.values.shape[0], self.inputs).index_add(1, self.index, self.values)
        return whole.T if self.transposed else whole

    def to_tensors(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See :class:`Delta`."""
        described = {"form": "columns", "inputs": self.inputs, "transposed": self.transposed}
        return described, {"index": self.index, "values": self.values}


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """A whole tensor, in the parameter's layout.

    Attributes:
        values: What is added.
    """

    values: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """See :class:`Delta`."""
        return self.values.shape

    def dense(self) -> torch.Tensor:
        """See :class:`Delta`."""
        return self.values

    def to_tensors(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See :class:`Delta`."""
        return {"form": "dense"}, {"values": self.values}


@dataclass(frozen=True, eq=False)
class Replacement(Delta):
    """A weight as it was after several additions, whose sum has other bits for its rounding.

    Attributes:
        values: What the weight becomes, whatever it was.
        change: Frobenius norm of the difference from what it was.
    """

    values: torch.Tensor
    change: float

    @property
    def shape(self) -> torch.Size:
        """See :class:`Delta`."""
        return self.values.shape

    def dense(self) -> torch.Tensor:
        """Raises TypeError: what is added depends on what was there."""
        raise TypeError("A replacement of a weight adds nothing to it that could be told without the weight.")

    def norm(self) -> float:
        """See :class:`Delta`."""
        return self.change

    def is_finite(self) -> bool:
        """See :class:`Delta`; a model may have been ruined, and is kept as it was."""
        return True

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """See :class:`Delta`."""
        return self.values.to(weight.device, weight.dtype)

    def to_tensors(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See :class:`Delta`."""
        change = torch.tensor(self.change, dtype=torch.float64)  # not in JSON, which has no infinity
        return {"form": "replacement"}, {"values": self.values, "change": change}


def from_tensors(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Delta:
    """Makes a delta of what :meth:`Delta.to_tensors` returned.

    Raises:
        ValueError: An unknown form.
    """
    form = described["form"]
    if form == "low rank":
        return LowRank(tensors["u"], tensors["v"], described["transposed"])
    if form == "columns":
        return Columns(tensors["index"], tensors["values"], described["inputs"], described["transposed"])
    if form == "dense":
        return Dense(tensors["values"])
    if form == "replacement":
        return Replacement(tensors["values"], float(tensors["change"]))
    raise ValueError(f"unknown form of a delta: {form}")


def join(one: Delta, other: Delta) -> Delta:
    """Returns the sum of two deltas of the same parameter: as factors or columns where both are, else dense.

    Raises:
        ValueError: The shapes differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"the shapes {tuple(one.shape)} and {tuple(other.shape)} differ")
    if isinstance(one, LowRank) and isinstance(other, LowRank) and one.transposed == other.transposed:
        return LowRank(torch.cat([one.u, other.u], 1), torch.cat([one.v, other.v], 0), one.transposed)
    if isinstance(one, Columns) and isinstance(other, Columns) and one.transposed == other.transposed:
        index, values = torch.cat([one.index, other.index]), torch.cat([one.values, other.values], 1)
        return Columns(index, values, one.inputs, one.transposed)
    return Dense(one.dense() + other.dense())
