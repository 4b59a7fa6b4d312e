"""The page of `modelwright generate --compare`: what a method writes beside what the model writes without it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelwright import provenance
from modelwright.errors import UserError
from modelwright.evaluation.answers import answers_of, contains, exact_match
from modelwright.report.render import _environment, _write

#: Completions that the page shows: those that differ first.
SHOWN = 200
#: Characters of a prompt that are shown without a click: its end, where the question stands.
_PROMPT = 600
_PIECES = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Shown:
    """One prompt on the page.

    Attributes:
        number: Its number, from 1.
        prompt: Its end.
        before: What of it stands before that.
        plain: Runs of text of the plain completion; marked where the method has something else.
        method: The same of the method's.
        differs: Whether they differ.
        first: First token that differs, from 1, or None.
        answers: Right answers, if the row has them.
        right: Whether plain and method contain one, or None.
    """

    number: int
    prompt: str
    before: str
    plain: list[tuple[bool, str]]
    method: list[tuple[bool, str]]
    differs: bool
    first: int | None
    answers: list[str] | None
    right: tuple[bool, bool] | None


def marked(left: str, right: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Compares two texts by words, and returns the runs of each, with True for those that the other has not."""
    a, b = _PIECES.findall(left), _PIECES.findall(right)
    runs: tuple[list[tuple[bool, str]], list[tuple[bool, str]]] = ([], [])
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, piece in zip(runs, ("".join(a[a0:a1]), "".join(b[b0:b1]))):
            if piece:
                side.append((kind != "equal", piece))
    return _joined(runs[0]), _joined(runs[1])


def _joined(runs: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """Takes the space between two changed words for changed too, so that a changed sentence is one mark."""
    joined: list[tuple[bool, str]] = []
    for at, (changed, text) in enumerate(runs):
        between = not changed and not text.strip() and 0 < at < len(runs) - 1
        if joined and joined[-1][0] == (changed or between):
            joined[-1] = (joined[-1][0], joined[-1][1] + text)
        else:
            joined.append((changed or between, text))
    return joined


def write_comparison(
    page: Path,
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    answer_field: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the page.

    Args:
        page: HTML file to write.
        rows: With ``prompt``, ``completion``, ``plain`` and ``first_difference``, as
            :func:`~modelwright.decoding.run.generate_to_file` makes them.
        summary: Counts and rates of the same function.
        settings: What is to be said of how it was made.
        answer_field: Field with right answers; see :func:`~modelwright.evaluation.answers.answers_of`.
        force: Whether to replace the page.

    Returns:
        The page's name, and scores of both if the rows have right answers.

    Raises:
        UserError: ``answer_field`` is given, and no row has it.
    """
    method = str(summary["method"])
    kept: list[Shown] = []
    same: list[Shown] = []
    scores: dict[str, list[tuple[float, float]]] = {"exact match": [], "contains the answer": []}
    for number, row in enumerate(rows, start=1):
        answers = answers_of(row, answer_field)
        right = None
        if answers is not None:
            both = [str(row["plain"]), str(row["completion"])]
            scores["exact match"].append((exact_match(both[0], answers), exact_match(both[1], answers)))
            scores["contains the answer"].append((contains(both[0], answers), contains(both[1], answers)))
            right = (bool(scores["contains the answer"][-1][0]), bool(scores["contains the answer"][-1][1]))
        differs = row["first_difference"] is not None
        into = kept if differs else same
        if len(into) < SHOWN:
            into.append(_shown(number, row, answers, right))
    if answer_field is not None and not scores["exact match"]:
        raise UserError(f"No row has right answers in the field '{answer_field}': check --answer-field.")
    shown = sorted([*kept, *same][:SHOWN], key=lambda one: one.number)
    means = {
        name: tuple(sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
        for name, pairs in scores.items()
        if pairs
    }
    html = _environment().get_template("comparison.html").render(
        method=method,
        shown=shown,
        total=summary["completions"],
        differing=summary["completions_that_differ"],
        tiles=_tiles(summary, means),
        table_rows=_table(summary, means),
        scored=len(scores["exact match"]),
        making=_making(settings),
        date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip
    _write(html, page, force)
    found: dict[str, Any] = {"page": str(page)}
    if means:
        found["scores"] = {name: {"plain": p, method: m} for name, (p, m) in means.items()}
    return found


def _shown(number: int, row: Mapping[str, Any], answers: list[str] | None, right: tuple[bool, bool] | None) -> Shown:
    prompt = str(row["prompt"])
    cut = max(0, len(prompt) - _PROMPT)
    if cut:  # not inside a word
        cut = next((m.end() for m in re.finditer(r"\s", prompt[cut : cut + 80])), 0) + cut
    plain, method = marked(str(row["plain"]).strip(), str(row["completion"]).strip())
    first = row["first_difference"]
    return Shown(
        number, prompt[cut:], prompt[:cut], plain, method, first is not None, None if first is None else first + 1,
        answers, right,
    )  # fmt: skip


def _tiles(summary: Mapping[str, Any], means: Mapping[str, Any]) -> list[tuple[str, str]]:
    total, differing = summary["completions"], summary["completions_that_differ"]
    tiles = [(f"{differing} of {total}", "completions differ")]
    if (first := summary["mean_first_difference"]) is not None:
        tiles.append((f"{first + 1:.3g}", "first token that differs, on average"))
    plain, own = summary["plain_tokens_per_second"], summary["tokens_per_second"]
    if plain and own:
        tiles.append((f"{own / plain:.2f} ×", "the plain model's tokens per second"))
    if means:
        before, after = means["contains the answer"]
        tiles.append((f"{before:.0%} → {after:.0%}", "of completions contain the answer"))
    return tiles


def _table(summary: Mapping[str, Any], means: Mapping[str, Any]) -> list[dict[str, Any]]:
    def rate(value: float | None) -> str:
        return "–" if value is None else f"{value:,.1f}"

    rows = [
        {
            "label": "tokens per second",
            "cells": [rate(summary["plain_tokens_per_second"]), rate(summary["tokens_per_second"])],
        }
    ]
    for name, (plain, own) in means.items():
        rows.append({"label": name, "cells": [f"{plain:.1%}", f"{own:.1%}"]})
    return rows


def _making(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    sampling = settings.get("sampling") or {}
    lines = [("Model", str(settings.get("model", "")))]
    for name, options in settings.get("with") or []:
        said = ", ".join(f"{key} {_said(value)}" for key, value in options.items() if value not in (None, [], ""))
        lines.append((name, said or "its defaults"))
    lines.append(
        ("Sampling", ", ".join(f"{k.replace('_', ' ')} {_said(v)}" for k, v in sampling.items() if v not in ([], ())))
    )
    lines.append(("Versions", ", ".join(f"{name} {version}" for name, version in provenance.versions().items())))
    return lines


def _said(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    # A content hash stands for a file; its first digits tell two apart.
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text
