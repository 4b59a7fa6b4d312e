"""The parts of a run's report, as plain data for the template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError
from modelwright.report import figures
from modelwright.report.compare import Difference, Key, Table, answer, build_table, plural
from modelwright.report.runs import Run, Step, read_rows
from modelwright.report.selections import FACTS, Choice, gather
from modelwright.report.spec import Compare, Curves, Samples, Selections
from modelwright.verify.statistics import Sample, mean_and_spread, number
from modelwright.verify.view import minutes

if TYPE_CHECKING:
    from modelwright.report.render import Page

#: Rows of a plain table, points of a curve and scores of a histogram beyond which a page would only grow.
_PLAIN_ROWS, _CURVE_POINTS = 200, 240
_MACHINE = {"memory_gib": "memory (GiB)"}


class Palette:
    """Gives a value the same colour and wording all over the page."""

    def __init__(self, run: Run, labels: Mapping[str, str]) -> None:
        self.labels = dict(labels)
        self._series: dict[str, list[str]] = {}
        for step in run.steps:
            for dimension, value in step.at.items():
                self.series(dimension, str(value))

    def series(self, dimension: str, value: str) -> int:
        """Returns the number of a value's colour within its dimension."""
        known = self._series.setdefault(dimension, [])
        if value not in known:
            known.append(value)
        return known.index(value)

    def label(self, value: str) -> str:
        """Returns how a value reads."""
        return self.labels.get(value, value)

    def legend(self, dimension: str, values: Iterable[str]) -> list[dict[str, Any]]:
        """Returns the entries of a legend."""
        return [{"series": self.series(dimension, v), "label": self.label(v)} for v in values]


def add_comparison(page: Page, run: Run, spec: Compare, palette: Palette, name: str) -> None:
    """Adds the answer, the tables and the figure of one comparison."""
    table = build_table(run, spec, palette.labels)
    page.answers.append((spec.title, answer(table)))
    page.comparisons.append(
        {
            "title": spec.title,
            "heading": _heading(spec),
            "table": _value_table(table),
            "differences": _difference_tables(table),
            "figure": _dots(table, palette, name),
            "legend": palette.legend(spec.columns, table.columns) if spec.columns else [],
            "caption": _dots_caption(spec),
            "repetitions": max((len(v) for v in table.values.values()), default=0),
            "over": spec.over,
            "overs": plural(spec.over or "run"),
        }
    )
    if len(page.tiles) == 0:
        page.tiles += _tiles(table)


def _heading(spec: Compare) -> str:
    unit = [spec.unit] if spec.unit and spec.unit not in spec.title else []
    return ", ".join([*unit, f"{spec.better} is better"])


def _value_table(table: Table) -> dict[str, Any]:
    best = {c: table.best([(r, c) for r in table.rows]) for c in table.columns}
    most = max((len(v) for v in table.values.values()), default=0)
    rows = []
    for row in table.rows:
        cells = []
        for column in table.columns:
            sample = table.sample((row, column))
            cells.append(
                {
                    "text": mean_and_spread(sample, table.spec.digits) if sample else "–",
                    "best": best[column] == (row, column),
                    "note": f"n = {sample.n}" if sample and sample.n < most else "",
                }
            )
        rows.append({"label": table.label(row), "cells": cells, "reference": not table.competes(row)})
    columns = [{"label": table.label(c) or table.spec.title, "reference": not table.competes(c)} for c in table.columns]
    return {"corner": table.spec.rows, "columns": columns, "rows": rows}


def _difference_tables(table: Table) -> list[dict[str, Any]]:
    found = []
    base_row, base_column = table.baseline_row(), table.baseline_column()
    if base_row is not None:
        found.append(_difference_table(table, base_row, lambda r, c: (base_row, c), rows=base_row))
    if base_column is not None and len(table.columns) > 1:
        found.append(_difference_table(table, base_column, lambda r, c: (r, base_column), column=base_column))
    return found


