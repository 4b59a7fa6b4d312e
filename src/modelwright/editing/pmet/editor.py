"""Least-squares edits of several down projections, from targets of the last layer's MLP output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from modelwright.editing.edit import WeightEdit
from modelwright.editing.editor import layer_for
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.locate_and_edit import LocateAndEdit, down_projections, fit_details, key_rows
from modelwright.editing.requests import EditRequest
from modelwright.editing.spread import Spread
from modelwright.editing.target import Optimisation, optimise_targets
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class PMET(LocateAndEdit):
    """MEMIT, but learn what the last layer's attention and MLP should give apart, and write only the MLP's part.

    Two vectors are learnt at once at the fact's token, added to the outputs of attention and MLP of the last of the
    layers. The attention's is thrown away: it takes up what the MLP should not store. What is missing at the MLP's
    output is divided by √(layers left) instead of (layers left). Once all tokens of the target are the most probable
    ones, their likelihood counts a tenth, and a small divergence (KL term at most 0.01) ends the optimisation. Needs
    key statistics. The defaults are the paper's for Llama-2 (layers 4 to 8 of 32; the same depth elsewhere).

    Several requests are one batch; `sequential=true` makes a batch of each, with those before it on the model.
    """

    name: ClassVar[str] = "pmet"

    steps: Annotated[int, Arg("Steps of Adam for the target, at most.")] = 20
    decay: Annotated[float, Arg("Weight of the target's distance from the model's own output.")] = 0.5
    clamp: Annotated[float, Arg("Largest distance, as a multiple of the output's norm.")] = 1.0
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

    def _optimisation(self) -> Optimisation:
        return dataclasses.replace(super()._optimisation(), settled_nll_factor=0.1, settled_kl=0.01)

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
                "PMET needs key statistics of the model: collect them with modelwright edit statistics "
                "(KeyStatistics.collect), and give them as statistics=FILE."
            )
        contexts = self._contexts(model, tokenizer)
        last = parts.layers[layers[-1]]
        assert last.down is not None  # down_projections saw it
        targets = optimise_targets(
            model, tokenizer, requests, [last.output.module, last.down.module], layers[-1], self._optimisation(),
            contexts=contexts, fact_token=self.fact_token, kl_prompt=self.kl_prompt, batch_size=self.batch_size,
            progress=progress,
        )  # fmt: skip
        spread = Spread(
            layers=list(layers), weight=self.weight, ridge=self.ridge, share=math.sqrt, watched=last.down.module
        )
        arguments = {
            "parts": parts,
            "downs": downs,
            "statistics": statistics,
            "rows": key_rows(tokenizer, requests, contexts, self.fact_token),
            "contexts": len(contexts),
            "targets": targets.values(1),
        }
        return _Prepared(spread, names, arguments, targets.losses)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    spread: Spread
    names: list[str]
    arguments: dict[str, Any]
    losses: list[list[float]]
