"""The five dimensions, from rows of answers: ours or the published ones.

A row is one item under one method: ``method``, ``item``, ``topic``, ``seconds`` (of the edit), ``probes`` (each with
``name``, ``kind``, ``label``, ``pre`` and ``post`` answers, ``pre_right`` and ``post_right``), and ``turns``: name of
the follow-up (``yes``, ``no`` or ``sure``) to whether the answer at each turn, from 0, was right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelwright.evaluation.hallueditbench.items import GENERALISATION, HOPS
from modelwright.evaluation.matching import Protocol, match

Row = Mapping[str, Any]
#: What the short table shows, with headings; robustness is that of the last turn asked.
DIMENSIONS = {
    "efficacy": "Efficacy",
    "generalisation": "Generalisation",
    "portability": "Portability",
    "locality": "Locality",
    "robustness": "Robustness",
}


@dataclass
class Scores:
    """Shares of right answers under one method; None where nothing was asked.

    Attributes:
        method: Name of the method.
        items: Items.
        parts: Each question's share after the edit.
        before: The same before the edit; there is none for locality.
        turns: Follow-up to the share at each turn.
        seconds: Mean time of an edit.
    """

    method: str
    items: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    turns: dict[str, list[float]] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def efficacy(self) -> float | None:
        """Share of right answers to the question that was edited."""
        return self.parts.get("efficacy")

    @property
    def generalisation(self) -> float | None:
        """Mean over the kinds of question about the same fact: rephrased, yes, no, choices, reversed."""
        return _mean(self.parts[name] for name in GENERALISATION if name in self.parts)

    @property
    def portability(self) -> float | None:
        """Mean over 2 to 6 hops; one hop is efficacy."""
        return _mean(self.parts[f"{n}hop"] for n in HOPS if f"{n}hop" in self.parts)

    @property
    def locality(self) -> float | None:
        """Share of answers to other questions about the subject that stayed."""
        return self.parts.get("locality")

    @property
    def robustness(self) -> float | None:
        """Share that keeps the new fact at the last turn: mean of the follow-ups whose right reply is Yes and No."""
        return _mean(values[-1] for name, values in self.turns.items() if name != "sure" and values)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-able."""
        return {
            "method": self.method, "items": self.items, **{name: getattr(self, name) for name in DIMENSIONS},
            "parts": self.parts, "before": self.before, "turns": self.turns, "seconds": self.seconds,
        }  # fmt: skip


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def score(rows: Iterable[Row], protocol: Protocol | None = None) -> list[Scores]:
    """Scores rows, a line a method in order of appearance.

    Several probes of one name in an item (paraphrases, locality questions) count as their mean, so that each item
    weighs the same.

    Args:
        rows: See above.
        protocol: Decide anew by this rule alone what is right; None takes what the rows say.
    """
    gathered: dict[str, list[Row]] = {}
    for row in rows:
        gathered.setdefault(row["method"], []).append(row)
    return [_score(method, found, protocol) for method, found in gathered.items()]


def _score(method: str, rows: Sequence[Row], protocol: Protocol | None) -> Scores:
    after: dict[str, list[float]] = {}
    before: dict[str, list[float]] = {}
    turns: dict[str, list[list[float]]] = {}
    for row in rows:
        for gathered, side in ((after, "post"), (before, "pre")):
            of_item: dict[str, list[float]] = {}
            for probe in row["probes"]:
                right = _right(probe, side, protocol)
                if right is not None:
                    of_item.setdefault(probe["name"], []).append(float(right))
            for name, values in of_item.items():
                gathered.setdefault(name, []).append(sum(values) / len(values))
        for name, values in row.get("turns", {}).items():
            turns.setdefault(name, []).append([float(value) for value in values])
    seconds = [row["seconds"] for row in rows if row.get("seconds") is not None]
    return Scores(
        method=method,
        # The published answers come from three runs; the items are those whose edited question was asked.
        items=len(
            {r["item"] for r in rows if any(p["name"] == "efficacy" for p in r["probes"])} or {r["item"] for r in rows}
        ),
        parts={name: sum(v) / len(v) for name, v in after.items()},
        before={name: sum(v) / len(v) for name, v in before.items()},
        turns={name: [sum(column) / len(column) for column in zip(*of_items)] for name, of_items in turns.items()},
        seconds=_mean(seconds),
    )


def _right(probe: Mapping[str, Any], side: str, protocol: Protocol | None) -> bool | None:
    if probe["label"] is None:  # locality: what was answered before is right, and right it was before
        if side == "pre":
            return None
        if protocol is not None:
            return probe["post"] == probe["pre"] or match(probe["post"], probe["pre"], "text", protocol)
    elif protocol is not None:
        return match(probe[side], probe["label"], probe["kind"], protocol)
    value = probe.get(f"{side}_right")
    return None if value is None else bool(value)


def balance(scores: Scores) -> float:
    """Returns one number to rank methods by: the harmonic mean of the dimensions that were measured.

    A method that is bad at one thing is bad: GRACE answers the edited question only, fine-tuning forgets the rest.
    Portability is left out, for it is low for every method and depends on more than the edit.
    """
    values = [v for name in DIMENSIONS if name != "portability" and (v := getattr(scores, name)) is not None]
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def advice(scores: Sequence[Scores], in_prompt: Iterable[str] = ("ice", "ike")) -> str:
    """Returns which editor to use for this model, in a sentence or two.

    Args:
        scores: All methods.
        in_prompt: Methods that need their facts put before every question.
    """
    apart = set(in_prompt)
    ranked = sorted((s for s in scores if s.method not in apart), key=balance, reverse=True)
    others = sorted((s for s in scores if s.method in apart), key=balance, reverse=True)
    said = "The balance is the harmonic mean of efficacy, generalisation, locality and robustness, where measured."
    if ranked and balance(ranked[0]) > 0:
        best = ranked[0]
        measured = ", ".join(
            f"{DIMENSIONS[n].lower()} {v:.0%}" for n in DIMENSIONS if (v := getattr(best, n)) is not None
        )
        text = f"To change this model itself use {best.method}, the best balanced: {measured}."
        if (best.efficacy or 0) < 0.5:
            text += " But it corrects fewer than half of the facts."
    elif ranked:
        text = "Every method that changes this model itself scores 0 on some dimension: use none as they are set."
    else:
        text = ""
    if others and (not ranked or balance(others[0]) > balance(ranked[0])):
        text += f" {others[0].method} is better balanced ({balance(others[0]):.2f}"
        text += f" against {balance(ranked[0]):.2f})" if ranked else ")"
        text += ", if you can put the facts before every question."
    return f"{text} {said}".strip()
