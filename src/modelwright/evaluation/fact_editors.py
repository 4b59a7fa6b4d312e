"""Editors as the claims of editing tune them on the testbed: the same number of candidates for every method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelwright.editing.editor import Editor, make_editor
from modelwright.editing.statistics import KeyStatistics
from modelwright.evaluation.fact_model import FactModel
from modelwright.worlds.base import Draw

#: Small models look facts up where the answer begins, not at the subject.
_LAST: dict[str, Any] = {"fact_token": "last"}
#: Variant to the editor's name, what is fixed, and the candidates: four for each, but for ICE, which has no options.
#: The middle layers are those that tracing points at in three layers; learning rates are larger than for 7B models.
CANDIDATES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "ft-l": ("ft-l", {}, [{"layer": la, "learning_rate": lr} for la in (1, 2) for lr in (2e-3, 5e-3)]),
    "ft-m": ("ft-m", {}, [{"layer": la, "learning_rate": lr} for la in (1, 2) for lr in (2e-3, 5e-3)]),
    "lora": ("lora", {}, [{"learning_rate": lr, "steps": n} for lr in (1e-3, 5e-3) for n in (15, 40)]),
    "rome": ("rome", _LAST, [{"layer": la, "clamp": c} for la in (1, 2) for c in (1.0, 4.0)]),
    "rome-c": (
        "rome", {**_LAST, "key": "mean", "ridge": 0.01, "statistics": True},
        [{"layer": la, "clamp": c} for la in (1, 2) for c in (1.0, 4.0)],
    ),
    "memit": (
        "memit", {**_LAST, "layers": [1, 2], "ridge": 0.01, "statistics": True},
        [{"weight": w, "clamp": c} for w in (1e3, 1e4) for c in (1.0, 4.0)],
    ),
    "grace": ("grace", {}, [{"layer": la, "radius": r} for la in (1, 2) for r in (1.0, 4.0)]),
    "ice": ("ice", {}, [{}]),
}  # fmt: skip


def fact_editor(variant: str, options: Mapping[str, Any], bed: FactModel) -> Editor:
    """Makes the editor of a variant with a candidate's options; key statistics are the testbed's."""
    name, fixed, _ = CANDIDATES[variant]
    given = {**fixed, **options}
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