def _difference_table(table: Table, base: str, against: Any, rows: str = "", column: str = "") -> dict[str, Any]:
    columns = [c for c in table.columns if not column or c != column]
    body = []
    for row in table.rows:
        if row != rows:
            cells = [_difference_cell(table.difference((row, c), against(row, c)), table) for c in columns]
            body.append({"label": table.label(row), "cells": cells})
    heads = [table.label(c) or "difference" for c in columns]
    return {"title": f"Difference from {table.label(base)}", "corner": table.spec.rows, "columns": heads, "rows": body}


def _difference_cell(difference: Difference | None, table: Table) -> dict[str, str]:
    if difference is None:
        return {"text": "–", "interval": "", "kind": ""}
    digits = table.spec.digits
    interval = ""
    if difference.interval:
        low, high = (number(x, digits, sign=True) for x in difference.interval)
        interval = f"{low} to {high}"
    wanted = -1 if table.spec.better == "lower" else 1
    kind = {1: "better", -1: "worse", 0: "same"}[difference.direction * wanted]
    return {"text": number(difference.sample.mean, digits, sign=True), "interval": interval, "kind": kind}


def _dots(table: Table, palette: Palette, name: str) -> str:
    spec = table.spec
    cells = []
    for i, row in enumerate(table.rows):
        for column in table.columns:
            sample = table.sample((row, column))
            if sample is not None:
                place = table.columns.index(column)
                series = palette.series(spec.columns, column) if spec.columns else 0
                values = list(table.values[row, column].values())
                cells.append(figures.Dots(i, place, series, values, sample.mean, sample.sd))
    if not cells:
        raise UserError(f"'{spec.title}' has no number to draw yet.")
    said = [
        f"{table.label(k[0])}{' with ' + table.label(k[1]) if k[1] else ''} {mean_and_spread(s, spec.digits)}"
        for k in [(r, c) for r in table.rows for c in table.columns]
        if (s := table.sample(k)) is not None
    ]
    axis = f"{spec.title} ({_heading(spec)})"
    labels = [table.label(r) for r in table.rows]
    return figures.dots(name, f"{axis}: {'; '.join(said)}.", labels, cells, len(table.columns), axis)


def _dots_caption(spec: Compare) -> str:
    repeated = f"Each faint dot is one {spec.over}; the mark is their mean, the bar one standard deviation. "
    side = "left" if spec.better == "lower" else "right"
    return (repeated if spec.over else "") + f"Further to the {side} is better."


def _tiles(table: Table) -> list[tuple[str, str]]:
    tiles: list[tuple[str, str]] = []
    keys: list[Key] = [(r, c) for r in table.rows for c in table.columns]
    best = table.best(keys)
    sample = table.sample(best) if best else None
    if best is None or sample is None:
        return tiles
    name = table.label(best[0]) + (f" with {table.label(best[1])}" if best[1] else "")
    unit = f" {table.spec.unit}" if table.spec.unit else ""
    tiles.append((number(sample.mean, table.spec.digits), f"{unit.strip() or table.spec.title}, best of all: {name}"))
    base = (table.baseline_row() or best[0], table.baseline_column() or best[1])
    difference = table.difference(best, base) if base != best else None
    if difference is not None and difference.relative is not None:
        against = table.label(base[0]) + (f" with {table.label(base[1])}" if base[1] else "")
        tiles.append((f"{number(100 * difference.relative, 1, sign=True)}%", f"against {against}"))
    return tiles


def add_tiles(page: Page, run: Run) -> None:
    """Adds how many steps were run and how long they took."""
    done = run.once(run.steps)
    spent = sum(s.seconds for s in done)
    trained = sum(s.verb.startswith("train") for s in done)
    page.tiles.append((str(trained or len(run.steps)), "models trained" if trained else "steps"))
    page.tiles.append((minutes(spent), "of work in all steps"))


