"""``modelwright list``."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from modelwright.catalog import STAGES, cards
from modelwright.errors import UserError, did_you_mean


def list_methods(
    stage: Annotated[str, typer.Option("--stage", help="Only this stage, such as curation.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods by stage, with the status of each claim."""
    from modelwright.verify.results import latest

    chosen = [card for card in cards().values() if not stage or card.stage == stage]
    if not chosen:
        raise UserError(f"No method of stage '{stage}': {did_you_mean(stage, {c.stage for c in cards().values()})}")

    def claim(name: str, has_claim: bool) -> str:
        result = latest(name)
        return result["verdict"] if result else ("not run" if has_claim else "–")

    if as_json:
        import json

        rows = [
            {
                "name": c.name,
                "aliases": list(c.aliases),
                "stage": c.stage,
                "status": c.status,
                "summary": c.summary,
                "claim": claim(c.name, c.has_claim),
            }
            for c in chosen
        ]
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return
    columns = shutil.get_terminal_size((110, 24)).columns
    name_width = max(len(c.name) for c in chosen) + 2
    claims = {c.name: claim(c.name, c.has_claim) for c in chosen}
    claim_width = max(len("claim"), *(len(v) for v in claims.values())) + 2
    for name in [*STAGES, *sorted({c.stage for c in chosen} - set(STAGES))]:
        members = [c for c in chosen if c.stage == name]
        if not members:
            continue
        sys.stdout.write(f"\n{name}\n")
        for card in members:
            status = "" if card.status == "stable" else f"({card.status}) "
            text = status + card.summary
            room = max(30, columns - 2 - name_width - claim_width)
            text = text if len(text) <= room else text[: room - 1].rstrip() + "…"
            sys.stdout.write(f"  {card.name:<{name_width}}{claims[card.name]:<{claim_width}}{text}\n")
    sys.stdout.write("\nThe second column is the verdict of the method's claim. More: modelwright show NAME\n")
