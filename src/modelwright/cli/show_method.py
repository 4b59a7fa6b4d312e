"""``modelwright show METHOD``."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any

from modelwright.catalog import find
from modelwright.options import Arg
from modelwright.progress import Progress
from modelwright.verify.results import latest


def _paragraph(title: str, text: str, columns: int) -> str:
    body = "\n".join(textwrap.fill(p, columns - 2) for p in text.strip().split("\n\n"))
    return f"\n{title}\n{textwrap.indent(body, '  ')}\n"


def _ours(card: dict[str, Any]) -> str:
    claim = card["claim"]
    if claim is None:
        how = f"not measured yet; run: modelwright verify {card['name']}"
        return f"  {how if card['has_claim'] else 'this method has no claim of its own.'}\n"
    lines = [
        f"  {claim['statement']}",
        f"  Verdict at {claim['scale']} scale: {claim['verdict']} ({len(claim['seeds'])} seeds).",
    ]
    lines += [f"  {'[met]    ' if bar['met'] else '[not met]'} {bar['statement']}" for bar in claim["bars"]]
    return "\n".join(lines) + "\n"


@dataclass(kw_only=True)
class ShowMethod:
    """Show a method: what for, when not, how to use it, the paper's numbers and ours."""

    name: Annotated[str, Arg("A method's name, such as zip-fit.", positional=True)]

    def run(self, progress: Progress) -> dict[str, Any]:
        """Returns the card, with the last result of its claim."""
        card = find(self.name)
        row = {**dataclasses.asdict(card), "stage": card.stage, "has_claim": card.has_claim}
        del row["folder"]
        return {**row, "claim": latest(card.name)}

    def show(self, card: dict[str, Any]) -> None:
        """Prints it."""
        columns = min(100, shutil.get_terminal_size((100, 24)).columns)
        write = sys.stdout.write
        also = f" (also: {', '.join(card['aliases'])})" if card["aliases"] else ""
        write(f"{card['name']}{also} · {card['stage']} · {card['status']}\n{card['title']}\n{card['paper']}\n")
        write(_paragraph("What for", card["what_for"], columns))
        write(_paragraph("When not", card["when_not"], columns))
        if card["command"]:
            write(f"\nCommand\n{textwrap.indent(card['command'].strip(), '  ')}\n")
        write(f"\nPython\n{textwrap.indent(card['python'].strip(), '  ')}\n")
        if card["numbers"]:
            write("\nThe paper's numbers\n")
        for number in card["numbers"]:
            against = f" against {number['baseline']}" if number["baseline"] else ""
            line = f"{number['claim']} ({number['setting']}): {number['method']}{against}"
            write(textwrap.fill(line, columns, initial_indent="  ", subsequent_indent="    ") + "\n")
        write(f"\nOur numbers\n{_ours(card)}")
