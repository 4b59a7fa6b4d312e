"""Editing one fact after another without putting the model back, and looking at it on the way (arXiv 2410.18785)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelwright.editing.edit import Edit, WeightEdit, edits_on, fold, load_edit, revert_all
from modelwright.editing.editor import Editor
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.requests import EditRequest, check_requests
from modelwright.errors import DivergedError, UserError
from modelwright.evaluation.asking import Layout, Turn, answers, layout_for
from modelwright.evaluation.editing_evaluation.neutral import Neutral
from modelwright.evaluation.editors import describe
from modelwright.evaluation.matching import match
from modelwright.files import read_json, write_json
from modelwright.models.roles import unwrap
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The paper's checkpoints.
CHECKPOINTS = (1, 5, 10, 20, 50, 100, 500, 1000)
#: Neutral text that is this many times as perplexing as before means collapse; so does this share of repeated words.
COLLAPSE_PERPLEXITY, COLLAPSE_REPEATED = 10.0, 0.5


@dataclass
class State:
    """The model after some edits.

    Attributes:
        n: Requests written so far.
        model: The model with the edits on it; whatever is measured is measured on it.
        edits: The edits, lowest first; what takes in those before it (memories, and whole weights) stands alone.
        requests: The requests written so far.
        delta_norms: Parameter to ||W − W0|| / ||W0||, Frobenius; None where that is not finite.
        measured: What was recorded; starts with what the run itself measures.
    """

    n: int
    model: PreTrainedModel
    edits: list[Edit]
    requests: list[EditRequest]
    delta_norms: dict[str, float | None]
    measured: dict[str, Any] = field(default_factory=dict)

    def record(self, **values: Any) -> None:
        """Keeps measurements (JSON-able) with this state."""
        self.measured.update(values)

    def prompt(self, text: str) -> str:
        """Returns what to ask instead of a prompt, for edits that live in it."""
        for edit in self.active:
            text = edit.prompt(text)
        return text

    @property
    def active(self) -> list[Edit]:
        """The edits whose prompts count: a memory that grew holds those before it."""
        return self.edits


@dataclass(kw_only=True)
class SequentialEditing:
    """Writes requests in their order and stops at checkpoints; iterate it for the states.

    With a ``folder``, each edit is saved as it is made: the same call after a kill puts them on again, in their order,
    and goes on with the same bits as if it had not been killed. Where an edit takes in those before it, only the last
    one and those of the checkpoints are kept: edits of whole weights (fine-tuning) are folded into one, and memories
    (GRACE, SERAC) grow. States that were measured are not yielded again; all are in ``states``. Key statistics inside
    an editor stay those of the base model, as in the paper's runs.

    Attributes:
        model: A causal language model in evaluation mode; :meth:`restore` gives it its first bits again.
        tokenizer: Its tokenizer.
        editor: The method.
        requests: What to write, in this order.
        checkpoints: Numbers of requests after which to stop and measure; 0 is the model as it is.
        batch_size: Requests that one fit writes. A batch is another algorithm than that many fits, for methods that
            solve for all facts at once (MEMIT, PMET).
        neutral: Texts that no edit should change.
        layout: How questions are asked for the retention.
        folder: Where to keep edits and measurements.
        max_delta_norm: Stop when a layer has changed by more than this share of its norm.
        stop_on_collapse: Stop when the model has collapsed; see :func:`collapsed`.
        force: Throw away a folder of another run.
        progress: Counts edits.
        states: Measurements of the states so far.
        stopped: Why it stopped early, or None. Where a ruined model gives an editor no finite numbers any more, the
            last state is that of the edits that could be written.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    editor: Editor
    requests: Sequence[EditRequest]
    checkpoints: Sequence[int] = CHECKPOINTS
    batch_size: int = 1
    neutral: Sequence[str] = ()
    layout: Layout | None = None
    folder: Path | None = None
    max_delta_norm: float | None = None
    stop_on_collapse: bool = False
    force: bool = False
    progress: Progress | None = None
    states: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None

    def __post_init__(self) -> None:
        points = list(self.checkpoints)
        if not points or points != sorted(set(points)) or points[0] < 0:
            raise UserError(f"The checkpoints are {points}: give numbers of edits in increasing order, each once.")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.max_delta_norm is not None and self.max_delta_norm <= 0:
            raise UserError("max_delta_norm must be above 0.")
        if points[-1] > len(self.requests):
            raise UserError(f"The last checkpoint is {points[-1]}, but there are only {len(self.requests)} requests.")
        check_requests(list(self.requests))
        if points[-1]:
            self.editor.check(self.requests[: points[-1]])
        if uneven := [n for n in points if n % self.batch_size]:
            raise UserError(f"Checkpoint {uneven[0]} is no multiple of the batch of {self.batch_size} requests.")
        self._written = 0  # fits that the model has
        self._measures: dict[str, str] = {}
        self._edits: list[Edit] = []
        self._originals: dict[str, torch.Tensor] = {}
        self._layout = self.layout or layout_for(self.tokenizer)
        self._left()  # a folder of another run is refused now, not after another editor's hours

    def __iter__(self) -> Iterator[State]:
        """Yields the states. A state is closed, and its measurements are kept, when the next one is asked for."""
        if self._edits:
            raise UserError("This sequence is on the model already: call restore() before going through it again.")
        progress = self.progress or Silent()
        progress.start(f"{self.editor.name}: edits", self.checkpoints[-1])
        self.states, self.stopped = [], None
        self._reopen()
        neutral = Neutral(self.model, self.tokenizer, self.neutral)
        measured = {state["n"]: state for state in self.states}
        self.states = []
        for checkpoint in self.checkpoints:
            failure = self._write_up_to(checkpoint, progress)
            n = min(checkpoint, self._written * self.batch_size)
            if self.states and self.states[-1]["n"] == n:
                pass  # nothing more could be written
            elif n in measured:
                self.states.append(measured[n])
            else:
                state = self._state(n, neutral)
                yield state
                self.states.append({"n": n, "delta_norms": state.delta_norms, **state.measured})
                self._keep()
            self.stopped = failure or self._reason(self.states[-1])
            if self.stopped is not None:
                progress.message(f"{self.editor.name}: stopped after {n} edits: {self.stopped}.")
                return

    def _write_up_to(self, n: int, progress: Progress) -> str | None:
        """Writes requests up to a number of them; returns why it went no further, where a ruined model was the cause.

        Raises:
            UserError: The editor refuses a request, or the model as it is.
        """
        while (at := self._written * self.batch_size) < n:
            if (kept := self._kept_towards(n // self.batch_size)) is not None:
                folder, written = kept
                self._put_on(load_edit(folder), written)
                progress.advance(self._written * self.batch_size - at)
                continue
            try:
                edit = self.editor.fit(self.model, self.tokenizer, self.requests[at : at + self.batch_size])
            except DivergedError as error:
                if not self._edits:
                    raise
                progress.message(f"{self.editor.name}: {error}")
                return "no further fact could be written, for its numbers were not finite"
            self._put_on(edit, self._written + 1)
            self._save_last()
            progress.advance(self.batch_size)
        return None

    def restore(self) -> None:
        """Takes the edits off, the last one first: the model has its first bits."""
        if self._edits and edits_on(self.model)[-1] is not self._edits[-1]:
            self._edits[-1].revert_(self.model)  # says what is in the way
        revert_all(self.model, keep=len(edits_on(self.model)) - len(self._edits))
        self._edits, self._originals, self._written = [], {}, 0

    def run(self, abilities: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Goes through all states, measures, restores the model, and returns the measurements.

        Args:
            abilities: Name to ``measure(state) -> dict``. States in the folder that were measured by others (with other
                names, or another ``identity`` where they have one) are measured again; the edits are not made again.
        """
        self._measures = {name: str(getattr(measure, "identity", "")) for name, measure in (abilities or {}).items()}
        try:
            for state in self:
                for name, measure in (abilities or {}).items():
                    state.record(**{name: measure(state)})
        finally:
            self.restore()
        return self.states

    def to_pandas(self) -> Any:
        """Returns the measurements as a table, a row a state."""
        import pandas

        return pandas.json_normalize(self.states)

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Saves the states' measurements as ``states.json`` in a folder."""
        write_json(Path(folder) / "states.json", {"plan": self._plan(), "states": self.states}, force)

    def _put_on(self, edit: Edit, written: int) -> None:
        while self._edits and edit.holds(self._edits[-1]):
            self._edits.pop().revert_(self.model)
        if isinstance(edit, WeightEdit):
            parameters = dict(unwrap(self.model).named_parameters())
            for name in edit.deltas:
                self._originals.setdefault(name, parameters[name].detach().clone())
        edit.apply_(self.model)
        self._edits.append(edit)
        self._written = written
        if isinstance(edit, WeightEdit) and edit.is_whole:
            self._edits = [fold(self.model, len(self._edits))]

    def _state(self, n: int, neutral: Neutral) -> State:
        parameters = dict(unwrap(self.model).named_parameters())
        norms = {
            name: _finite(float((parameters[name].detach().float() - old.float()).norm() / old.float().norm()))
            for name, old in self._originals.items()
        }
        state = State(n, self.model, list(self._edits), list(self.requests[:n]), norms)
        state.record(**neutral.measure(self.model, state.prompt), retention=self._retention(state))
        changes = list(norms.values())
        state.record(
            max_delta_norm=None if None in changes else max((c for c in changes if c is not None), default=0.0)
        )
        state.record(collapsed=collapsed(state.measured, neutral.base))
        return state

    def _retention(self, state: State) -> dict[str, float | None]:
        """Share of the facts written so far that the model still answers: the last batch's, and all."""
        if not state.requests:
            return {"last": None, "all": None}
        right = retained(state, state.requests, self.tokenizer, self._layout)
        last = right[-self.batch_size :]
        return {"last": sum(last) / len(last), "all": sum(right) / len(right)}

    def _reason(self, state: Mapping[str, Any]) -> str | None:
        if self.stop_on_collapse and state.get("collapsed"):
            return "the model has collapsed"
        if self.max_delta_norm is not None:
            change = state["max_delta_norm"]
            if change is None:
                return "a layer's weights are not finite"
            if change > self.max_delta_norm:
                return f"a layer has changed by {change:.2f} of its norm"
        return None

    def _plan(self) -> dict[str, Any]:
        rows = json.dumps([request.to_dict() for request in self.requests])
        return {
            "editor": describe(self.editor),
            "requests": hashlib.sha256(rows.encode()).hexdigest()[:16],
            "batch_size": self.batch_size,
            "checkpoints": list(self.checkpoints),
            "neutral": hashlib.sha256("\0".join(self.neutral).encode()).hexdigest()[:16],
            "layout": asdict(self._layout),
        }

    def _save_last(self) -> None:
        """Saves the last edit, and forgets those that it has taken in unless a checkpoint is measured on them."""
        if self.folder is None:
            return
        edit = self._edits[-1]
        if len(self._edits) > 1 or not edit.holds(edit):
            edit.save(self.folder / "edits" / f"{self._written - 1:05d}", force=True)
            return
        edit.save(self.folder / "states" / f"{self._written:05d}", force=True)
        self._forget()

    def _forget(self) -> None:
        """Removes states that are neither the last nor a checkpoint's, and what a kill left of one being written."""
        assert self.folder is not None
        states = sorted((self.folder / "states").glob("[0-9]*"), key=lambda path: int(path.name))
        gone = [path for path in states[:-1] if int(path.name) * self.batch_size not in self.checkpoints]
        for path in [*gone, *self.folder.glob("*/.*.partial")]:
            shutil.rmtree(path)

    def _kept_towards(self, number: int) -> tuple[Path, int] | None:
        """Returns the folder of an edit that leads towards a number of fits, and how many the model has with it."""
        if self.folder is None:
            return None
        for written in range(number, self._written, -1):
            if (state := self.folder / "states" / f"{written:05d}").is_dir():
                return state, written
        one = self.folder / "edits" / f"{self._written:05d}"
        return (one, self._written + 1) if one.is_dir() else None

    def _left(self) -> dict[str, Any] | None:
        """Returns what an earlier run of the same plan left in the folder, if there is anything.

        Raises:
            UserError: It is another plan's, and ``force`` is off.
        """
        if self.folder is None or not (file := self.folder / "sequence.json").exists():
            return None
        kept = read_json(file)
        plan = {**self._plan(), "model": model_fingerprint(self.model)}
        if isinstance(kept, dict) and kept.get("plan") == plan and isinstance(kept.get("states"), list):
            return kept
        if not self.force:
            raise UserError(
                f"{self.folder} holds another sequence (another model, editor, requests or checkpoints): choose "
                f"another folder, or give --force to throw it away."
            )
        return None

    def _reopen(self) -> None:
        """Reads the measurements that an earlier run left, or throws away what is not known to be of this one."""
        if self.folder is None:
            return
        kept = self._left()
        self._plan_kept = {**self._plan(), "model": model_fingerprint(self.model)}
        if kept is None:
            # Edits of which nothing is known: those of this run are told apart by their numbers alone.
            for name in ("edits", "states"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._keep()
            return
        self._forget()
        if kept.get("measures", {}) == self._measures:
            self.states = kept["states"]

    def _keep(self) -> None:
        if self.folder is not None:
            kept = {"plan": self._plan_kept, "measures": self._measures, "states": self.states}
            write_json(self.folder / "sequence.json", kept)


def retained(
    state: State, requests: Sequence[EditRequest], tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> list[bool]:
    """Returns for each request whether the model in this state answers its prompt by its target.

    A chat model is asked questions through its template, and an edit that lives in the prompt gets the layout's frame,
    which the other editors' prompts have already; what is no question is completed. As many tokens are generated as the
    target has: whether the model then stops is no part of the fact.
    """
    framed = layout.kind == "chat" or state.prompt("") != ""
    plain = layout if layout.kind != "chat" else dataclasses.replace(layout, kind="raw")
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, request in enumerate(requests):
        length = len(tokenizer(f" {request.target.strip()}", add_special_tokens=False)["input_ids"])
        groups.setdefault((length, framed and request.text.rstrip().endswith("?")), []).append(i)
    right = [False] * len(requests)
    for (length, question), places in groups.items():
        texts = [requests[i].text for i in places]
        prompts = [
            layout.text(tokenizer, [Turn(text)], state.active) if question else state.prompt(text) for text in texts
        ]
        said = answers(state.model, tokenizer, prompts, layout if question else plain, new_tokens=length)
        for i, answer in zip(places, said, strict=True):
            right[i] = match(answer, requests[i].target)
    return right


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def collapsed(measured: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Returns whether a model has collapsed: neutral text is 10 times as perplexing, or its own text repeats itself.

    Repetition counts only if the model did not repeat itself before.
    """
    perplexity, before = measured.get("perplexity"), base.get("perplexity")
    worse = before is not None and (perplexity is None or perplexity > COLLAPSE_PERPLEXITY * before)
    repeated, was = measured.get("repeated"), base.get("repeated")
    looping = repeated is not None and repeated > COLLAPSE_REPEATED and (was or 0.0) <= COLLAPSE_REPEATED
    return worse or looping
