"""Reads a recipe's run folder, finished or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.errors import UserError
from modelwright.files import read_json


@dataclass(frozen=True)
class Step:
    """One finished step of a run.

    Attributes:
        id: Unique name, such as ``train-zip-fit-0``.
        name: The recipe's name for it, such as ``train``; several steps share it where the recipe has a matrix.
        verb: The verb it ran.
        at: Matrix dimension to value.
        options: Options as resolved.
        result: What the verb returned.
        seconds: How long it took when it was run.
        cached: Whether an earlier result was used.
        folder: Its outputs.
    """

    id: str
    name: str
    verb: str
    at: Mapping[str, Any]
    options: Mapping[str, Any]
    result: Mapping[str, Any]
    seconds: float
    cached: bool
    folder: Path

    def number(self, path: str) -> float | None:
        """Returns the number at a dotted path in the result, such as ``groups.code``; None when there is none."""
        value: Any = self.result
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value)

    def find(self, name: str) -> Path | None:
        """Returns the first file of that name in the step's folder or below it."""
        return next(iter(sorted(self.folder.rglob(name))), None) if self.folder.is_dir() else None


@dataclass(frozen=True)
class Run:
    """A run folder's ``run.json`` and its steps that have a result.

    Attributes:
        folder: The run's folder.
        raw: What ``run.json`` holds.
        steps: Steps with a result, in the order of the recipe.
        unfinished: How many steps have none yet.
    """

    folder: Path
    raw: Mapping[str, Any]
    steps: tuple[Step, ...]
    unfinished: int

    def named(self, step: str) -> list[Step]:
        """Returns the steps of a name, in the order of the run."""
        return [s for s in self.steps if s.name == step]

    def once(self, steps: Sequence[Step]) -> list[Step]:
        """Returns the steps without those whose equal was done for them: one of each folder."""
        return list({s.folder if s.folder != self.folder else s.id: s for s in reversed(steps)}.values())[::-1]


def load_run(folder: Path) -> Run:
    """Reads a run folder. Steps without a result (a run that is going on, or was stopped) are counted and left out.

    Raises:
        UserError: There is no ``run.json``, or it is not a run's.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no run.json: give the folder that `modelwright run` wrote.")
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("steps", []), list):
        raise UserError(f"{path} is not the record of a run: run the recipe again.")
    if raw.get("format", 1) != 1:
        raise UserError(f"{path} has format {raw['format']!r}, which this version does not read: it reads format 1.")
    steps, unfinished = [], 0
    for entry in raw.get("steps", []):
        place = folder / str(entry.get("folder") or "")
        result = entry.get("result")
        if result is None and entry.get("folder") and (place / "result.json").is_file():
            result = read_json(place / "result.json")
        if not isinstance(result, dict):
            unfinished += 1
            continue
        steps.append(
            Step(
                id=str(entry.get("id", "")),
                name=str(entry.get("step") or entry.get("id", "")),
                verb=str(entry.get("verb", "")),
                at=entry.get("at") or {},
                options=entry.get("options") or {},
                result=result,
                seconds=float(entry.get("seconds") or 0.0),
                cached=bool(entry.get("cached")),
                folder=place,
            )
        )
    planned = raw.get("planned")
    if isinstance(planned, int):
        unfinished = max(unfinished, planned - len(steps))
    return Run(folder, raw, tuple(steps), unfinished)


def read_rows(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file. A torn last line, as a killed run leaves it, ends the file."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        for i, line in enumerate(stream):
            if limit is not None and i >= limit:
                return
            try:
                row = json.loads(line)
            except ValueError:
                return
            if isinstance(row, dict):
                yield row
