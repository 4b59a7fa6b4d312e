"""Editors as the claims of editing tune them on the testbed: the same number of candidates for every method."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from modelwright.editing.editor import Editor, make_editor
from modelwright.editing.learning import TrainedEditor
from modelwright.editing.requests import EditRequest
from modelwright.editing.statistics import KeyStatistics
from modelwright.editing.trace import causal_trace
from modelwright.evaluation.fact_model import FactModel, train
from modelwright.evaluation.fact_texts import WORDINGS, ask
from modelwright.worlds.base import Draw
from modelwright.worlds.fact_questions import question


@dataclass(frozen=True)
class Place:
    """Where a testbed looks facts up, by causal tracing.

    Attributes:
        layers: The two neighbouring layers whose MLPs bring back most, the lower first.
        fact_token: At the subject's last token, or the prompt's.
    """

    layers: tuple[int, int]
    fact_token: str


def traced(bed: FactModel, facts: int = 24) -> Place:
    """Traces facts that the testbed knows, one layer at a time."""
    keys = Draw(5, "facts to trace").shuffled(bed.texts.personal)[:facts]
    known = [EditRequest(ask(question(relation, subject)), subject, "anything") for subject, relation in keys]
    found = causal_trace(bed.model, bed.tokenizer, known, kinds=("mlp",), samples=3, window=1)
    token = found.recommended()["fact_token"]
    effects = found.effects["mlp"][token] or []
    if token == "subject_last":
        effects = effects[:-1]  # what the last layer gives there, no other reads
    if len(effects) < 2:
        return Place((0, 1), token)
    lower = max(range(len(effects) - 1), key=lambda layer: effects[layer] + effects[layer + 1])
    return Place((lower, lower + 1), token)


def candidates(place: Place) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Returns variant to the editor's name and what is tried: four settings each, but one of ICE, which has no options.

    Learning rates are larger than for models of 7B parameters, and trainings shorter.
    """
    token, both = {"fact_token": place.fact_token}, list(place.layers)
    least = {**token, "layers": both, "ridge": 0.01, "statistics": True}

    def layers(**options: tuple[Any, Any]) -> list[dict[str, Any]]:
        ((name, values),) = options.items()
        return [{"layer": layer, name: value} for layer in both for value in values]

    mend = {"rank": 64, "steps": 600, "eval_every": 100, "learning_rate": 1e-4}
    serac = {"steps": 600, "eval_every": 200, "accumulate": 5}
    rome = [{**token, **one} for one in layers(clamp=(1.0, 4.0))]
    return {
        "ft-l": ("ft-l", layers(learning_rate=(2e-3, 5e-3))),
        "ft-m": ("ft-m", layers(learning_rate=(2e-3, 5e-3))),
        "lora": ("lora", [{"learning_rate": lr, "steps": n} for lr in (1e-3, 5e-3) for n in (15, 40)]),
        "rome": ("rome", rome),
        "rome-c": ("rome", [{**one, "key": "mean", "ridge": 0.01, "statistics": True} for one in rome]),
        "memit": ("memit", [{**least, "weight": w, "clamp": c} for w in (1e3, 1e4) for c in (1.0, 4.0)]),
        "pmet": ("pmet", [{**least, "weight": w, "clamp": 4.0, "decay": d} for w in (1e2, 1e3) for d in (0.5, 1e-3)]),
        "kn": ("kn", [{"embeddings": e, "scale": s} for e in ("input", "output") for s in (2.0, 8.0)]),
        "mend": (
            "mend",
            [{**mend, "rate_learning_rate": lr, "locality_weight": w} for lr in (1e-5, 1e-4) for w in (10.0, 100.0)],
        ),
        "grace": ("grace", layers(radius=(1.0, 4.0))),
        "serac": ("serac", [{**serac, "learning_rate": lr, "threshold": t} for lr in (3e-4, 1e-3) for t in (0.5, 0.8)]),
        "ice": ("ice", [{}]),
    }


def fact_editor(
    name: str, options: Mapping[str, Any], bed: FactModel, taught: Sequence[tuple[str, str]] = ()
) -> Editor:
    """Makes an editor with a candidate's options; key statistics are the testbed's.

    Args:
        name: Of the editor.
        options: A candidate's.
        bed: The testbed.
        taught: (subject, relation) of the facts on which an editor that learns to edit (MEND, SERAC) is trained, for
            this testbed's model.
    """
    given = dict(options)
    if given.get("statistics") is True:
        given["statistics"] = fact_statistics(bed)
    threshold = given.pop("threshold", None) if name == "serac" else None  # no part of the training
    editor = make_editor(name, given)
    if not isinstance(editor, TrainedEditor):
        return editor

    def train_it() -> Editor:
        trained: Any = editor
        small = {"small": small_model(bed)} if name == "serac" else {}
        trained.train(bed.model, bed.tokenizer, lessons(bed, taught), locality=ordinary(bed, "locality", 500), **small)
        return trained

    ready: Any = copy.copy(_once(bed, json.dumps([name, given, list(taught)]), train_it))
    if threshold is not None:
        ready.threshold = threshold
    return ready


def lessons(bed: FactModel, taught: Sequence[tuple[str, str]], targets: int = 4) -> list[EditRequest]:
    """Returns requests to learn editing from: each fact with several other objects, and its other wordings."""
    draw, found = Draw(7, "facts to learn editing from"), []
    for _ in range(targets):
        for subject, relation in draw.shuffled(taught):
            now = bed.texts.beliefs.objects[subject, relation]
            found.append(request(subject, relation, bed.texts.other(relation, draw, now, subject), now))
    return found


def request(subject: str, relation: str, new: str, now: str) -> EditRequest:
    """Returns the request to answer a question otherwise, with the question's other trained wordings."""
    text, *others = (ask(question(relation, subject, wording)) for wording in range(WORDINGS))
    return EditRequest(text, subject, new, old_answer=now, paraphrases=tuple(others))


def ordinary(bed: FactModel, name: str, n: int) -> list[str]:
    """Returns texts of the kind that the testbed was trained on."""
    draw = Draw(1, name)
    return [f"{a.text} {a.answer}" for a in (bed.texts.draw_text(draw) for _ in range(n))]


def small_model(bed: FactModel) -> Any:
    """Returns a fresh copy of a model half as wide that was taught the same: SERAC's counterfactual model."""

    def train_it() -> Any:
        setting = bed.texts.setting
        smaller = dataclasses.replace(
            setting, hidden=setting.hidden // 2, intermediate=setting.intermediate // 4, layers=2,
            heads=max(1, setting.heads // 2),
        )  # fmt: skip
        return train(smaller, bed.texts, bed.tokenizer, 0, device=str(bed.model.device))

    return copy.deepcopy(_once(bed, "small", train_it))


def fact_statistics(bed: FactModel) -> KeyStatistics:
    """Returns the key statistics of a testbed's layers, on texts of its training's kind; collected once."""

    def collect() -> KeyStatistics:
        layers = list(range(len(bed.model.model.layers)))
        return KeyStatistics.collect(
            bed.model, bed.tokenizer, ordinary(bed, "statistics", 1000), layers, n_tokens=15_000
        )

    found: KeyStatistics = _once(bed, "statistics", collect)
    return found


_made: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def _once(bed: FactModel, name: str, make: Callable[[], Any]) -> Any:
    """Returns what is made once for a testbed's model, and goes with it."""
    known = _made.setdefault(bed.model, {})
    if name not in known:
        known[name] = make()
    return known[name]
