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
    """What one method chose, over its repetitions; documents and scores are those of the first."""

    row: str
    shares: dict[str, float]
    precision: Sample | None
    length_correlation: Sample | None
    documents: Sample | None
    tokens: Sample | None
    seconds: Sample | None
    top: list[Document] = field(default_factory=list)
    misses: list[Document] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)


def gather(run: Run, spec: Selections) -> list[Choice]:
    """Returns one entry per method in the order of the run."""
    by_row: dict[str, list[Step]] = {}
    for step in run.named(spec.step):
        by_row.setdefault(str(step.at.get(spec.rows, step.result.get("method", step.name))), []).append(step)
    return [_choice(row, steps, spec) for row, steps in by_row.items()]


def _choice(row: str, steps: Sequence[Step], spec: Selections) -> Choice:
    def sample(path: str) -> Sample | None:
        values = [v for s in steps if (v := s.number(path)) is not None]
        return Sample.of(values) if values else None

    shares = [_shares(s, spec) for s in steps]
    shares = [s for s in shares if s]
    groups = list(dict.fromkeys(g for s in shares for g in s))
    choice = Choice(
        row=row,
        shares={g: sum(s.get(g, 0.0) for s in shares) / len(shares) for g in groups},
        precision=sample("precision"),
        length_correlation=sample("length_correlation"),
        documents=sample("documents"),
        tokens=sample("tokens"),
        seconds=sample("seconds"),
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
    misses = steps[0].result.get("near_misses")
    if isinstance(misses, list):
        choice.misses = [_document(m, spec) for m in misses[: spec.documents] if isinstance(m, Mapping)]
    return choice


def _shares(step: Step, spec: Selections) -> dict[str, float]:
    """Returns percentages by group, from the result's counts or else from the chosen rows."""
    groups = step.result.get("groups")
    counts: Counter[str] = Counter()
    if isinstance(groups, Mapping):
        for group, value in groups.items():
            number = value.get("chosen") if isinstance(value, Mapping) else value
            if isinstance(number, (int, float)):
                counts[str(group)] += int(number)
    elif (path := step.find(spec.file)) is not None:
        counts.update(str(row[spec.group]) for row in read_rows(path) if spec.group in row)
    total = sum(counts.values())
    return {group: 100 * n / total for group, n in counts.items()} if total else {}


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