def curve_figures(run: Run, spec: Curves, palette: Palette, name: str) -> dict[str, Any]:
    """Returns a panel for each value of the second dimension, with a line for each value of the first.

    Raises:
        UserError: No step of that name has finished, or none wrote the log with both quantities.
    """
    if len(spec.lines) > 2:
        raise UserError(
            f"'{spec.title}' names {len(spec.lines)} dimensions for its lines: at most two can be told apart."
        )
    steps = run.named(spec.step)
    first, second = (spec.lines[i] if len(spec.lines) > i else "" for i in range(2))
    panels: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for step in steps:
        points = _points(step, spec)
        if points:
            panel = panels.setdefault(str(step.at.get(second, "")), {})
            panel.setdefault(str(step.at.get(first, "")), []).append(points)
    if not panels:
        raise UserError(f"'{spec.title}': no finished '{spec.step}' step has '{spec.x}' and '{spec.y}' in {spec.file}.")
    drawn = {p: [_line(v, runs, first, palette) for v, runs in lines.items()] for p, lines in panels.items()}
    lowest, highest, clipped = _range([line for lines in drawn.values() for line in lines], spec.whole)
    room = 0.04 * (highest - lowest) or 0.5
    axis = (spec.label or spec.y.replace("_", " ")) + (f" ({spec.unit})" if spec.unit else "")
    parts = []
    for i, (panel_value, lines) in enumerate(drawn.items()):
        ends = "; ".join(f"{line.label} ends at {number(line.y[-1], 3)}" for line in lines)
        where = f", {palette.label(panel_value)}" if panel_value else ""
        alt = f"{spec.title}{where}: {axis} against {spec.x.replace('_', ' ')}. {ends}."
        svg = figures.curves(f"{name}-{i}", alt, lines, spec.x.replace("_", " "), axis, (lowest - room, highest + room))
        parts.append({"label": palette.label(panel_value), "figure": svg})
    values = list(dict.fromkeys(v for lines in panels.values() for v in lines))
    caption = f"Lines are means over {spec.over}; the bands reach from the lowest to the highest. " if spec.over else ""
    caption += "All panels share one scale. " if len(parts) > 1 else ""
    caption += "The first steps lie outside the picture, so that the end can be told apart. " if clipped else ""
    return {
        "title": spec.title,
        "panels": parts,
        "legend": palette.legend(first, values) if first else [],
        "caption": caption.strip(),
    }


def _range(lines: Sequence[figures.Line], whole: bool = False) -> tuple[float, float, bool]:
    """Returns the range of y to draw, and whether it leaves something out: the steep start would flatten the rest."""
    start, end = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    late = start if whole else start + 0.2 * (end - start)
    shown = [(low, high) for line in lines for x, low, high in zip(line.x, line.low, line.high) if x >= late]
    every = [(low, high) for line in lines for low, high in zip(line.low, line.high)]
    shown = shown or every
    lowest, highest = min(low for low, _ in shown), max(high for _, high in shown)
    return lowest, highest, min(low for low, _ in every) < lowest or max(high for _, high in every) > highest


def _points(step: Step, spec: Curves) -> list[tuple[float, float]]:
    path = step.find(spec.file)
    found: dict[float, float] = {}
    for row in read_rows(path) if path else ():
        x, y = row.get(spec.x), row.get(spec.y)
        if isinstance(x, (int, float)) and isinstance(y, (int, float)) and abs(y) < float("inf"):
            found[float(x)] = float(y)
    return sorted(found.items())


def _line(value: str, runs: Sequence[list[tuple[float, float]]], dimension: str, palette: Palette) -> figures.Line:
    """Averages repetitions where all of them have been: a run that stopped early ends the line."""
    import numpy as np

    start, end = max(r[0][0] for r in runs), min(r[-1][0] for r in runs)
    grid = np.array([x for x, _ in runs[0] if start <= x <= end] or [start])
    if len(grid) > _CURVE_POINTS:
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, _CURVE_POINTS).round().astype(int))]
    stack = np.stack([np.interp(grid, [x for x, _ in r], [y for _, y in r]) for r in runs])
    return figures.Line(
        palette.label(value),
        grid.tolist(),
        stack.mean(0).tolist(),
        stack.min(0).tolist(),
        stack.max(0).tolist(),
        palette.series(dimension, value) if dimension else 0,
    )


