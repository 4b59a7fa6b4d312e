"""Pages about edits, from result JSON: the five dimensions of single edits, and the curves of many in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.report import figures
from modelwright.report.render import _environment, _write

_DIMENSIONS = ("efficacy", "generalisation", "portability", "locality", "robustness")
_PARTS = {
    "rephrase": "other words", "yes": "yes", "no": "no", "multiple_choice": "choices", "reversed": "reversed",
    **{f"{n}hop": f"{n} hops" for n in range(2, 7)},
}  # fmt: skip
_METRICS = {"generation": "by generation", "likelihood": "by likelihood"}


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def render_single(
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    output: Path,
    *,
    title: str,
    force: bool = True,
    examples: int = 3,
) -> Path:
    """Writes the page of a run of single edits.

    Args:
        result: ``advice``, ``scores`` and ``settings``, as `modelwright evaluate hallueditbench` writes them.
        rows: The rows of answers, for the examples.
        output: The HTML file.
        title: Heading.
        force: Replace an existing file.
        examples: Items to show.
    """
    scores = result["scores"]
    present = [name for name in _DIMENSIONS if any(s[name] is not None for s in scores)]
    best = {}
    for name in present:
        values = [s[name] for s in scores if s[name] is not None]
        best[name] = max(values) if len(set(values)) > 1 else None  # where all are alike none is the best
    table = [
        {
            "label": s["method"],
            "cells": [{"text": _share(s[n]), "best": s[n] is not None and s[n] == best[n]} for n in present],
            "seconds": "–" if s["seconds"] is None else f"{s['seconds']:.2f}",
        }
        for s in scores
    ]
    parts = [name for name in _PARTS if any(name in s["parts"] for s in scores)]
    before = scores[0]["before"] if scores else {}
    detail = [{"label": "before the edit", "cells": [_share(before.get(p)) for p in parts]}]
    detail += [{"label": s["method"], "cells": [_share(s["parts"].get(p)) for p in parts]} for s in scores]
    page = {
        "title": title,
        "facts": max((s["items"] for s in scores), default=0),
        "advice": result["advice"],
        "columns": [name.capitalize() for name in present],
        "table": table,
        "parts": [_PARTS[p] for p in parts],
        "detail": detail,
        "turns": _turn_figures(scores),
        "examples": _examples(rows, [s["method"] for s in scores], examples),
        "settings": _settings(result),
    }
    return _write(_environment().get_template("editing_single.html").render(page=page), Path(output), force)


def _turn_figures(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    headings = {"yes": "The right reply is Yes", "no": "The right reply is No", "sure": "Asked whether it is sure: Yes"}
    for name, heading in headings.items():
        shown = [(i, s) for i, s in enumerate(scores) if len(s["turns"].get(name, ())) > 1]
        if not shown:
            continue
        lines = [_line(s["method"], range(len(s["turns"][name])), s["turns"][name], i) for i, s in shown]
        svg = figures.curves(f"turns-{name}", heading, lines, "turn", "keeps the fact", (-0.03, 1.03))
        legend = [{"label": s["method"], "series": i} for i, s in shown]
        found.append({"heading": heading, "svg": svg, "legend": legend})
    return found


def _line(label: str, x: Sequence[float] | range, y: Sequence[float], series: int) -> figures.Line:
    return figures.Line(label=label, x=list(x), y=list(y), low=list(y), high=list(y), series=series)


def _examples(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], n: int) -> list[dict[str, Any]]:
    by_item: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_item.setdefault(row["item"], {})[row["method"]] = row
    shown = []
    for found in list(by_item.values())[:n]:
        first = next(iter(found.values()))
        lines = []
        for at, probe in enumerate(first["probes"]):
            cells = []
            for method in methods:
                one = found.get(method, {}).get("probes", [])
                ok = len(one) > at
                cells.append({"text": one[at]["post"] if ok else "", "right": one[at]["post_right"] if ok else None})
            right = probe["pre"] if probe["label"] is None else probe["label"]
            lines.append({
                "name": probe["name"].replace("_", " "), "question": probe.get("question", ""), "right": right,
                "pre": probe["pre"], "cells": cells,
            })  # fmt: skip
        shown.append({"title": first["probes"][0].get("question", ""), "lines": lines})
    return [{"methods": list(methods), **one} for one in shown]


def _settings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name, value in {**result.get("settings", {}), **result.get("software", {})}.items():
        if isinstance(value, Mapping):
            found += [(f"{name}: {key}", str(inner)) for key, inner in value.items()]
        else:
            found.append((name, str(value)))
    return found


def render_sequence(result: Mapping[str, Any], output: Path, *, title: str, force: bool = True) -> Path:
    """Writes the page of sequences of edits: a figure for each ability and each measure of the model itself.

    Args:
        result: ``advice``, ``stands``, ``stopped`` and ``states`` (method to states).
        output: The HTML file.
        title: Heading.
        force: Replace an existing file.
    """
    runs: Mapping[str, Sequence[Mapping[str, Any]]] = result["states"]
    series = {method: i for i, method in enumerate(runs)}
    panels: dict[str, list[tuple[str, str, Any, tuple[float, float] | None]]] = {"abilities": [], "model": []}
    panels["model"] += [
        (
            "Retention: all facts written so far",
            "share",
            lambda s: (s.get("retention") or {}).get("all"),
            (-0.03, 1.03),
        ),
        ("Retention: the last fact", "share", lambda s: (s.get("retention") or {}).get("last"), (-0.03, 1.03)),
        ("Perplexity of neutral text", "perplexity", lambda s: s.get("perplexity"), None),
        ("Divergence from the base on neutral text", "KL, nats a token", lambda s: s.get("kl"), None),
        ("Largest change of a layer", "||W − W0|| / ||W0||", lambda s: s.get("max_delta_norm"), None),
        ("Largest logit", "|logit|", lambda s: s.get("max_logit"), None),
    ]
    names = list(dict.fromkeys(n for states in runs.values() for s in states for n in _ability_names(s)))
    for name, metric in names:
        heading = f"{name.replace('_', ' ').capitalize()}, {_METRICS.get(metric, metric)}"
        limits = (-0.03, 1.03) if metric in _METRICS else None
        panels["abilities"].append((heading, "share", lambda s, n=name, m=metric: (s.get(n) or {}).get(m), limits))
    figures_of = {
        group: [f for i, p in enumerate(found) if (f := _panel(f"{group}-{i}", p, runs, series)) is not None]
        for group, found in panels.items()
    }
    stands = [
        {"label": m, "cells": [str(result["stands"].get(m, "–")), result.get("stopped", {}).get(m, "–")]}
        for m in result["states"]
    ]
    page = {
        "title": title, "advice": result["advice"], "figures": figures_of, "stands": stands,
        "legend": [{"label": m, "series": i} for m, i in series.items()], "settings": _settings(result),
        "tables": [_state_table(m, states) for m, states in runs.items()],
    }  # fmt: skip
    return _write(_environment().get_template("editing_sequence.html").render(page=page), Path(output), force)


def _ability_names(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, metric)
        for name, value in state.items()
        if isinstance(value, Mapping) and name not in ("retention", "delta_norms")
        for metric in value
        if metric != "chance"
    ]


def _panel(name: str, panel: tuple[Any, ...], runs: Mapping[str, Any], series: Mapping[str, int]) -> Any:
    heading, y, read, limits = panel
    lines, flat = [], []
    for method, states in runs.items():
        points = [(s["n"], float(v)) for s in states if (v := read(s)) is not None]
        if points:
            lines.append(_line(method, [n for n, _ in points], [v for _, v in points], series[method]))
            flat += [v for _, v in points]
    if not lines or not flat:
        return None
    # One model that was ruined must not press all others to the axis.
    powers = limits is None and max(flat) > 100 * max(1.0, flat[0])
    return {"heading": heading, "svg": figures.curves(name, heading, lines, "edits", y, limits, powers=powers)}


def _state_table(method: str, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(n for s in states for n in _ability_names(s)))
    rows = []
    for s in states:
        kept = (s.get("retention") or {}).get("all")
        cells = [_share(kept), *(_share((s.get(n) or {}).get(m)) for n, m in names)]
        cells += [_number(s.get(key)) for key in ("perplexity", "kl", "max_delta_norm")]
        rows.append({"label": str(s["n"]), "cells": [*cells, "yes" if s.get("collapsed") else "no"]})
    columns = [
        "facts kept",
        *(f"{n.replace('_', ' ')}, {m}" for n, m in names),
        "perplexity",
        "KL",
        "change",
        "collapsed",
    ]
    return {"caption": method, "columns": columns, "rows": rows}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
