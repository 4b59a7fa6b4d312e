"""A claim's result as rows of text, which the terminal, the Markdown pages and the HTML report lay out alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelwright.verify.statistics import Sample, mean_and_spread, number


@dataclass(frozen=True)
class Row:
    """One variant under one metric.

    Attributes:
        label: The variant's label.
        value: Mean and spread.
        ratio: The method's value over this variant's, paired by seed; empty for the method itself.
        gain: How much better the method is, in the metric's unit; empty for the method itself.
        is_method: Whether this is the method.
        best: Whether no other variant has a better mean.
    """

    label: str
    value: str
    ratio: str
    gain: str
    is_method: bool
    best: bool


@dataclass(frozen=True)
class MetricTable:
    """All variants under one metric."""

    heading: str
    rows: list[Row]


@dataclass(frozen=True)
class BarRow:
    """One bar: what must be seen, what was seen, and whether that is enough."""

    statement: str
    seen: str
    needed: str
    met: str


def heading(metric: Mapping[str, Any]) -> str:
    """Returns a column heading such as ``Held-out text (bits per byte, lower is better)``."""
    notes = [n for n in (metric["unit"], f"{metric['better']} is better" if metric["better"] else "") if n]
    return metric["name"] + (f" ({', '.join(notes)})" if notes else "")


def cell(entry: Mapping[str, Any] | None, digits: int) -> str:
    """Writes a summary entry: mean, spread, and how many seeds have no finite value: diverged, or never got there."""
    if entry is None:
        return "–"
    text = "–" if entry["mean"] is None else mean_and_spread(Sample(entry["mean"], entry["sd"], entry["n"]), digits)
    if entry["diverged"]:
        text += f" (no finite value on {entry['diverged']} of {entry['diverged'] + entry['n']} seeds)"
    return text


def metric_tables(document: Mapping[str, Any]) -> list[MetricTable]:
    """Returns one table per metric, in the claim's order; variants that were not measured are left out."""
    tables = []
    method = next(iter(document["variants"]))
    for key, metric in document["metrics"].items():
        entries = {v: document["summary"][v].get(key) for v in document["variants"]}
        means = [e["mean"] for e in entries.values() if e and e["mean"] is not None]
        best = None
        if metric["better"] and means:
            best = min(means) if metric["better"] == "lower" else max(means)
        rows = [
            Row(
                label=document["variants"][variant],
                value=cell(entry, metric["digits"]),
                ratio=_spread(entry.get("ratio"), 3),
                gain=_spread(entry.get("gain"), metric["digits"], sign=True),
                is_method=variant == method,
                best=best is not None and entry["mean"] == best,
            )
            for variant, entry in entries.items()
            if entry is not None
        ]
        if rows:
            tables.append(MetricTable(heading(metric), rows))
    return tables


def bar_rows(document: Mapping[str, Any]) -> list[BarRow]:
    """Returns the bars with what was seen."""
    rows = []
    for bar in document["bars"]:
        digits = max(document["metrics"][bar["metric"]]["digits"], 3)
        bound, margin = bar["lower_bound"], bar["margin"]
        # Rounding must not show a bound on the wrong side of what is needed.
        while bound is not None and digits < 9 and (round(bound, digits) >= round(margin, digits)) != (bound >= margin):
            digits += 1
        seen = "not measured"
        if bar["gain"] is not None:
            seen = _spread({"mean": bar["gain"], "sd": bar["sd"]}, digits, sign=True)
            if bound is not None:
                seen += f", lower bound {number(bound, digits, sign=True)}"
        if bar["missing_seeds"]:
            seeds = bar["missing_seeds"] + len(bar["gains"])
            seen += f"; no finite value on {bar['missing_seeds']} of {seeds} seeds"
        met = {True: "met", False: "not met", None: "–"}[bar["met"]]
        rows.append(BarRow(bar["statement"], seen, f"at least {number(margin, digits, sign=True)}", met))
    return rows


def how(document: Mapping[str, Any]) -> str:
    """Returns one line on scale, seeds, time, machine and date."""
    machine, n = document["machine"], len(document["seeds"])
    hardware = machine.get("accelerator") or f"{machine.get('processor') or 'unknown processor'}"
    spent = minutes(document["seconds"])
    return (
        f"Scale {document['scale']}, {n} seed{'s' if n != 1 else ''}, {spent} with {document['workers']} "
        f"worker{'s' if document['workers'] != 1 else ''} ({minutes(document['cpu_seconds'])} of processor time) on "
        f"{hardware}, {machine.get('cores', '?')} cores, {document['date']}."
    )


def minutes(seconds: float) -> str:
    """Writes a duration: ``48 s``, ``3 min 5 s``, ``1 h 12 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _spread(entry: Mapping[str, Any] | None, digits: int, sign: bool = False) -> str:
    if entry is None:
        return ""
    spread = "" if entry["sd"] is None else f" ± {number(entry['sd'], digits)}"
    return number(entry["mean"], digits, sign) + spread
