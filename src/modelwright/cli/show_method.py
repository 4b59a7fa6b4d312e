"""``modelwright show METHOD``."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from modelwright.catalog import Card, find, load
from modelwright.options import Arg
from modelwright.progress import Progress
from modelwright.verify.results import latest

#: Kinds of parts that are made from options, and how a command is given one.
_KINDS = {
    "selectors": "--option VALUE",
    "gradient_masks": "--options option=VALUE",
    "editors": "--set option=VALUE",
    "contexts": "--with '{name}: {{option: VALUE}}'",
    "generators": "--with '{name}: {{option: VALUE}}'",
    "caches": "--cache '{name}: {{option: VALUE}}'",
}


def _options(card: Card) -> list[dict[str, Any]]:
    """Returns the options of each part of a method: the part's name, how one is given, and the options themselves.

    An option that must be given has no default.
    """
    found = []
    for kind, given in _KINDS.items():
        for name in card.provides.get(kind, {}):
            part = load(kind, name)
            hints = typing.get_type_hints(part, include_extras=True)
            rows = []
            for field in dataclasses.fields(part):
                arg = next((m for m in getattr(hints[field.name], "__metadata__", ()) if isinstance(m, Arg)), None)
                if not field.init or arg is None:
                    continue
                factory = field.default_factory
                default = field.default if factory is dataclasses.MISSING else factory()
                optional = {} if default is dataclasses.MISSING else {"default": default}
                rows.append({"option": field.name, **optional, "help": arg.help})
            if rows:
                found.append({"part": name, "given": given.format(name=name), "options": rows})
    return found


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
    """Show a method: what for, when not, how to use it, its options, the paper's numbers and ours."""

    name: Annotated[str, Arg("A method's name, such as zip-fit.", positional=True)]

    def run(self, progress: Progress) -> dict[str, Any]:
        """Returns the card, with the options of its parts and the last result of its claim."""
        card = find(self.name)
        row = {**dataclasses.asdict(card), "stage": card.stage, "has_claim": card.has_claim}
        del row["folder"]
        return {**row, "options": _options(card), "claim": latest(card.name)}

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
        for part in card["options"]:
            write(f"\nOptions of {part['part']}: {part['given']}\n")
            for row in part["options"]:
                set_to = "" if row.get("default") in (None, "", [], ()) else f" [{row['default']}]"
                line = f"{row['option']}{set_to}: {row['help']}"
                write(textwrap.fill(line, columns, initial_indent="  ", subsequent_indent="    ") + "\n")
        if card["numbers"]:
            write("\nThe paper's numbers\n")
        for number in card["numbers"]:
            against = f" against {number['baseline']}" if number["baseline"] else ""
            line = f"{number['claim']} ({number['setting']}): {number['method']}{against}"
            write(textwrap.fill(line, columns, initial_indent="  ", subsequent_indent="    ") + "\n")
        write(f"\nOur numbers\n{_ours(card)}")
