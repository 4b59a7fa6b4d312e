"""A claim's result on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelwright.verify.view import bar_rows, how, metric_tables

_STYLE = {"met": "green", "not met": "red", "–": "dim"}


def print_result(document: Mapping[str, Any]) -> None:
    """Prints tables, bars and verdict to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    console.print(Text(f"\n{document['method']}: {document['statement']}", style="bold"))
    console.print(Text(f"Paper: {document['paper']}", style="dim"))
    for table in metric_tables(document):
        view = Table(title=Text(table.heading, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
        view.add_column("variant")
        view.add_column("mean ± sd", justify="right", no_wrap=True)
        view.add_column("method ÷ variant", justify="right", no_wrap=True)
        view.add_column("gain of the method", justify="right", no_wrap=True)
        for row in table.rows:
            style = "bold" if row.is_method else ""
            best = Text(row.value + (" *" if row.best else "  "), style=style)
            view.add_row(Text(row.label, style=style), best, Text(row.ratio), Text(row.gain))
        console.print()
        console.print(view)
    bars = Table(title=Text("What must be seen", style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("bar", "paired gain", "needed", ""):
        bars.add_column(name)
    for bar in bar_rows(document):
        bars.add_row(Text(bar.statement), Text(bar.seen), Text(bar.needed), Text(bar.met, style=_STYLE[bar.met]))
    console.print()
    console.print(bars)
    console.print(Text(f"\nVerdict: {document['verdict']}", style="bold"))
    console.print(Text("* best mean. A bar is met when the one-sided 95% lower bound is enough."))
    if document["notes"]:
        console.print(Text(f"Note: {document['notes']}"))
    console.print(Text(how(document), style="dim"))
    if document.get("stored"):
        console.print(Text(f"Kept in {document['stored']}", style="dim"))
