"""The page of a stream of tasks, from result JSON: what was learnt, what was forgotten, which tasks share rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.report import figures
from modelwright.report.render import _environment, _write


def render_continual(result: Mapping[str, Any], output: Path, *, title: str, force: bool = True) -> Path:
    """Writes the page.

    Args:
        result: As `modelwright train continual` writes it to ``continual.json``.
        output: The HTML file.
        title: Heading.
        force: Replace an existing file.
    """
    tasks, rows = result["matrix"]["tasks"], result["matrix"]["rows"]
    last = rows[-1]
    best = [max(row[t] for row in rows) for t in range(len(tasks))]
    table = [
        {
            "label": name,
            "cells": [
                *(_percent(v) for v in (rows[t][t], best[t], last[t])), f"{100 * (last[t] - best[t]):+.1f}",
                str(result["steps_by_task"][t]), f"{result['seconds_by_task'][t]:.1f}",
            ],
        }
        for t, name in enumerate(tasks)
    ]  # fmt: skip
    overlap = result["overlap"]
    page = {
        "title": title,
        "headline": _headline(result, tasks, best, last),
        "tiles": [
            (_percent(result["accuracy"]), "ACC: mean accuracy after the last task"),
            (_percent(result["learning_accuracy"]), "learning accuracy: mean right after each task"),
            (_percent(result["forgetting"]), "forgetting: mean loss from the best ever"),
            (f"{100 * result['backward_transfer']:+.1f}", "backward transfer, in points"),
        ],
        "accuracy": heat_map("accuracy", "Accuracy on each task after each task", tasks, tasks, rows, "on", "after"),
        "overlap": heat_map("overlap", "Shared rows of two tasks", tasks, tasks, overlap["mean"], "are in", "rows of"),
        "samples": overlap["samples"],
        "table": table,
        "settings": _settings(result),
    }
    return _write(_environment().get_template("continual.html").render(page=page), Path(output), force)


def _headline(result: Mapping[str, Any], tasks: Sequence[str], best: Sequence[float], last: Sequence[float]) -> str:
    lost = [b - e for b, e in zip(best, last, strict=True)]
    worst = max(range(len(tasks)), key=lambda t: lost[t])
    said = f"After {len(tasks)} tasks the model answers {_percent(result['accuracy'])} of all tests right"
    if not any(best):
        return f"{said}: it learned none of them, so there was nothing to forget."
    if lost[worst] <= 0:
        return f"{said}, and no task was forgotten."
    return (
        f"{said}; {tasks[worst]} was forgotten most, from {_percent(best[worst])} at its best to "
        f"{_percent(last[worst])}."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for group in ("model", "with", "settings", "software", "machine"):
        for key, value in (result.get(group) or {}).items():
            found.append((f"{group}: {key}", str(value)))
    return found


def heat_map(
    name: str, alt: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], x: str, y: str
) -> str:
    """Returns a matrix of shares as SVG: the darker, the nearer to 1; each with its number."""
    size = _size(rows, columns)
    return figures.draw(name, alt, size, _painter(rows, columns, values, x, y, figures.colour(0), None))


def write_heat_map(
    path: Path,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    x: str,
    y: str,
) -> None:
    """Writes a matrix of shares as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _size(rows, columns)
    figure = Figure(figsize=(width / 96, (height + 30) / 96), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _painter(rows, columns, values, x, y, "#0072b2", "#1c2430")(axes)
    axes.set_title(figures.printable(title))
    figure.savefig(path, format="png", dpi=192)


def _size(rows: Sequence[str], columns: Sequence[str]) -> tuple[float, float]:
    return 190 + 62 * len(columns), 120 + 36 * len(rows)


def _painter(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    x: str,
    y: str,
    colour: str,
    ink: str | None,
) -> Callable[[Any], None]:
    def paint(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        for i, row in enumerate(values):
            for j, value in enumerate(row):
                strength = min(max(float(value), 0.0), 1.0)
                axes.add_patch(
                    Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, facecolor=colour, alpha=0.05 + 0.6 * strength)
                )
                text: dict[str, Any] = {} if ink is None else {"color": ink}
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", size=9, **text)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), figures._ticks(columns), rotation=35, ha="right")
        axes.set_yticks(range(len(rows)), figures._ticks(rows))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)

    return paint
