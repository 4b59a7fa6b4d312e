"""The page of a continued pre-training: what fell, when it came back, and which way of continuing cost least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.report import figures
from modelwright.report.render import _environment, _write


def render_gap(result: Mapping[str, Any], output: Path, *, title: str, force: bool = True) -> Path:
    """Writes the page.

    Args:
        result: What :func:`~modelwright.training.stability_gap.run.continue_to_folder` returns.
        output: The HTML file.
        title: Heading.
        force: Replace an existing file.
    """
    # The recipe first, whose numbers the reader came for.
    arms = [result["arms"][-1], *result["arms"][:-1]]
    better = arms[0]["better"]
    page = {
        "title": title,
        "advice": result["advice"],
        "legend": [{"label": f"{a['arm']}: {a['label']}", "series": i} for i, a in enumerate(arms)],
        "figures": [_curve(i, name, direction, arms) for i, (name, direction) in enumerate(better.items())],
        "updates": _updates(arms),
        "tables": [_table(name, direction, arms) for name, direction in better.items()],
        "mixtures": [_mixture(a) for a in arms],
        "domain": _domain(result["domain"]),
        "settings": [
            *((str(k), str(v)) for k, v in result["plan"].items()),
            *((str(k), str(v)) for k, v in result["settings"].items()),
        ],
    }
    return _write(_environment().get_template("stability_gap.html").render(page=page), Path(output), force)


def _curve(number: int, name: str, direction: str, arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    heading = name.replace("_", " ")
    y = "accuracy" if direction == "higher" else "bits per byte"
    lines = [(i, [(row["tokens"], row[name]) for row in a["history"]]) for i, a in enumerate(arms)]
    start = arms[0]["history"][0][name]
    return {"heading": heading, "svg": _draw(f"probe-{number}", heading, lines, y, start)}


def _updates(arms: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    lines = []
    for i, a in enumerate(arms):
        points = [(r["tokens"], r["update_ratio"]) for r in a["history"] if r.get("update_ratio") is not None]
        if points:
            lines.append((i, points))
    if not lines:
        return None
    heading = "Relative update of the lowest layers over that of the highest"
    return {"heading": heading, "svg": _draw("updates", heading, lines, "ratio", 1.0)}


def _draw(name: str, alt: str, lines: Sequence[tuple[int, Sequence[tuple[float, float]]]], y: str, level: float) -> str:
    """Curves over tokens: linear up to the first probe and logarithmic beyond, since the fall is at the beginning."""
    first = min((x for _, points in lines for x, _ in points if x > 0), default=1)

    def paint(axes: Any) -> None:
        axes.axhline(level, color=figures._INK, linewidth=0.8, linestyle=(0, (2, 3)))
        for series, points in lines:
            axes.plot(
                [x for x, _ in points],
                [v for _, v in points],
                color=figures.colour(series),
                linestyle=figures._DASHES[series % len(figures._DASHES)],
                marker=figures._MARKERS[series % len(figures._MARKERS)],
                linewidth=1.8,
                markersize=3.5,
            )
        axes.set_xscale("symlog", linthresh=first, linscale=0.3)
        axes.set_xlim(left=0)
        # Below the first probe the scale is linear and short: a power of ten there would stand on the 0.
        axes.set_xticks([t for t in axes.get_xticks() if t == 0 or first <= t <= axes.get_xlim()[1]])
        axes.xaxis.set_major_formatter(figures._thousands())
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(y)

    return figures.draw(name, alt, (430, 300), paint)


def _table(name: str, direction: str, arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for a in arms:
        n = a["report"][name]
        back = "never" if n["tokens_to_recover"] is None else _count(n["tokens_to_recover"])
        cells = [
            _count(a["tokens"]),
            f"{n['start']:.3f}",
            f"{n['drop']:.3f}",
            back if n["drop"] > 0 else "–",
            f"{n['area'] / max(1, a['tokens']):.4f}",
            f"{n['peak']:.3f}",
            _count(n["tokens_to_peak"]),
            f"{n['end']:.3f}",
        ]
        rows.append({"label": a["arm"], "cells": cells})
    how = "higher is better" if direction == "higher" else "lower is better"
    columns = ["tokens", "before", "drop", "tokens to recover", "mean shortfall", "best", "tokens to best", "end"]
    return {"caption": f"{name.replace('_', ' ')} ({how})", "columns": columns, "rows": rows}


def _mixture(arm: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "label": name,
            "cells": [
                f"{100 * m['share']:.1f}%",
                _count(m["tokens"]),
                _count(m["available"]),
                f"{m['passes']:.2f}",
            ],
        }
        for name, m in arm["mixture"].items()
    ]
    return {
        "caption": f"{arm['arm']} ({arm['epochs']} {'epoch' if arm['epochs'] == 1 else 'epochs'}, "
        f"peak rate {arm['learning_rate']:g})",
        "columns": ["share", "tokens an epoch", "tokens there are", "times seen"],
        "rows": rows,
    }


def _domain(counts: Mapping[str, Any]) -> list[str]:
    subset = counts["subset"]
    found = [
        f"{counts['documents']:,} documents of the domain; {counts['contaminated']:,} more share text with a probe and "
        f"are in no arm.",
        f"The subset has {subset['documents']:,} documents with {subset['tokens']:,} tokens; {subset['unscored']:,} "
        f"were too short or blank to be ranked.",
    ]
    lengths = subset["bytes_per_document"]
    found.append(
        f"A document of the subset has {lengths['chosen']:,.0f} bytes on average, one of the domain "
        f"{lengths['pool']:,.0f}."
    )
    return found


def _count(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"
