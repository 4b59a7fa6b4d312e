"""The page of `modelwright prune`: what was taken out of each block, and what that costs and brings."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelwright.report import figures
from modelwright.report.render import _environment, _write

#: Selections as a reader names them.
KINDS = {
    "attn_in": "attention reads", "heads": "key/value heads", "attn_out": "attention writes", "mlp_in": "MLP reads",
    "mlp_middle": "MLP units", "mlp_out": "MLP writes",
}  # fmt: skip
_POINTS = 200


def write_pruning(page: Path, found: Mapping[str, Any], force: bool = False) -> Path:
    """Writes the page from what ``pruning.json`` holds.

    Args:
        page: HTML file to write.
        found: ``method``, ``model``, ``rows`` (the dense model first), ``blocks`` (kind to width of each whole block),
            ``widths`` (kind to width of each block, or None), ``history`` (or None), ``settings``, ``test``,
            ``versions``.
        force: Whether to replace the page.
    """
    rows = found["rows"]
    after = rows[1] if len(rows) > 1 else rows[0]
    html = _environment().get_template("pruning.html").render(
        title=f"{found['method']}: {after['ratio']:.1%} of the blocks' parameters kept",
        model=found["model"],
        tiles=_tiles(rows[0], after),
        columns=[row["name"] for row in rows],
        table_rows=_table(rows),
        widths=_widths(found),
        width_rows=_width_rows(found),
        kinds=list(KINDS.values()),
        history=_history(found.get("history")),
        test=found["test"],
        making=[(str(k).replace("_", " "), str(v)) for k, v in found["settings"].items() if v not in (None, [], "")],
        versions=", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        date=datetime.now(UTC).date().isoformat(),
    )  # fmt: skip
    return _write(html, page, force)


def _tiles(dense: Mapping[str, Any], row: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = [(_big(row["parameters"]), f"parameters in all, of {_big(dense['parameters'])}")]
    if row["perplexity"] and dense["perplexity"]:
        tiles.append((f"{dense['perplexity']:.2f} → {row['perplexity']:.2f}", "perplexity"))
    if row is not dense and "prefill_times" in row:
        tiles.append((f"{row['prefill_times']:.2f} ×", "the dense model's speed when reading"))
        tiles.append((f"{row['decode_times']:.2f} ×", "its speed when writing"))
    return tiles


def _big(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def line(label: str, key: str, write: Any) -> dict[str, Any] | None:
        if not any(isinstance(row.get(key), (int, float)) for row in rows):
            return None
        return {"label": label, "cells": [write(row[key]) if row.get(key) is not None else "–" for row in rows]}

    lines = [
        line("share of the blocks' parameters", "ratio", lambda v: f"{v:.2%}"),
        line("blocks' parameters", "block_parameters", lambda v: f"{v:,}"),
        line("parameters in all", "parameters", lambda v: f"{v:,}"),
        line("weights, MiB", "weight_bytes", lambda v: f"{v / 2**20:,.4g}"),
        line("perplexity, a token", "perplexity", lambda v: f"{v:.3f}"),
        line("bits per byte", "bits_per_byte", lambda v: f"{v:.4f}"),
        line("reading, tokens/s", "prefill_tokens_per_second", lambda v: f"{v:,.0f}"),
        line("reading, times the dense model", "prefill_times", lambda v: f"{v:.2f}"),
        line("writing, tokens/s", "decode_tokens_per_second", lambda v: f"{v:,.1f}"),
        line("writing, times the dense model", "decode_times", lambda v: f"{v:.2f}"),
        line("peak memory of reading, MiB", "peak_bytes", lambda v: f"{v / 2**20:,.1f}"),
    ]
    names = [(t, m) for row in rows for t, own in (row.get("tasks") or {}).items() for m in own]
    for task, metric in dict.fromkeys(names):
        values = [((row.get("tasks") or {}).get(task) or {}).get(metric) for row in rows]
        lines.append({"label": f"{task}, {metric}", "cells": ["–" if v is None else f"{v:.4f}" for v in values]})
    return [one for one in lines if one is not None]


def _widths(found: Mapping[str, Any]) -> str:
    widths, blocks = found.get("widths"), found["blocks"]
    if not widths or len(widths) < 2:
        return ""
    lines, said = [], []
    for series, (kind, label) in enumerate(KINDS.items()):
        shares = [100 * own[kind] / block[kind] for own, block in zip(widths, blocks, strict=True)]
        numbers = list(range(len(shares)))
        lines.append(figures.Line(label, numbers, shares, shares, shares, series))
        said.append(f"{label}: {', '.join(f'{share:.0f}%' for share in shares)}")
    return figures.curves(
        "widths", f"Share kept in each block. {'; '.join(said)}.", lines, "block", "kept (%)", (0.0, 104.0)
    )


def _width_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    widths = found.get("widths") or []
    return [
        {"label": f"block {i}", "cells": [f"{own[kind]:,} of {block[kind]:,}" for kind in KINDS]}
        for i, (own, block) in enumerate(zip(widths, found["blocks"], strict=False))
    ]


def _history(history: Any) -> list[str]:
    if not history or len(history) < 2:
        return []
    size = max(1, len(history) // _POINTS)
    parts = [history[i : i + size] for i in range(0, len(history), size)]
    plots = []
    for number, (label, column) in enumerate((("loss (nats a token)", 0), ("share of parameters drawn", 1))):
        columns = [[row[column] for row in part] for part in parts]
        x = [size * i + len(part) for i, part in enumerate(parts)]
        line = figures.Line(
            label, x, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns], number
        )
        alt = f"{label} over the search: from {line.y[0]:.3f} to {line.y[-1]:.3f}."
        plots.append(figures.curves(f"search-{number}", alt, [line], "step", label, None))
    return plots