def selection(run: Run, spec: Selections, palette: Palette) -> dict[str, Any]:
    """Returns composition, a table of facts, histograms and documents of each selection method.

    Raises:
        UserError: No step of that name has finished.
    """
    choices = gather(run, spec)
    if not choices:
        raise UserError(f"No step '{spec.step}' has finished, so there is no selection to show yet.")
    names = list(dict.fromkeys(g for c in choices for g in (*c.shares, *c.pool_shares, *c.scores)))
    if spec.target in names:
        names.remove(spec.target)
        names.insert(0, spec.target)
    for group in names:
        palette.series("\0group", group)
    shown = [(palette.label(c.row), c.shares) for c in choices if c.shares]
    pool = next((c.pool_shares for c in choices if c.pool_shares), None)
    shown += [("(the whole pool)", pool)] if shown and pool else []
    composition = None
    if shown:
        parts = [(palette.series("\0group", g), [shares.get(g, 0.0) for _, shares in shown]) for g in names]
        said = [
            f"{row}: " + ", ".join(f"{palette.label(g)} {n:.0f}%" for g, n in shares.items()) for row, shares in shown
        ]
        composition = figures.stacked(
            "composition",
            f"Share of each {spec.group} among the chosen documents. {'; '.join(said)}.",
            [row for row, _ in shown],
            parts,
            "share of the documents (%)",
        )
    return {
        "composition": composition,
        "legend": palette.legend("\0group", names),
        "group": spec.group,
        "target": palette.label(spec.target) if spec.target else "",
        "facts": _facts(choices, palette),
        "histograms": [
            {"label": palette.label(c.row), "figure": _histogram(i, c, names, palette)}
            for i, c in enumerate(choices)
            if len({x for scores in c.scores.values() for x in scores}) > 1
        ],
        "methods": [{"label": palette.label(c.row), "top": c.top, "last": c.last} for c in choices if c.top],
        "label": palette.label,
    }


def _facts(choices: Sequence[Choice], palette: Palette) -> dict[str, Any]:
    kept = [(name, digits) for name, _, digits in FACTS if any(name in c.facts for c in choices)]
    rows = [
        {"label": palette.label(c.row), "cells": [_fact(c.facts.get(name), digits) for name, digits in kept]}
        for c in choices
    ]
    return {"columns": [name for name, _ in kept], "rows": rows}


def _fact(sample: Sample | None, digits: int) -> str:
    if sample is None:
        return "–"
    # "300 ± 0" says no more than "300".
    return mean_and_spread(sample, digits) if sample.sd and round(sample.sd, digits) else number(sample.mean, digits)


def _histogram(i: int, choice: Choice, names: Sequence[str], palette: Palette) -> str:
    scores = {palette.series("\0group", g): choice.scores[g] for g in names if choice.scores.get(g)}
    said = [
        f"{palette.label(g)} {len(values)} documents from {min(values):.3g} to {max(values):.3g}"
        for g in names
        if (values := choice.scores.get(g))
    ]
    alt = f"Scores of what {palette.label(choice.row)} chose: {', '.join(said)}"
    return figures.histogram(f"scores-{i}", alt + ".", scores, "score")


