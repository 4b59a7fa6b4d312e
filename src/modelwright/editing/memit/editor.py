"""Least-squares edits of several down projections, from targets of the last block's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from modelwright.editing.edit import WeightEdit
from modelwright.editing.editor import layer_for
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.locate_and_edit import LocateAndEdit, down_projections, fit_details, key_rows
from modelwright.editing.requests import EditRequest
from modelwright.editing.spread import Spread
from modelwright.editing.target import optimise_targets
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class MEMIT(LocateAndEdit):
    """Write many facts at once into the MLPs of several layers: Δ = R Kᵀ (λ C + K Kᵀ)⁻¹ in each.

    For every request z is learnt, what the last of the layers should give at the fact's token (the residual stream
    after its block). From the lowest layer up, each then closes its share of what is still missing there, with the
    least change to the keys of ordinary text. λ counts how many tokens of that text stand against a fact: larger is
    safer and weaker. Needs key statistics. The defaults are HalluEditBench's for Llama-2-7B (layers 4 to 8 of 32; the
    same depth elsewhere).

    Several requests are one batch; `sequential=true` makes a batch of each, with those before it on the model. The two
    differ a lot.
    """

    name: ClassVar[str] = "memit"

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

    def layers_of(self, depth: int) -> list[int]:
        """See :meth:`LocateAndEdit.layers_of`."""
        if self.layers is not None:
            return list(self.layers)
        # What the last layer of all gives at the subject, no other reads.
        highest = max(0, min(layer_for(depth, 8), depth - 2))
        return list(range(min(layer_for(depth, 4), highest), highest + 1))

    def _fit(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> WeightEdit:
        prepared = self._prepare(model, tokenizer, requests, progress)
        deltas = prepared.spread.together(model, **prepared.arguments)
        return WeightEdit(
            self.name, model_fingerprint(model), dict(zip(prepared.names, deltas)), requests,
            {"layers": list(prepared.spread.layers), **fit_details(prepared.losses)},
        )  # fmt: skip

    def _fit_each(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> list[WeightEdit]:
        prepared = self._prepare(model, tokenizer, requests, progress)
        fingerprint = model_fingerprint(model)
        edits = []
        for n, deltas in enumerate(prepared.spread.each(model, **prepared.arguments)):
            details = {"layers": list(prepared.spread.layers), **fit_details(prepared.losses[n : n + 1])}
            edits.append(WeightEdit(self.name, fingerprint, dict(zip(prepared.names, deltas)), [requests[n]], details))
        return edits

    def _prepare(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> _Prepared:
        layers = self.layers_of(len(roles(model).layers))
        parts, downs, names = down_projections(model, layers)
        statistics = self._covariance(model, layers)
        if statistics is None:
            raise UserError(
                "MEMIT needs key statistics of the model: collect them with modelwright edit statistics "
                "(KeyStatistics.collect), and give them as statistics=FILE."
            )
        contexts = self._contexts(model, tokenizer)
        last = parts.layers[layers[-1]]
        targets = optimise_targets(
            model, tokenizer, requests, [last.block], layers[-1], self._optimisation(), contexts=contexts,
            fact_token=self.fact_token, kl_prompt=self.kl_prompt, batch_size=self.batch_size, progress=progress,
        )  # fmt: skip
        spread = Spread(
            layers=list(layers), weight=self.weight, ridge=self.ridge, share=lambda left: left, watched=last.block
        )
        arguments = {
            "parts": parts,
            "downs": downs,
            "statistics": statistics,
            "rows": key_rows(tokenizer, requests, contexts, self.fact_token),
            "contexts": len(contexts),
            "targets": targets.values(),
        }
        return _Prepared(spread, names, arguments, targets.losses)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    spread: Spread
    names: list[str]
    arguments: dict[str, Any]
    losses: list[list[float]]
