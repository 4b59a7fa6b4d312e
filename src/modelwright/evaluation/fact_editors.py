"""Editors as the claims of editing tune them on the testbed: the same number of candidates for every method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelwright.editing.editor import Editor, make_editor
from modelwright.editing.requests import EditRequest
from modelwright.editing.statistics import KeyStatistics
from modelwright.editing.trace import causal_trace
from modelwright.evaluation.fact_model import FactModel
from modelwright.evaluation.fact_texts import ask
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
    lower = max(range(len(effects) - 1), key=lambda layer: effects[layer] + effects[layer + 1])
    return Place((lower, lower + 1), token)


def candidates(place: Place) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Returns variant to the editor's name and what is tried: four settings each, but one of ICE, which has no options.

    Learning rates are larger than for models of 7B parameters.
    """
    token, both = {"fact_token": place.fact_token}, list(place.layers)
    least = {**token, "layers": both, "ridge": 0.01, "statistics": True}

    def layers(**options: tuple[Any, Any]) -> list[dict[str, Any]]:
        ((name, values),) = options.items()
        return [{"layer": layer, name: value} for layer in both for value in values]

    rome = [{**token, **one} for one in layers(clamp=(1.0, 4.0))]
    return {
        "ft-l": ("ft-l", layers(learning_rate=(2e-3, 5e-3))),
        "ft-m": ("ft-m", layers(learning_rate=(2e-3, 5e-3))),
        "lora": ("lora", [{"learning_rate": lr, "steps": n} for lr in (1e-3, 5e-3) for n in (15, 40)]),
        "rome": ("rome", rome),
        "rome-c": ("rome", [{**one, "key": "mean", "ridge": 0.01, "statistics": True} for one in rome]),
        "memit": ("memit", [{**least, "weight": w, "clamp": c} for w in (1e3, 1e4) for c in (1.0, 4.0)]),
        "pmet": ("pmet", [{**least, "weight": w, "clamp": c} for w in (1e2, 1e3) for c in (1.0, 4.0)]),
        "kn": ("kn", [{"threshold": t, "scale": s} for t in (0.2, 0.5) for s in (2.0, 8.0)]),
        "grace": ("grace", layers(radius=(1.0, 4.0))),
        "ice": ("ice", [{}]),
    }


def fact_editor(name: str, options: Mapping[str, Any], bed: FactModel) -> Editor:
    """Makes an editor with a candidate's options; key statistics are the testbed's."""
    given = dict(options)
    if given.get("statistics") is True:
        given["statistics"] = fact_statistics(bed)
    return make_editor(name, given)


_statistics: dict[int, KeyStatistics] = {}


def fact_statistics(bed: FactModel) -> KeyStatistics:
    """Returns the key statistics of a testbed's layers, on texts of its training's kind; collected once."""
    if id(bed) not in _statistics:
        draw = Draw(1, "statistics")
        texts = [f"{a.text} {a.answer}" for a in (bed.texts.draw_text(draw) for _ in range(1000))]
        layers = list(range(len(bed.model.model.layers)))
        _statistics[id(bed)] = KeyStatistics.collect(bed.model, bed.tokenizer, texts, layers, n_tokens=15_000)
    return _statistics[id(bed)]
