"""What ROME, MEMIT and PMET share: find the fact's token, learn what a layer should give there, change weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch

from modelwright.editing.capture import Site, capture
from modelwright.editing.contexts import check_contexts, sample_contexts
from modelwright.editing.edit import Edit, WeightEdit, base_fingerprint, check_editable, edits_on, merge, revert_all
from modelwright.editing.editor import Editor
from modelwright.editing.requests import EditRequest
from modelwright.editing.statistics import KeyStatistics
from modelwright.editing.subject import locate
from modelwright.editing.target import Optimisation
from modelwright.errors import UserError
from modelwright.models.roles import Projection, Roles, roles, unwrap
from modelwright.options import Arg
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Above this loss at the end of the optimisation, a target has less than half of the probability.
_UNLEARNT = 0.7


@dataclass(kw_only=True)
class LocateAndEdit(Editor):
    """Options and steps of the locate-and-edit methods."""

    fact_token: Annotated[
        Literal["subject_last", "last"],
        Arg("Where the fact is looked up: the subject's last token, or the prompt's (see modelwright edit trace)."),
    ] = "subject_last"
    statistics: Annotated[
        str | KeyStatistics | None, Arg("Key statistics of the model (modelwright edit statistics).", kind="input")
    ] = None
    ridge: Annotated[float, Arg("Added to the key covariance's diagonal, as a share of its mean.")] = 0.0
    steps: Annotated[int, Arg("Steps of Adam for the target, at most.")] = 25
    lr: Annotated[float, Arg("Learning rate of these steps.")] = 0.5
    stop_loss: Annotated[float, Arg("A target is good enough when its loss is below this.")] = 0.05
    kl_factor: Annotated[float, Arg("Weight of the divergence at '{subject} is a'.")] = 0.0625
    decay: Annotated[float, Arg("Weight of the target's distance from the model's own output.")] = 1e-3
    clamp: Annotated[float, Arg("Largest distance, as a multiple of the output's norm.")] = 4.0
    kl_prompt: Annotated[str, Arg("Prompt of the divergence; {} is the subject.")] = "{} is a"
    contexts: Annotated[
        list[str] | None, Arg("Texts to put before each prompt; by default the model samples some.")
    ] = None
    sequential: Annotated[
        bool, Arg("Fit several requests one after the other, each with those before it on the model.")
    ] = False
    batch_size: Annotated[int, Arg("Requests whose targets are learnt at once.", kind="run")] = 16
    seed: Annotated[int, Arg("Seed of the sampled contexts.")] = 0

    _sampled: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _loaded: KeyStatistics | None = field(default=None, init=False, repr=False, compare=False)

    #: Tokens of sampled contexts, and how many of that length for each of the five starters.
    context_lengths: ClassVar[tuple[tuple[int, int], ...]] = ((10, 1),)

    def __post_init__(self) -> None:
        if self.fact_token not in ("subject_last", "last"):
            raise UserError(f"fact_token is {self.fact_token!r}: give subject_last or last.")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: give at least 1.")
        if self.ridge < 0:
            raise UserError(f"The ridge is {self.ridge}: give 0 or more.")
        if self.contexts is not None:
            check_contexts(self.contexts)
        if "{}" not in self.kl_prompt:
            raise UserError(f"kl_prompt is {self.kl_prompt!r}: put {{}} where the subject stands.")
        self._optimisation()

    def layers_of(self, depth: int) -> list[int]:
        """Returns the layers that are edited in a model of so many."""
        raise NotImplementedError

    def remedy(self, edit: Edit) -> str:
        """See :meth:`Editor.remedy`; it tells targets that were not learnt from targets that were not written."""
        losses = [loss for part in edit.details.get("merged", [edit.details]) for loss in part["last_loss"]]
        if (middle := sorted(losses)[len(losses) // 2]) > _UNLEARNT:
            return (
                f"what the layer should give was not learnt (loss {middle:.2g}): look for another place (modelwright "
                f"edit trace), raise steps ({self.steps}) or clamp ({self.clamp:g}), or lower decay ({self.decay:g})"
            )
        return self.stronger

    def _optimisation(self) -> Optimisation:
        names = [f.name for f in dataclasses.fields(Optimisation) if f.name in self.__dataclass_fields__]
        return Optimisation(**{name: getattr(self, name) for name in names})

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> WeightEdit:
        """See :meth:`Editor.fit`."""
        self.check(requests)
        if not self.sequential or len(requests) == 1:
            return self._fit(model, tokenizer, requests, progress)
        done: list[WeightEdit] = []
        before = len(edits_on(model))
        try:
            for request in requests:
                edit = self._fit(model, tokenizer, [request], progress)
                edit.apply_(model)
                done.append(edit)
        finally:
            revert_all(model, keep=before)
        return merge(done)

    def fit_each(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> list[Edit]:
        """See :meth:`Editor.fit_each`: targets of all requests are learnt in batches, and solved for together."""
        return list(self._fit_each(model, tokenizer, requests, progress)) if requests else []

    def _fit(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> WeightEdit:
        raise NotImplementedError

    def _fit_each(
        self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], progress: Progress | None
    ) -> list[WeightEdit]:
        raise NotImplementedError

    def _contexts(self, model: Any, tokenizer: Any) -> list[str]:
        """Contexts as given, or sampled once for each model: edits on it make no difference."""
        if self.contexts is not None:
            return check_contexts(self.contexts)
        key = base_fingerprint(model)
        if key not in self._sampled:
            self._sampled[key] = sample_contexts(model, tokenizer, self.context_lengths, seed=self.seed)
        return self._sampled[key]

    def _covariance(self, model: Any, layers: Sequence[int]) -> KeyStatistics | None:
        """The statistics, loaded and checked; None where none are given."""
        if self.statistics is None:
            return None
        if self._loaded is None:
            given = self.statistics
            self._loaded = given if isinstance(given, KeyStatistics) else KeyStatistics.load(Path(given))
        self._loaded.check(model, layers)
        return self._loaded


def down_projections(model: Any, layers: Sequence[int]) -> tuple[Roles, list[Projection], list[str]]:
    """Returns a model's parts, the down projections of some layers, and the names of their weights.

    Raises:
        UserError: A layer is out of range or has no MLP, or its weight cannot be edited.
    """
    parts = roles(model)
    inner = unwrap(model)
    names = {id(p): n for n, p in inner.named_parameters()}
    found, weights = [], []
    for layer in layers:
        if not 0 <= layer < len(parts.layers):
            raise UserError(
                f"There is no layer {layer}: the model's {len(parts.layers)} layers are numbered 0 to "
                f"{len(parts.layers) - 1}."
            )
        down = parts.layers[layer].down
        if down is None:
            raise UserError(f"Layer {layer} of this '{parts.family}' model has no MLP, so it cannot be edited so.")
        weight = getattr(down.base, "weight", None)
        name = names.get(id(weight))
        if name is None:
            raise UserError(f"The weight of '{down.name}' is no parameter of its own, so it cannot be edited.")
        check_editable(inner, name)
        found.append(down)
        weights.append(name)
    return parts, found, weights


def key_rows(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], contexts: Sequence[str], fact_token: Any
) -> list[list[int]]:
    """Returns tokens up to the fact's: all contexts of the first request, then of the second, and so on."""
    rows = []
    for request in requests:
        for context in contexts:
            found = locate(tokenizer, context + request.text, request.subject, fact_token)
            rows.append(found.ids[: found.position + 1])
    return rows


def keys_at(
    model: PreTrainedModel, parts: Roles, layer: int, rows: Sequence[Sequence[int]], **options: Any
) -> torch.Tensor:
    """Returns the inputs of a layer's down projection at the last token of each row: (rows, d_ff)."""
    down = parts.layers[layer].down
    assert down is not None
    block = parts.layers[layer].block
    return capture(model, rows, [Site(down.module, "input")], last_block=block, **options)[0]


def fit_details(losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns what an edit keeps of its optimisation: first and last loss and the steps, by request."""
    return {
        "first_loss": [loss[0] for loss in losses],
        "last_loss": [loss[-1] for loss in losses],
        "steps": [len(loss) - 1 for loss in losses],
    }