def samples(run: Run, spec: Samples, palette: Palette) -> list[dict[str, Any]]:
    """Returns generated rows: where they come from, prompt and continuation.

    Raises:
        UserError: No step of that name has finished.
    """
    steps = run.named(spec.step)
    if not steps:
        raise UserError(f"No step '{spec.step}' has finished, so there is no generated text yet.")
    found: list[dict[str, Any]] = []
    for step in steps:
        for path in sorted(step.folder.rglob("*.jsonl")) if step.folder.is_dir() else []:
            for row in read_rows(path, spec.limit):
                text = row.get(spec.text)
                if isinstance(text, str):
                    where = ", ".join(palette.label(str(v)) for v in step.at.values())
                    found.append({"where": where, "prompt": str(row.get(spec.prompt, "")), "text": text})
    return found[: spec.limit]


def plain_tables(run: Run) -> list[dict[str, Any]]:
    """Returns every step's dimensions and plain results: what a report without instructions shows."""
    tables = []
    for name in dict.fromkeys(s.name for s in run.steps):
        steps = run.named(name)
        dimensions = list(dict.fromkeys(d for s in steps for d in s.at))
        keys = list(dict.fromkeys(k for s in steps for k, v in s.result.items() if _is_plain(v)))
        rows = [
            [str(s.at.get(d, "–")) for d in dimensions] + [_plain(s.result.get(k)) for k in keys]
            for s in steps[:_PLAIN_ROWS]
        ]
        tables.append(
            {
                "title": name,
                "verb": steps[0].verb,
                "dimensions": dimensions,
                "names": [k.replace("_", " ") for k in keys],
                "rows": rows,
                "more": max(0, len(steps) - _PLAIN_ROWS),
            }
        )
    return tables


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        if value != value or abs(value) == float("inf"):
            return "–"
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}".replace("-", "−")
    return "–" if value is None else str(value)


def making(run: Run) -> dict[str, Any]:
    """Returns recipe, time per step, versions and machine."""
    names = list(dict.fromkeys(s.name for s in run.steps))
    spent = [sum(s.seconds for s in run.once(run.named(n))) for n in names]
    notes = []
    for name, seconds in zip(names, spent):
        steps = run.once(run.named(name))
        cached = sum(s.cached for s in steps)
        note = minutes(seconds) + (f" in {len(steps)} runs" if len(steps) > 1 else "")
        kept = "" if cached == len(steps) else f"{cached} of them "
        notes.append(note + (f", {kept}kept from before" if cached else ""))
    times = ""
    if names:
        said = "; ".join(f"{n} {t}" for n, t in zip(names, notes))
        times = figures.bars(
            "times", f"Seconds spent per step: {said}.", names, spent, notes, "seconds, all runs of a step"
        )
    raw = run.raw
    recipe = raw.get("recipe_text") or json.dumps(raw.get("recipe") or {}, indent=2, ensure_ascii=False)
    return {
        "recipe": _without_paths(str(recipe)),
        "times": times,
        "versions": {str(k): str(v) for k, v in (raw.get("versions") or {}).items()},
        "machine": {_MACHINE.get(str(k), str(k)): str(v) for k, v in (raw.get("machine") or {}).items()},
        "started": str(raw.get("started") or "").replace("T", " ").replace("+00:00", " UTC"),
        "took": _took(run),
        "overrides": ", ".join(str(o) for o in raw.get("overrides") or []),
        "seeds": ", ".join(_seeds(run)),
    }


def _took(run: Run) -> str:
    seconds, kept = run.raw.get("seconds"), sum(s.cached for s in run.steps)
    if not isinstance(seconds, (int, float)):
        return ""
    return minutes(seconds) + (f", with {kept} of {len(run.steps)} steps kept from before" if kept else "")


def _seeds(run: Run) -> list[str]:
    found = [str(s.at["seed"]) for s in run.steps if "seed" in s.at]
    found = found or [str(s.options["seed"]) for s in run.steps if "seed" in s.options]
    return list(dict.fromkeys(found))


def _without_paths(text: str) -> str:
    # A report is made to be passed on: the reader's home folder is nobody's business.
    return re.sub(re.escape(str(Path.home())) + r"(?=[/\\]|\b)", "~", text) if str(Path.home()) != "/" else text
