"""What selection steps chose, from their results and the rows they wrote."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelwright.report.runs import Run, Step, read_rows
from modelwright.report.spec import Selections
from modelwright.verify.statistics import Sample

_EXCERPT = 420


@dataclass(frozen=True)
class Document:
    """A chosen (or nearly chosen) document as shown."""

    rank: str
    score: float | None
    group: str
    length: int
    excerpt: str
    cut: bool
    wanted: bool | None


@dataclass
class Choice:
    """What one method chose, over its repetitions; documents and scores are those of the first.

    Attributes:
        row: The method.
        shares: Percentage of the chosen documents by group.
        pool_shares: The same of the pool.
        facts: Numbers by name; see :data:`FACTS`.
        top: The first documents.
        last: The last that were taken: where the method drew its line.
        scores: Scores by group.
    """

    row: str
    shares: dict[str, float]
    pool_shares: dict[str, float]
    facts: dict[str, Sample]
    top: list[Document] = field(default_factory=list)
    last: list[Document] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)


#: Heading, paths in a selection's result of which the first that is there is shown, and digits.
FACTS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("precision", ("precision",), 2),
    ("recall", ("recall",), 2),
    ("documents", ("documents",), 0),
    ("tokens", ("tokens",), 0),
    ("bytes per document", ("bytes_per_document.chosen",), 0),
    ("score–length correlation", ("length_correlation.spearman", "length_correlation"), 2),
    ("shared with held-out", ("contamination.contaminated_documents",), 1),
    ("seconds", ("seconds",), 1),
)


def gather(run: Run, spec: Selections) -> list[Choice]:
    """Returns one entry per method in the order of the run."""
    by_row: dict[str, list[Step]] = {}
    for step in run.named(spec.step):
        by_row.setdefault(str(step.at.get(spec.rows, step.result.get("method", step.name))), []).append(step)
    return [_choice(row, steps, spec) for row, steps in by_row.items()]


def _choice(row: str, steps: Sequence[Step], spec: Selections) -> Choice:
    facts = {}
    for name, paths, _ in FACTS:
        values = [
            v for s in steps if (v := next((n for p in paths if (n := s.number(p)) is not None), None)) is not None
        ]
        if values:
            facts[name] = Sample.of(values)
    choice = Choice(
        row=row,
        shares=_mean([_chosen_shares(s, spec) for s in steps]),
        pool_shares=_mean([_percentages(s.result.get("pool_groups")) for s in steps]),
        facts=facts,
    )
    path = steps[0].find(spec.file)
    if path is not None:
        rows = list(read_rows(path))
        for chosen in rows:
            score = _score(chosen)
            if score is not None:
                choice.scores.setdefault(str(chosen.get(spec.group, "?")), []).append(score)
        ranked = sorted(rows, key=_rank)
        choice.top = [_document(r, spec) for r in ranked[: spec.documents]]
        choice.last = [_document(r, spec) for r in ranked[spec.documents :][-2:] if spec.documents]
    return choice


def _chosen_shares(step: Step, spec: Selections) -> dict[str, float]:
    """Returns percentages by group, from the result's counts or else from the chosen rows."""
    path = step.find(spec.file)
    if "groups" in step.result or path is None:
        return _percentages(step.result.get("groups"))
    return _percentages(Counter(str(row[spec.group]) for row in read_rows(path) if spec.group in row))


def _percentages(counts: Any) -> dict[str, float]:
    numbers = {str(g): n for g, n in counts.items() if isinstance(n, int)} if isinstance(counts, Mapping) else {}
    total = sum(numbers.values())
    return {group: 100 * n / total for group, n in numbers.items()} if total else {}


def _mean(shares: Sequence[dict[str, float]]) -> dict[str, float]:
    known = [s for s in shares if s]
    return {g: sum(s.get(g, 0.0) for s in known) / len(known) for g in dict.fromkeys(g for s in known for g in s)}


def _rank(row: Mapping[str, Any]) -> float:
    rank = row.get("rank")
    return float(rank) if isinstance(rank, (int, float)) else math.inf


def _score(row: Mapping[str, Any]) -> float | None:
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        return None
    return float(score)


def _document(row: Mapping[str, Any], spec: Selections) -> Document:
    text, group, rank = str(row.get(spec.text_field, "")), row.get(spec.group), row.get("rank")
    return Document(
        rank="" if rank is None else str(rank),
        score=_score(row),
        group="" if group is None else str(group),
        length=len(text.encode("utf-8", errors="replace")),
        excerpt=text[:_EXCERPT].rstrip(),
        cut=len(text) > _EXCERPT,
        wanted=None if spec.target is None or group is None else str(group) == spec.target,
    )
