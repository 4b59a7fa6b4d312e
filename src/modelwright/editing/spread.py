"""Writing targets of an upper layer into several layers below it: MEMIT's and PMET's second half.

In each layer from the lowest up, keys and what is still missing at the last layer are computed anew, on the model with
the layers below edited (MEMIT, arXiv 2210.07229, algorithm 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelwright.editing.capture import Change, Site, capture
from modelwright.editing.deltas import Delta, LowRank
from modelwright.editing.least_squares import as_delta, least_squares
from modelwright.editing.locate_and_edit import keys_at
from modelwright.editing.statistics import KeyStatistics
from modelwright.models.roles import Projection, Roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How targets are written into layers.

    Attributes:
        layers: From the lowest to the last one, whose output the targets are of.
        weight: λ of :func:`~modelwright.editing.least_squares.least_squares`.
        ridge: Its ridge.
        share: Layers left, this one included -> what the missing rest is divided by.
        watched: Module of the last layer whose output the targets are of.
    """

    layers: Sequence[int]
    weight: float
    ridge: float
    share: Callable[[int], float]
    watched: nn.Module

    def together(
        self,
        model: PreTrainedModel,
        parts: Roles,
        downs: Sequence[Projection],
        statistics: KeyStatistics,
        rows: Sequence[Sequence[int]],
        contexts: int,
        targets: torch.Tensor,
    ) -> tuple[list[Delta], list[float]]:
        """Returns a delta of each layer's weight that writes all targets; the model's weights are put back.

        Beside it, the median of kᵀ C⁻¹ k of each layer's keys; none where the keys are as many as dimensions.

        Args:
            model: The model.
            parts: Its parts.
            downs: Down projections of the layers.
            statistics: Key statistics.
            rows: Tokens up to the fact's, as :func:`~modelwright.editing.locate_and_edit.key_rows` gives them.
            contexts: Rows a request; the first is the prompt alone.
            targets: (requests, width).
        """
        deltas: list[Delta] = []
        strengths: list[float] = []
        with _restored([down.base.weight for down in downs]):
            for number, (layer, down) in enumerate(zip(self.layers, downs)):
                keys = _mean_keys(keys_at(model, parts, layer, rows), contexts)
                missing = targets - self._now(model, parts, rows[::contexts])
                residuals = missing.double() / self.share(len(self.layers) - number)
                u, v = least_squares(
                    statistics, layer, keys.T, residuals.T, weight=self.weight, ridge=self.ridge
                )  # fmt: skip
                if len(keys) < keys.shape[1]:  # v is Kᵀ C⁻¹
                    strengths.append(float((v.to(keys.device) * keys).sum(1).median()))
                weight = down.base.weight
                delta = as_delta(u, v, weight, transposed=down.transposed)
                deltas.append(delta)
                with torch.no_grad():
                    weight.copy_(delta.added_to(weight))
        return deltas, strengths

    def each(
        self,
        model: PreTrainedModel,
        parts: Roles,
        downs: Sequence[Projection],
        statistics: KeyStatistics,
        rows: Sequence[Sequence[int]],
        contexts: int,
        targets: torch.Tensor,
    ) -> list[tuple[list[Delta], list[float]]]:
        """Returns, for each request, the deltas that write it alone, and kᵀ C⁻¹ k; arguments as for :meth:`together`.

        All requests run in one batch: what a request's own deltas add is added to its rows by hooks.
        """
        lefts: list[torch.Tensor] = []
        rights: list[torch.Tensor] = []
        strengths: list[torch.Tensor] = []
        for number, layer in enumerate(self.layers):
            done = list(zip(downs, lefts, rights))
            keys = _mean_keys(
                keys_at(model, parts, layer, rows, changes={d.module: _own(u, v, contexts) for d, u, v in done}),
                contexts,
            )
            changes = {d.module: _own(u, v, 1) for d, u, v in done}
            missing = targets - self._now(model, parts, rows[::contexts], changes)
            residuals = missing.double() / self.share(len(self.layers) - number)
            solved = statistics.solve(layer, keys.T, ridge=self.ridge).T
            # One key each: R Kᵀ (λ C + K Kᵀ)⁻¹ by the Sherman-Morrison formula.
            strengths.append((keys * solved).sum(1))
            scale = self.weight + strengths[-1][:, None]
            lefts.append(residuals / scale)
            rights.append(solved)
        wide = torch.promote_types(model.dtype, torch.float32)
        return [
            (
                [
                    LowRank(u[n, :, None].to(wide), v[n, None].to(wide), down.transposed)
                    for down, u, v in zip(downs, lefts, rights)
                ],
                [float(strength[n]) for strength in strengths],
            )
            for n in range(len(targets))
        ]

    def _now(
        self,
        model: PreTrainedModel,
        parts: Roles,
        rows: Sequence[Sequence[int]],
        changes: dict[nn.Module, Change] | None = None,
    ) -> torch.Tensor:
        block = parts.layers[self.layers[-1]].block
        return capture(model, rows, [Site(self.watched, "output")], last_block=block, changes=changes)[0]


def _mean_keys(keys: torch.Tensor, contexts: int) -> torch.Tensor:
    """Half the prompt's own key and half the mean of those in a context: (requests, d_ff), float64."""
    keys = keys.double().view(-1, contexts, keys.shape[-1])
    return keys[:, 0] if contexts == 1 else 0.5 * keys[:, 0] + 0.5 * keys[:, 1:].mean(1)


def _own(left: torch.Tensor, right: torch.Tensor, contexts: int) -> Change:
    """Adds to each row what its request's own rank-one delta gives."""

    def change(inputs: torch.Tensor, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)
        request = rows // contexts
        strength = torch.einsum("btf,bf->bt", inputs.to(wide), right[request].to(wide))
        return output + (strength[..., None] * left[request, None].to(wide)).to(output.dtype)

    return change


@contextlib.contextmanager
def _restored(weights: Sequence[Any]) -> Iterator[None]:
    kept = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept):
                weight.copy_(before)
