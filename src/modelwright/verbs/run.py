"""`modelwright run`: a recipe, from its YAML file to its report."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Run:
    """Run a recipe: a YAML file of steps, or the name of a bundled one such as quickstart.

    Results are kept in the run's folder under keys of their content, so the same command does only what has changed,
    and continues after Ctrl-C, a crash or kill -9.
    """

    recipe: Annotated[str, Arg("A recipe's YAML file, or the name of a bundled recipe.", positional=True)]
    output: Annotated[Path | None, Arg("The run's folder; runs/NAME if not given.", short="-o", kind="run")] = None
    set: Annotated[
        list[str], Arg("Change a value: steps.train.with.max_steps=50, seeds=[0]. Repeatable.", kind="value")
    ] = field(default_factory=list)
    dry_run: Annotated[bool, Arg("Print the plan and what is done already; do nothing.", kind="run")] = False
    workers: Annotated[
        int | None, Arg("Processes; 0 means one per core. The recipe's own number if not given.", kind="run")
    ] = None
    wait: Annotated[bool, Arg("Wait while another run works in the same folder.", kind="run")] = False
    fresh: Annotated[bool, Arg("Forget this folder's earlier results and do everything.", kind="run")] = False
    prune: Annotated[bool, Arg("Afterwards remove kept results that the recipe no longer uses.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Runs the recipe, or plans it.

        Raises:
            UserError: The recipe is wrong, a step refused its input, or another run is at work in the folder.
        """
        from modelwright.recipes.load import load_recipe
        from modelwright.recipes.plan import Plan
        from modelwright.recipes.run import StepFailed, run_folder, run_recipe

        if self.dry_run:
            loaded = load_recipe(self.recipe, self.set)
            plan = Plan(loaded, run_folder(loaded.recipe.name, self.output))
            rows = [
                {"id": i.id, "verb": i.verb, "cached": plan.store.record(i.key, i.outputs.values()) is not None}
                for i in plan.instances
            ]
            to_do = {i.key for i, row in zip(plan.instances, rows, strict=True) if not row["cached"]}
            return {"name": loaded.recipe.name, "plan": rows, "to_do": len(to_do)}
        try:
            return run_recipe(
                self.recipe,
                self.output,
                overrides=self.set,
                workers=self.workers,
                wait=self.wait,
                fresh=self.fresh,
                prune=self.prune,
                progress=progress,
            )
        except StepFailed as error:
            raise SystemExit(f"modelwright: {error}") from error

    def show(self, result: dict[str, Any]) -> None:
        """Prints the plan, or the steps with their times and where the report is."""
        if "plan" in result:
            width = max(len(row["id"]) for row in result["plan"])
            for row in result["plan"]:
                print_line(f"{row['id']:<{width}}  {row['verb']:<19}  {'cached' if row['cached'] else 'to do'}")
            print_line(f"{len(result['plan'])} steps; to do: {result['to_do']} (steps that are equal are done once).")
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("step", "verb", "times", "cached", "seconds", box=None, pad_edge=False)
        for column in (2, 3, 4):
            table.columns[column].justify = "right"
        names = dict.fromkeys(row["step"] for row in result["steps"])
        for name in names:
            rows = [row for row in result["steps"] if row["step"] == name]
            cached = [row for row in rows if row["cached"]]
            # Results that are shared between instances were computed, and count, once.
            seconds = sum({row["folder"]: row["seconds"] for row in rows}.values())
            style = "dim" if len(cached) == len(rows) else ""
            table.add_row(name, rows[0]["verb"], str(len(rows)), str(len(cached)), f"{seconds:.1f}", style=style)
        Console(highlight=False).print(table)
        print_line(f"\nTook {result['seconds']:.1f} s. Results: {result['folder']}")
        if result["report_path"]:
            print_line(f"Report: {result['report_path']}")


def print_line(text: str) -> None:
    """Prints to standard output."""
    sys.stdout.write(text + "\n")
