"""Draws the documentation's pages of results: ``python -m modelwright.verify.page [CHECKOUT]``.

``docs/claims.md`` comes from ``results/claims/*.json``, ``docs/benchmarks.md`` from ``results/benchmarks/*.json``, and
the table between ``<!-- claims: NAME -->`` and ``<!-- /claims -->`` in ``docs/methods/*.md`` from the newest results of
that method. The table between ``<!-- methods -->`` and ``<!-- /methods -->`` in ``README.md`` comes from the cards. A
test says whether the committed pages are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.catalog import cards
from modelwright.verify import results
from modelwright.verify.view import bar_rows, how, metric_tables

_MARKER = re.compile(r"(<!-- claims: ([a-z0-9-]+) -->\n)(.*?)(<!-- /claims -->)", re.DOTALL)
_METHODS = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
_GENERATED = "<!-- Made by `python -m modelwright.verify.page`. Do not edit. -->\n"


def escape(text: object) -> str:
    """Escapes what Markdown or HTML would read in a table cell or a line of prose."""
    flat = " ".join(str(text).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Returns a Markdown table; columns after the first ``text_columns`` are aligned right. Cells are Markdown."""
    rule = [":--" if i < text_columns else "--:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def claim_section(document: Mapping[str, Any], level: int = 3) -> str:
    """Returns one result as Markdown: verdict, a table per metric, the bars, and how it was made."""
    parts = [f"{'#' * level} {escape(document['method'])}, scale {document['scale']}: {document['verdict']}\n"]
    parts.append(f"*{escape(document['statement'])}*\n\nPaper: {escape(document['paper'])}\n")
    for view in metric_tables(document):
        rows = []
        for row in view.rows:
            label = f"**{escape(row.label)}**" if row.is_method else escape(row.label)
            rows.append([label, f"**{row.value}**" if row.best else row.value, row.ratio, row.gain])
        parts.append(table([escape(view.heading), "mean ± sd", "method ÷ variant", "gain of the method"], rows))
    rows = [[escape(b.statement), escape(b.seen), escape(b.needed), f"**{b.met}**"] for b in bar_rows(document)]
    parts.append(table(["What must be seen", "Paired gain", "Needed", ""], rows, text_columns=4))
    if document["notes"]:
        parts.append(f"{escape(document['notes'])}\n")
    if document["prepared"]:
        prepared = json.dumps(document["prepared"], ensure_ascii=False)
        parts.append(f"Found before the seeds were run: {escape(prepared)}\n")
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts.append(f"{escape(how(document))} Versions: {escape(versions)}.\n")
    return "\n".join(parts)


def claim_table(name: str, folder: Path | None = None) -> str:
    """Returns the claim results of one method as Markdown, every scale that was measured, or a line saying none was.

    Args:
        name: The method's name.
        folder: A results folder; None takes the project's own.
    """
    documents = [d for d in results.claims(folder) if d["method"] == name]
    if not documents:
        return f"Not measured yet: `modelwright verify {name}` runs the experiment.\n"
    return "\n".join(claim_section(document) for document in documents)


def claims_page(folder: Path | None = None) -> str:
    """Returns ``docs/claims.md``."""
    parts = [_GENERATED, "# Claims\n", _CLAIMS_INTRODUCTION]
    documents = results.claims(folder)
    if documents:
        overview = [
            [
                f"[{escape(d['method'])}](#{_anchor(d)})",
                escape(d["statement"]),
                d["scale"],
                str(len(d["seeds"])),
                f"**{d['verdict']}**",
            ]
            for d in documents
        ]
        parts.append(table(["Method", "Claim", "Scale", "Seeds", "Verdict"], overview, text_columns=5))
        parts += [f'<a id="{_anchor(d)}"></a>\n\n' + claim_section(d, level=2) for d in documents]
    else:
        parts.append("No claim has been measured yet.\n")
    return "\n".join(parts)


_CLAIMS_INTRODUCTION = """\
Each method comes with an experiment that anyone can run: `modelwright verify METHOD`. What must be seen is fixed before
the experiment is run. A bar is met when the one-sided 95% lower confidence bound (Student's t over seeds) of the paired
gain is at least what is needed. Baselines get the same tuning budget and compute as the method. A claim that does not
hold at this scale is a finding, and stays here.
"""


def _anchor(document: Mapping[str, Any]) -> str:
    return f"claim-{document['method']}-{document['scale']}"


def benchmarks_page(folder: Path | None = None) -> str:
    """Returns ``docs/benchmarks.md`` from ``benchmarks/*.json`` of a results folder.

    A benchmark's document has ``title``, ``rows`` (a list of objects with the same keys, or lists of such under
    ``tables`` by heading), and optionally ``question``, ``notes``, ``command``, ``machine``, ``versions`` and ``date``.
    """
    folder = folder or results.shipped_folder()
    parts = [_GENERATED, "# Benchmarks\n", "Speed and memory as ratios against named peers, measured in one run.\n"]
    for path in sorted((folder / "benchmarks").glob("*.json")) if folder else []:
        parts.append(_benchmark_section(path.stem, json.loads(path.read_text(encoding="utf-8"))))
    if len(parts) == 3:
        parts.append("No benchmark has been measured yet.\n")
    return "\n".join(parts)


def _benchmark_section(stem: str, document: Mapping[str, Any]) -> str:
    parts = [f"## {escape(document.get('title', stem))}\n"]
    if document.get("question"):
        parts.append(f"*{escape(document['question'])}*\n")
    tables: dict[str, list[dict[str, Any]]] = {"": document.get("rows", []), **document.get("tables", {})}
    for title, rows in tables.items():
        if rows:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            body = [[escape(_value(row.get(key))) for key in keys] for row in rows]
            parts.append((f"### {escape(title)}\n\n" if title else "") + table([escape(k) for k in keys], body))
    notes = document.get("notes") or []
    parts += [f"{escape(note)}\n" for note in ([notes] if isinstance(notes, str) else notes)]
    made = [f"`{document['command']}`"] if document.get("command") else []
    for key in ("machine", "versions"):
        if document.get(key):
            made.append(escape(", ".join(f"{k} {v}" for k, v in document[key].items())))
    if document.get("date"):
        made.append(escape(document["date"]))
    if made:
        parts.append("; ".join(made) + ".\n")
    return "\n".join(parts)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


def fill_markers(text: str, folder: Path | None = None) -> str:
    """Returns a page with the block between every pair of claim markers drawn anew."""
    return _MARKER.sub(lambda m: f"{m[1]}\n{claim_table(m[2], folder)}\n{m[4]}", text)


def methods_table(folder: Path | None = None) -> str:
    """Returns the methods of this project as Markdown, with the verdict of each claim; links are from README.md."""
    verdicts: dict[str, list[str]] = {}
    for document in results.claims(folder):
        verdicts.setdefault(document["method"], []).append(f"{document['verdict']} ({document['scale']})")
    rows = []
    for card in cards().values():
        if card.package.startswith("modelwright."):
            claim = "; ".join(verdicts.get(card.name, ["not run" if card.has_claim else "–"]))
            name = f"[{card.name}](docs/methods/{card.name}.md)"
            rows.append([name, card.stage, escape(card.summary), claim])
    return table(["Method", "Stage", "What it does", "Claim"], rows, text_columns=4)


def pages(checkout: Path) -> dict[Path, str]:
    """Returns every generated or filled page of a checkout with what it should hold."""
    folder = checkout / "results"
    drawn = {
        checkout / "docs" / "claims.md": claims_page(folder),
        checkout / "docs" / "benchmarks.md": benchmarks_page(folder),
    }
    readme = checkout / "README.md"
    if readme.is_file():
        methods = methods_table(folder)
        drawn[readme] = _METHODS.sub(lambda m: f"{m[1]}{methods}{m[2]}", readme.read_text(encoding="utf-8"))
    for path in sorted((checkout / "docs" / "methods").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if _MARKER.search(text):
            drawn[path] = fill_markers(text, folder)
    return drawn


def main(checkout: Path) -> list[Path]:
    """Writes the pages that are out of date and returns them."""
    changed = []
    for path, text in pages(checkout).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for page in main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        sys.stdout.write(f"drew {page}\n")
