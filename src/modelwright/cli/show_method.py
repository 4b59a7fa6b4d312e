"""``modelwright show METHOD``."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import Annotated, Any

import typer

from modelwright.catalog import Card, find


def _paragraph(title: str, text: str, columns: int) -> str:
    body = "\n".join(textwrap.fill(p, columns - 2) for p in text.strip().split("\n\n"))
    return f"\n{title}\n{textwrap.indent(body, '  ')}\n"


def _ours(result: dict[str, Any] | None, card: Card) -> str:
    if result is None:
        how = f"run: modelwright verify {card.name}" if card.has_claim else "this method has no claim of its own."
        return f"  not measured yet; {how}\n" if card.has_claim else f"  {how}\n"
    lines = [
        f"  {result['statement']}",
        f"  Verdict at {result['scale']} scale: {result['verdict']} ({len(result['seeds'])} seeds).",
    ]
    lines += [f"  {'[met]    ' if bar['met'] else '[not met]'} {bar['statement']}" for bar in result["bars"]]
    return "\n".join(lines) + "\n"


def show_method(
    name: Annotated[str, typer.Argument(help="A method's name, such as zip-fit.", metavar="METHOD")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a method: what for, when not, how to use it, the paper's numbers and ours."""
    from modelwright.verify.results import latest

    card = find(name)
    result = latest(card.name)
    if as_json:
        import dataclasses
        import json

        row = {**dataclasses.asdict(card), "stage": card.stage, "claim": result}
        del row["folder"]
        sys.stdout.write(json.dumps(row, indent=2, ensure_ascii=False) + "\n")
        return
    columns = min(100, shutil.get_terminal_size((100, 24)).columns)
    write = sys.stdout.write
    also = f" (also: {', '.join(card.aliases)})" if card.aliases else ""
    write(f"{card.name}{also} · {card.stage} · {card.status}\n{card.title}\n{card.paper}\n")
    write(_paragraph("What for", card.what_for, columns))
    write(_paragraph("When not", card.when_not, columns))
    if card.command:
        write(f"\nCommand\n{textwrap.indent(card.command.strip(), '  ')}\n")
    write(f"\nPython\n{textwrap.indent(card.python.strip(), '  ')}\n")
    if card.numbers:
        write("\nThe paper's numbers\n")
        for number in card.numbers:
            against = f" against {number.baseline}" if number.baseline else ""
            line = f"{number.claim} ({number.setting}): {number.method}{against}"
            write(textwrap.fill(line, columns, initial_indent="  ", subsequent_indent="    ") + "\n")
    write(f"\nOur numbers\n{_ours(result, card)}")
