"""The rank-one edit of one down projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from modelwright.editing.deltas import LowRank
from modelwright.editing.edit import WeightEdit
from modelwright.editing.editor import layer_for
from modelwright.editing.examples import check_keys
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.locate_and_edit import LocateAndEdit, down_projections, fit_details, key_rows, keys_at
from modelwright.editing.requests import EditRequest
from modelwright.editing.target import optimise_targets
from modelwright.errors import UserError
from modelwright.models.roles import Projection, roles
from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class ROME(LocateAndEdit):
    """Write a fact into one layer as a rank-one change: W + (v* − W k) uᵀ / (k · u).

    v* is what the layer's MLP should give at the fact's token (:mod:`~modelwright.editing.target`);
    u = C⁻¹ k* / ‖C⁻¹ k*‖ with the mean key k* over contexts, so that keys of ordinary text (C) are moved least; without
    statistics u is k* itself, as in the runs of HalluEditBench and EditingEvaluation. The defaults are theirs for
    Llama-2-7B. `key=single` is the published code (k* for u, the key of the prompt alone in the rest); `key=mean` is
    R-ROME, which takes k* in both places and does not collapse in sequences.

    Several requests are fitted together: v* of each on the model as it stands, then one update after the other.
    `sequential=true` learns each v* with the updates before it on the model, as the published code does.
    """

    name: ClassVar[str] = "rome"
    stronger: ClassVar[str] = "look for another place (modelwright edit trace), or raise steps or clamp"
    context_lengths: ClassVar[tuple[tuple[int, int], ...]] = ((5, 2), (10, 2))

    layer: Annotated[int | None, Arg("Layer to edit; 5 of 32, and as deep in other models.")] = None
    key: Annotated[Literal["single", "mean"], Arg("Key of the update: the prompt's own, or the mean (R-ROME).")] = (
        "single"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key not in ("single", "mean"):
            raise UserError(f"key is {self.key!r}: give single or mean.")

    def layers_of(self, depth: int) -> list[int]:
        """See :meth:`LocateAndEdit.layers_of`."""
        return [layer_for(depth, 5) if self.layer is None else self.layer]

    def _fit(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> WeightEdit:
        solved = self._solve(model, tokenizer, requests, progress)
        lefts: list[torch.Tensor] = []
        for number in range(len(requests)):
            residual, key = solved.residuals[:, number], solved.keys[:, number]
            for left, right in zip(lefts, solved.rights.T):
                residual = residual - left * (right @ key)
            lefts.append(residual / solved.scales[number])
        delta = solved.delta(torch.stack(lefts, 1), solved.rights)
        details = {"layer": solved.layer, **fit_details(solved.losses)}
        fingerprint = model_fingerprint(model, whole=[solved.name])
        return WeightEdit(self.name, fingerprint, {solved.name: delta}, requests, details)

    def _fit_each(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> list[WeightEdit]:
        solved = self._solve(model, tokenizer, requests, progress)
        fingerprint = model_fingerprint(model, whole=[solved.name])
        edits = []
        for n, request in enumerate(requests):
            left = (solved.residuals[:, n] / solved.scales[n])[:, None]
            delta = solved.delta(left, solved.rights[:, n : n + 1])
            details = {"layer": solved.layer, **fit_details(solved.losses[n : n + 1])}
            edits.append(WeightEdit(self.name, fingerprint, {solved.name: delta}, [request], details))
        return edits

    def _solve(self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None) -> _Solved:
        (layer,) = self.layers_of(len(roles(model).layers))
        parts, (down,), (name,) = down_projections(model, [layer])
        statistics = self._covariance(model, [layer])
        contexts = self._contexts(model, tokenizer)
        targets = optimise_targets(
            model, tokenizer, requests, [down.module], layer, self._optimisation(), contexts=contexts,
            fact_token=self.fact_token, kl_prompt=self.kl_prompt, batch_size=self.batch_size, progress=progress,
        )  # fmt: skip
        rows = key_rows(tokenizer, requests, contexts, self.fact_token)
        keys = keys_at(model, parts, layer, rows).double().view(len(requests), len(contexts), -1)
        mean = keys.mean(1).T
        rights = mean if statistics is None else statistics.solve(layer, mean, ridge=self.ridge)
        rights = rights / rights.norm(dim=0)
        keys = mean if self.key == "mean" else keys[:, 0].T
        scales = (keys * rights).sum(0)
        check_keys(keys)
        if bool((scales.abs() < 1e-9 * keys.norm(dim=0)).any()) or not bool(rights.isfinite().all()):
            raise UserError(
                "The key of a request has no part in the direction of the update: the model gives nothing at the "
                "fact's token in this layer. Choose another layer (modelwright edit trace)."
            )
        with torch.no_grad():
            wide = torch.promote_types(model.dtype, torch.float32)
            outputs = (down.weight().to(wide) @ keys.to(wide)).double()
            if (bias := down.bias()) is not None:
                outputs += bias.double()[:, None]
        residuals = targets.values().double().T - outputs
        return _Solved(layer, name, down, keys, rights, scales, residuals, targets.losses)


@dataclass(frozen=True)
class _Solved:
    """What the updates are made of, all in float64: a column a request."""

    layer: int
    name: str
    down: Projection
    keys: torch.Tensor  # (d_ff, n): k of the update
    rights: torch.Tensor  # (d_ff, n): u
    scales: torch.Tensor  # (n,): k · u
    residuals: torch.Tensor  # (d, n): v* − W k
    losses: list[list[float]]

    def delta(self, left: torch.Tensor, right: torch.Tensor) -> LowRank:
        weight = self.down.weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        return LowRank(left.to(wide).contiguous(), right.T.to(wide).contiguous(), self.down.transposed)
