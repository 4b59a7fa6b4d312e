"""``modelwright list``."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from modelwright.catalog import STAGES, cards
from modelwright.errors import UserError, did_you_mean
from modelwright.options import Arg
from modelwright.progress import Progress
from modelwright.verify.results import latest


@dataclass(kw_only=True)
class ListMethods:
    """List the methods by stage, with the verdict of each claim."""

    stage: Annotated[str, Arg("Only this stage, such as curation.")] = ""

    def run(self, progress: Progress) -> dict[str, Any]:
        """Returns the methods as rows."""
        stages = sorted({card.stage for card in cards().values()})
        if self.stage and self.stage not in stages:
            raise UserError(f"There is no stage '{self.stage}': {did_you_mean(self.stage, stages)}")
        rows = []
        for card in cards().values():
            result = latest(card.name)
            rows.append(
                {
                    "name": card.name,
                    "aliases": list(card.aliases),
                    "stage": card.stage,
                    "status": card.status,
                    "summary": card.summary,
                    "claim": result["verdict"] if result else ("not run" if card.has_claim else "–"),
                }
            )
        return {"methods": [row for row in rows if not self.stage or row["stage"] == self.stage]}

    def show(self, result: dict[str, Any]) -> None:
        """Prints a table a stage."""
        rows = result["methods"]
        columns = shutil.get_terminal_size((120, 24)).columns
        name_width = max(len(row["name"]) for row in rows) + 2
        claim_width = max(len(row["claim"]) for row in rows) + 2
        room = max(30, columns - 2 - name_width - claim_width)
        for stage in [*STAGES, *sorted({row["stage"] for row in rows} - set(STAGES))]:
            members = [row for row in rows if row["stage"] == stage]
            if members:
                sys.stdout.write(f"\n{stage}\n")
            for row in members:
                status = "" if row["status"] == "stable" else f"({row['status']}) "
                text = status + row["summary"]
                text = text if len(text) <= room else text[: room - 1].rstrip() + "…"
                sys.stdout.write(f"  {row['name']:<{name_width}}{row['claim']:<{claim_width}}{text}\n")
        sys.stdout.write("\nThe second column is the verdict of the method's claim. More: modelwright show NAME\n")
