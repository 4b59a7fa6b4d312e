"""Pages about loss by token frequency, from result JSON: one model's, and a sweep's over weight decays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.report import figures
from modelwright.report.render import _environment, _write

_SPLITS = {"train": "Training text", "heldout": "Held-out text"}
_NOISE = (
    "A bin's loss is the mean over its types, each of which counts once. Types that were seen once or twice are noisy: "
    "look at the number of types, and never at a single one."
)


def render_audit(result: Mapping[str, Any], output: Path, *, title: str, force: bool = True) -> Path:
    """Writes the page of one model's losses.

    Args:
        result: As `modelwright probe token-loss` writes it.
        output: The HTML file.
        title: Heading.
        force: Replace an existing file.
    """
    bins = result["bins"]
    rows = [
        {
            "label": row["label"],
            "cells": [
                f"{row['types']:,}", f"{100 * row['share']:.1f}%", _number(row["loss"]),
                "–" if row["low"] is None else f"{_number(row['low'])} to {_number(row['high'])}",
                _percent(row["accuracy"]),
            ],
        }
        for row in bins
    ]  # fmt: skip
    columns = ["types", "share of occurrences", "loss (nats)", "95% interval", "accuracy"]
    series = [("this model", [(r["label"], r["loss"], r["low"], r["high"]) for r in bins])]
    against = result.get("against")
    answers = [
        f"The average loss is {_number(result['average'])} nats; averaged over token types it is "
        f"{_number(result['balanced'])}, {_times(result['balanced'], result['average'])} of it."
    ]
    if result["gap"] is not None:
        side = "above" if result["gap"] >= 0 else "below"
        size = _number(abs(result["gap"]))
        answers.append(f"The rarest bin's loss is {size} nats {side} that of the most frequent one.")
    if against is not None:
        series.append(("compared with", [(r["label"], r["reference"], None, None) for r in against["bins"]]))
        answers.append(
            f"Against the model it is compared with, the average changes by {_signed(against['delta_average'])} nats "
            f"and the token-balanced loss by {_signed(against['delta_balanced'])}."
        )
    sections = [
        {
            "heading": "Loss by training frequency", "text": _NOISE, "note": "",
            "legend": [{"label": name, "series": i} for i, (name, _) in enumerate(series)],
            "figures": [{"heading": "Loss by bin", "svg": _by_bin("bins", "Loss by frequency bin", series, "nats")}],
            "tables": [{"caption": "Bins of training counts", "corner": "count", "columns": columns, "rows": rows}],
        }
    ]  # fmt: skip
    if speeds := result.get("learning_speed"):
        speed_series = [(m, [(k, v, None, None) for k, v in speeds[m]["bins"].items()]) for m in speeds]
        sections.append(
            {
                "heading": "Learning speed", "note": "", "tables": [],
                "text": "One minus the area under each type's loss curve; larger is faster. A first checkpoint that is "
                "not of the untrained model hides differences.",
                "legend": [{"label": name, "series": i} for i, (name, _) in enumerate(speed_series)],
                "figures": [
                    {"heading": "Speed by bin", "svg": _by_bin("speed", "Learning speed by bin", speed_series, "speed")}
                ],
            }
        )  # fmt: skip
    page = {
        "title": title,
        "question": "Is the average hiding what happens to rare tokens?",
        "answers": answers,
        "sections": sections,
        "settings": _settings({k: result[k] for k in ("model", "tokens", "types", "unseen_types", "software")}),
    }
    return _write(_environment().get_template("token_loss.html").render(page=page), Path(output), force)


def render_sweep(result: Mapping[str, Any], output: Path, *, force: bool = True) -> Path:
    """Writes the page of a sweep over weight decays: training and held-out text, always both.

    Args:
        result: As `modelwright sweep weight-decay` writes it.
        output: The HTML file.
        force: Replace an existing file.
    """
    rows = [row for row in result["rows"] if "train" in row]
    series = {row["lambda"]: i for i, row in enumerate(rows)}
    legend = [{"label": f"λ = {value:g}", "series": i} for value, i in series.items()]
    sections: list[dict[str, Any]] = []
    for split, name in _SPLITS.items():
        bins = [(f"{r['lambda']:g}", [_bar(b) for b in r[split]["bins"]]) for r in rows]
        speeds = [
            (f"{r['lambda']:g}", [(k, v, None, None) for k, v in r[split]["speed_auc"]["bins"].items()]) for r in rows
        ]
        panels = [
            ("Loss by training frequency", _by_bin(f"{split}-bins", f"{name}: loss by bin", bins, "nats")),
            ("Learning speed by training frequency", _by_bin(f"{split}-speed", f"{name}: speed", speeds, "speed")),
        ]
        sections.append(
            {
                "heading": name, "text": _NOISE if split == "train" else "", "legend": legend, "note": "",
                "figures": [{"heading": heading, "svg": svg} for heading, svg in panels],
                "tables": [_losses(rows, split), _bin_table(rows, split)],
            }
        )  # fmt: skip
        panels = [("Average and token-balanced loss", _against_lambda(f"{split}-lambda", name, rows, split))]
        panels.append(("Loss of each bin", _bins_against_lambda(f"{split}-bin-lambda", name, rows, split)))
        labels = list(dict.fromkeys(b["label"] for r in rows for b in r[split]["bins"]))
        sections.append(
            {
                "heading": f"{name}: what λ does", "text": "", "tables": [], "note": "",
                "legend": [
                    {"label": "average", "series": 0}, {"label": "token-balanced", "series": 1},
                    *({"label": f"bin {label}", "series": 2 + i} for i, label in enumerate(labels)),
                ],
                "figures": [{"heading": heading, "svg": svg} for heading, svg in panels],
            }
        )  # fmt: skip
    sections.append(_equal_loss(result, rows, series, legend))
    sections.append(_decayed(result, rows))
    page = {
        "title": "Weight decay and rare tokens",
        "question": "Whom does the regulariser hurt, on the text that was trained on and on text that was not?",
        "answers": result["answers"],
        "sections": sections,
        "settings": _settings({k: result[k] for k in ("settings", "machine", "software")}),
    }
    return _write(_environment().get_template("token_loss.html").render(page=page), Path(output), force)


def _bar(one: Mapping[str, Any]) -> tuple[str, float, float | None, float | None]:
    sd = one["loss_sd"]
    return one["label"], one["loss"], None if sd is None else one["loss"] - sd, None if sd is None else one["loss"] + sd


def _losses(rows: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    columns = [
        "average", "token-balanced", "change of average", "change of balanced", "accuracy", "balanced accuracy",
        "slope", "gap", "speed gap",
    ]  # fmt: skip
    table = []
    for row in rows:
        one = row[split]
        table.append(
            {
                "label": f"{row['lambda']:g}",
                "cells": [
                    _spread(one, "average"), _spread(one, "balanced"), _signed(one["delta"]["average"]),
                    _signed(one["delta"]["balanced"]), _percent(one["accuracy"]), _percent(one["balanced_accuracy"]),
                    _signed(one["slope"]), _signed(one["gap"]), _signed(one["speed_auc"]["gap"]),
                ],
            }
        )  # fmt: skip
    caption = (
        "Last checkpoint: loss in nats, mean and standard deviation over seeds; slope of a type's loss on ln(count)"
    )
    return {"caption": caption, "corner": "λ", "columns": columns, "rows": table}


def _bin_table(rows: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    labels = list(dict.fromkeys(b["label"] for r in rows for b in r[split]["bins"]))
    of = [{b["label"]: b for b in r[split]["bins"]} for r in rows]
    table = []
    for label in labels:
        present = next(bins[label] for bins in of if label in bins)
        cells = [f"{present['types']:,}", _percent(present["share"])]
        cells += [_number(bins[label]["loss"]) if label in bins else "–" for bins in of]
        table.append({"label": label, "cells": cells})
    columns = ["types", "share of occurrences", *(f"λ = {r['lambda']:g}" for r in rows)]
    return {"caption": "Loss by training count, nats", "corner": "count", "columns": columns, "rows": table}


def _equal_loss(
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    series: Mapping[float, int],
    legend: list[dict[str, Any]],
) -> dict[str, Any]:
    runs = [run for run in result["runs"] if "diverged" not in run]
    seed = runs[0]["seed"]
    found = []
    for split, name in _SPLITS.items():
        lines = []
        for run in (r for r in runs if r["seed"] == seed):
            points = sorted((p["train"]["average"], p[split]["balanced"]) for p in run["curve"])
            x, y = [a for a, _ in points], [b for _, b in points]
            lines.append(figures.Line(f"{run['lambda']:g}", x, y, y, y, series[run["lambda"]]))
        alt = f"{name}: token-balanced loss against the average training loss"
        svg = figures.curves(f"equal-{split}", alt, lines, "average training loss (nats)", "balanced (nats)", None)
        found.append({"heading": f"{name}, seed {seed}", "svg": svg})
    names = [
        "step",
        "train_average",
        "train_balanced",
        "train_gap",
        "heldout_average",
        "heldout_balanced",
        "heldout_gap",
    ]
    table = [
        {
            "label": f"{row['lambda']:g}",
            "cells": [
                "–" if (v := (row["equal_loss"] or {}).get(n)) is None else (f"{v:,.0f}" if n == "step" else _number(v))
                for n in names
            ],
        }
        for row in rows
    ]
    caption = "Where each run first reached the lowest average training loss that all runs of its seed reach"
    return {
        "heading": "At equal training loss",
        "text": "After equal steps a run that learns more slowly has rare types that are only not learnt yet. Here "
        "runs are compared where their average training loss is the same.",
        "legend": legend,
        "figures": found,
        "tables": [{"caption": caption, "corner": "λ", "columns": [n.replace("_", " ") for n in names], "rows": table}],
        "note": "Between two checkpoints values are interpolated; a first checkpoint that is far from the second makes "
        "that coarse.",
    }


def _decayed(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    amounts = [
        {
            "label": f"{row['lambda']:g}",
            "cells": [
                f"{row['sum_lr_lambda']:.4g}", _percent(row["left_of_an_idle_weight"]), str(row["seeds"]),
                str(row["diverged"]),
            ],
        }
        for row in rows
    ]  # fmt: skip
    last = next(run for run in reversed(result["runs"]) if "diverged" not in run)
    parts = [
        {
            "label": part["part"] if part["part"] != "rest" else "norms, biases, other vectors",
            "cells": [f"{part['tensors']:,}", f"{part['parameters']:,}", "yes" if part["weight_decay"] else "no"],
        }
        for part in last["parts"]
    ]
    return {
        "heading": "How much decays, and what",
        "text": "AdamW shrinks weights by learning rate times λ in each step, so λ says nothing without the learning "
        "rates: compare the sums.",
        "legend": [],
        "figures": [],
        "tables": [
            {
                "caption": "Decay over a whole run", "corner": "λ", "rows": amounts,
                "columns": ["sum of lr × λ", "left of a weight without gradient", "runs", "diverged"],
            },
            {
                "caption": f"Parts of the model, in the run with λ = {last['lambda']:g}", "corner": "part",
                "rows": parts,
                "columns": ["tensors", "parameters", "decayed"],
            },
        ],
        "note": "",
    }  # fmt: skip


def _by_bin(
    name: str, alt: str, series: Sequence[tuple[str, Sequence[tuple[str, float, float | None, float | None]]]], y: str
) -> str:
    """Points of each bin joined by a line, with their range; bins by name along the axis."""
    labels = sorted(
        {label for _, points in series for label, *_ in points},
        key=lambda label: 0 if label == "0" else int(label[1:].split(",")[0]),
    )
    lines = []
    for i, (label, points) in enumerate(series):
        x, values = [labels.index(p[0]) for p in points], [p[1] for p in points]
        low = [p[1] if p[2] is None else p[2] for p in points]
        high = [p[1] if p[3] is None else p[3] for p in points]
        lines.append(figures.Line(label, x, values, low, high, i))

    def paint(axes: Any) -> None:
        for line in lines:
            colour = figures.colour(line.series)
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(line.x, line.y, color=colour, marker=figures._MARKERS[line.series % 8], markersize=4.5)
        axes.set_xticks(range(len(labels)), [label.replace("[", "").split(",")[0] + "+" for label in labels])
        axes.set_xlabel("training count")
        axes.set_ylabel(y)
        axes.set_ylim(0, 1.06 * axes.dataLim.y1 or 1)  # room for the marks of a flat line

    return figures.draw(name, alt, (430, 300), paint)


def _against_lambda(name: str, alt: str, rows: Sequence[Mapping[str, Any]], split: str) -> str:
    return _lines_against_lambda(
        name,
        f"{alt}: average and token-balanced loss against lambda",
        rows,
        [[(row[split][metric], row[split][f"{metric}_sd"]) for row in rows] for metric in ("average", "balanced")],
        0,
    )


def _bins_against_lambda(name: str, alt: str, rows: Sequence[Mapping[str, Any]], split: str) -> str:
    labels = list(dict.fromkeys(b["label"] for r in rows for b in r[split]["bins"]))
    of = [{b["label"]: (b["loss"], b["loss_sd"]) for b in r[split]["bins"]} for r in rows]
    lines = [[bins.get(label, (None, None)) for bins in of] for label in labels]
    return _lines_against_lambda(name, f"{alt}: loss of each bin against lambda", rows, lines, 2)


def _lines_against_lambda(
    name: str, alt: str, rows: Sequence[Mapping[str, Any]], lines: Sequence[Sequence[tuple[Any, Any]]], first: int
) -> str:
    drawn = []
    for i, points in enumerate(lines):
        at = [(row["lambda"], value, sd or 0.0) for row, (value, sd) in zip(rows, points) if value is not None]
        x, y = [a for a, _, _ in at], [b for _, b, _ in at]
        drawn.append(figures.Line("", x, y, [b - c for _, b, c in at], [b + c for _, b, c in at], first + i))
    return figures.curves(name, alt, drawn, "λ", "nats", None)


def _settings(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name, value in parts.items():
        if isinstance(value, Mapping):
            found += [(key, str(inner)) for key, inner in value.items()]
        else:
            found.append((name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)))
    return found


def _spread(one: Mapping[str, Any], name: str) -> str:
    sd = one[f"{name}_sd"]
    return _number(one[name]) + ("" if sd is None else f" ± {sd:.3f}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}%"


def _times(value: float, base: float) -> str:
    return f"{value / base:.2f} times" if base else "more"
