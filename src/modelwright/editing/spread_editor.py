"""What MEMIT and PMET share: targets of an upper layer, written into several layers below it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from modelwright.editing.edit import Edit, WeightEdit
from modelwright.editing.editor import layer_for
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.locate_and_edit import LocateAndEdit, down_projections, fit_details, key_rows
from modelwright.editing.requests import EditRequest
from modelwright.editing.spread import Spread
from modelwright.editing.target import optimise_targets
from modelwright.errors import UserError
from modelwright.models.roles import Layer, roles
from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class SpreadEditor(LocateAndEdit):
    """Options and steps of the methods that close what is missing at an upper layer from several layers below it.

    ``details`` of an edit has, by layer, ``strengths``: kᵀ C⁻¹ k of its keys (the median), against which λ stands. A
    layer writes kᵀ C⁻¹ k / (λ + kᵀ C⁻¹ k) of what it should, for a fact alone.
    """

    stronger: ClassVar[str] = "choose other layers (modelwright edit trace), or raise steps or clamp"

    layers: Annotated[
        list[int] | None, Arg("Layers to edit, one after the other; 4 to 8 of 32, and as deep in other models.")
    ] = None
    weight: Annotated[float, Arg("λ: how much keeping what ordinary text does counts, in tokens.")] = 15_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise UserError(f"The weight of the covariance is {self.weight}: give 0 or more.")
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise UserError(f"layers is {self.layers}: give different layers from the lowest up, such as 4,5,6,7,8.")

    def check(self, requests: Sequence[EditRequest]) -> None:
        """See :meth:`Editor.check`; key statistics must be given."""
        super().check(requests)
        self._needed(self.statistics)

    def _needed(self, statistics: Any) -> Any:
        if statistics is None:
            raise UserError(
                f"{self.name.upper()} needs key statistics of the model: name text to collect them from with "
                f"--statistics, or a file of modelwright edit statistics (in Python, statistics=KeyStatistics.collect)."
            )
        return statistics

    def layers_of(self, depth: int) -> list[int]:
        """See :meth:`LocateAndEdit.layers_of`."""
        if self.layers is not None:
            return list(self.layers)
        # What the last layer of all gives at the subject, no other reads.
        highest = max(0, min(layer_for(depth, 8), depth - 2))
        return list(range(min(layer_for(depth, 4), highest), highest + 1))

    def remedy(self, edit: Edit) -> str:
        """See :meth:`Editor.remedy`; names the λ with which a layer would write half of what is missing."""
        parts = edit.details.get("merged", [edit.details])
        strengths = sorted(strength for part in parts for strength in part.get("strengths", []))
        if (said := super().remedy(edit)) != self.stronger or not strengths:
            return said
        half = strengths[len(strengths) // 2]
        if half >= self.weight:  # most of it is written already: it is not λ
            return said
        return (
            f"a weight of {self.weight:g} lets a layer write {half / (self.weight + half):.1%} of what is missing; "
            f"--set weight={float(f'{half:.1g}'):g} would let it write half"
        )

    @abstractmethod
    def _learnt_at(self, last: Layer) -> list[nn.Module]:
        """Returns the modules of the last layer whose outputs are learnt; the targets are the last one's."""

    @abstractmethod
    def _share(self, left: int) -> float:
        """Returns what is missing divided by what a layer closes of it, with so many layers left, itself included."""

    def _fit(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> WeightEdit:
        prepared = self._prepare(model, tokenizer, requests, progress)
        found, strengths = prepared.spread.together(model, **prepared.arguments)
        deltas = dict(zip(prepared.names, found))
        details = {"layers": list(prepared.spread.layers), **fit_details(prepared.losses), "strengths": strengths}
        return WeightEdit(self.name, model_fingerprint(model, whole=deltas), deltas, requests, details)

    def _fit_each(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> list[WeightEdit]:
        prepared = self._prepare(model, tokenizer, requests, progress)
        fingerprint = model_fingerprint(model, whole=prepared.names)
        edits = []
        for n, (deltas, strengths) in enumerate(prepared.spread.each(model, **prepared.arguments)):
            losses = fit_details(prepared.losses[n : n + 1])
            details = {"layers": list(prepared.spread.layers), **losses, "strengths": strengths}
            edits.append(WeightEdit(self.name, fingerprint, dict(zip(prepared.names, deltas)), [requests[n]], details))
        return edits

    def _prepare(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> _Prepared:
        layers = self.layers_of(len(roles(model).layers))
        parts, downs, names = down_projections(model, layers)
        statistics = self._needed(self._covariance(model, layers))
        contexts = self._contexts(model, tokenizer)
        learnt_at = self._learnt_at(parts.layers[layers[-1]])
        targets = optimise_targets(
            model, tokenizer, requests, learnt_at, layers[-1], self._optimisation(), contexts=contexts,
            fact_token=self.fact_token, kl_prompt=self.kl_prompt, batch_size=self.batch_size, progress=progress,
        )  # fmt: skip
        spread = Spread(
            layers=list(layers), weight=self.weight, ridge=self.ridge, share=self._share, watched=learnt_at[-1]
        )
        arguments = {
            "parts": parts,
            "downs": downs,
            "statistics": statistics,
            "rows": key_rows(tokenizer, requests, contexts, self.fact_token),
            "contexts": len(contexts),
            "targets": targets.values(len(learnt_at) - 1),
        }
        return _Prepared(spread, names, arguments, targets.losses)


@dataclass(frozen=True)
class _Prepared:
    spread: Spread
    names: list[str]
    arguments: dict[str, Any]
    losses: list[list[float]]
