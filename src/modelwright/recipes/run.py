"""Runs a recipe: takes from the store what is there, does the rest in worker processes."""

from __future__ import annotations

import datetime
import graphlib
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from modelwright import provenance
from modelwright.errors import UserError
from modelwright.files import read_json, write_json
from modelwright.progress import Progress, Silent
from modelwright.recipes.display import Bars, Lines, display_for
from modelwright.recipes.load import load_recipe
from modelwright.recipes.plan import Instance, Plan
from modelwright.recipes.pool import Pool, cores
from modelwright.recipes.store import remove_scratch

#: Seconds that a second run waits before it says so: workers of a run that was killed need a moment to be gone.
_LOCK_SECONDS = 2.0


class StepFailed(Exception):
    """A step failed through a defect, not through the user's input; the message says where its traceback is."""


def run_recipe(
    recipe: str,
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    wait: bool = False,
    fresh: bool = False,
    prune: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs a recipe and writes its report. Killed at any moment, the same call continues.

    Args:
        recipe: Path of a YAML file, or the name of a bundled recipe.
        output: The run's folder; ``runs/NAME`` if not given.
        overrides: ``--set`` assignments.
        workers: Processes; None takes the recipe's number, 0 one per core.
        wait: Wait for another run in the same folder, instead of refusing.
        fresh: Forget all earlier results of this folder first.
        prune: Afterwards remove results that this recipe does not use.
        progress: Where progress is told; None shows nothing.

    Returns:
        The content of ``run.json``, with ``folder`` and ``report_path`` (None without a report).

    Raises:
        UserError: The recipe is wrong, or a step refused its input, or another run is at work in the folder.
        StepFailed: A step failed through a defect.
    """
    loaded = load_recipe(recipe, overrides)
    folder = run_folder(loaded.recipe.name, output)
    # Everything that can be wrong is found before anything is written.
    plan = Plan(loaded, folder)
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}: give a positive number, or 0 for one per core.")
    count = (loaded.recipe.workers if workers is None else workers) or cores()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=-1 if wait else _LOCK_SECONDS)
    except Timeout as error:
        raise UserError(
            f"another run is at work in {folder}: wait for it (--wait), or choose another --output."
        ) from error
    except OSError as error:
        raise UserError(f"{folder} cannot be used as a run's folder: {error.strerror or error}.") from error
    with lock:
        if fresh:
            shutil.rmtree(plan.store.folder, ignore_errors=True)
        remove_scratch(folder)
        plan.store.folder.mkdir(exist_ok=True)
        plan.inputs.save()
        run = _Run(plan, count, display_for(progress or Silent()))
        run.go()
        if prune:
            plan.store.prune({i.key for i in plan.instances})
        report = _render(folder)
    return {**run.summary, "folder": str(folder), "report_path": report}


def run_folder(name: str, output: str | Path | None) -> Path:
    """Returns the folder of a run, absolute.

    Raises:
        UserError: It holds something else.
    """
    folder = Path(output if output is not None else Path("runs") / name).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output.")
    if (folder / "run.json").is_file():
        other = read_json(folder / "run.json").get("name")
        if other != name:
            raise UserError(f"{folder} holds a run of the recipe '{other}': choose another --output.")
    elif folder.is_dir() and not (folder / "store").is_dir() and any(p.name != ".lock" for p in folder.iterdir()):
        raise UserError(f"{folder} holds other files and no run: choose another --output.")
    return folder


class _Run:
    def __init__(self, plan: Plan, workers: int, display: Lines | Bars) -> None:
        self._plan, self._pool, self._display = plan, Pool(workers), display
        # Instances with equal keys are one piece of work; the first gives it its name.
        self._work: dict[str, Instance] = {}
        for instance in plan.instances:
            self._work.setdefault(instance.key, instance)
        self._records = {
            key: record
            for key, instance in self._work.items()
            if (record := plan.store.record(key, instance.outputs.values())) is not None
        }
        self._cached = set(self._records)
        self._started, self._clock = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
        self.summary: dict[str, Any] = {}

    def go(self) -> None:
        status = "failed"
        try:
            if len(self._cached) < len(self._work):
                self._display.begin(len(self._work), len(self._cached), self._pool.size)
                self._loop()
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self._display.close()
            self._pool.close()
            # A worker that had to be killed could not tidy up after itself.
            for key in self._work.keys() - self._records.keys():
                remove_scratch(self._plan.store.step(key))
            self._write(status)

    def _loop(self) -> None:
        order = {key: i for i, key in enumerate(self._work)}
        sorter = graphlib.TopologicalSorter({key: [n.key for n in i.needs] for key, i in self._work.items()})
        sorter.prepare()
        waiting: list[str] = []
        while sorter.is_active():
            for key in sorter.get_ready():
                if key in self._records:
                    sorter.done(key)
                elif self._work[key].verb == "pick":
                    self._pick(key)
                    sorter.done(key)
                else:
                    waiting.append(key)
            waiting.sort(key=order.__getitem__)
            while waiting and self._pool.free:
                self._submit(waiting.pop(0))
            if len(waiting) == 0 and self._pool.free == self._pool.size:
                continue  # everything that was ready came from the store
            happened = self._pool.next(timeout=1.0)
            if happened is not None and self._handle(*happened):
                sorter.done(happened[0]["key"])

    def _submit(self, key: str) -> None:
        from modelwright.verbs import VERBS

        instance = self._work[key]
        results = {needed.key: self._records[needed.key]["result"] for needed in instance.needs}
        self._pool.submit(
            {
                "run": str(self._plan.store.run),
                "key": key,
                "verb": VERBS[instance.verb],
                "name": instance.verb,
                "options": self._plan.values(instance, results),
                "outputs": instance.outputs,
            }
        )
        self._display.started(instance.id)

    def _pick(self, key: str) -> None:
        instance = self._work[key]
        store = self._plan.store
        result = self._plan.values(instance, {n.key: self._records[n.key]["result"] for n in instance.needs})
        options = {name: str(value) for name, value in instance.options.items()}
        self._records[key] = {
            "format": 1, "verb": "pick", "options": options, "result": store.relative(result), "seconds": 0.0,
        }  # fmt: skip
        store.step(key).mkdir(parents=True, exist_ok=True)
        write_json(store.step(key) / "result.json", self._records[key])
        self._display.started(instance.id)
        self._display.finished(instance.id, 0.0)

    def _handle(self, job: dict[str, Any], event: dict[str, Any]) -> bool:
        """Returns whether the job is done."""
        instance = self._work[job["key"]]
        kind = event["event"]
        if kind == "finished":
            self._records[job["key"]] = event["record"]
            self._display.finished(instance.id, event["record"]["seconds"])
            self._write("running")
            return True
        if kind == "refused":
            where = self._plan.source.where(("steps", instance.step))
            raise UserError(f"{where}: the step '{instance.id}' failed: {event['text']}")
        if kind == "defect":
            raise StepFailed(
                f"the step '{instance.id}' failed through a defect, {event['text']} (traceback in {event['path']})"
            )
        if kind == "died":
            raise self._death(instance, event)
        self._display.event(instance.id, event)
        return False

    def _death(self, instance: Instance, event: dict[str, Any]) -> UserError:
        log = self._plan.store.step(instance.key) / "log.txt"
        if event["code"] == -9:
            why = "was killed, most often because memory ran out: use fewer workers or smaller sizes"
        else:
            ended = f"signal {-event['code']}" if event["code"] < 0 else f"exit code {event['code']}"
            why = f"died ({ended}{': ' + event['text'] if event['text'] else ''})"
        seen = f" Its output is in {log}." if log.exists() and log.stat().st_size else ""
        return UserError(f"the process of the step '{instance.id}' {why}; the same command continues.{seen}")

    def _write(self, status: str) -> None:
        recipe, source, store = self._plan.recipe, self._plan.source, self._plan.store
        machine = provenance.machine()
        for record in self._records.values():
            if accelerator := (record.get("machine") or {}).get("accelerator"):
                machine["accelerator"] = accelerator
        self.summary = {
            "format": 1,
            "name": recipe.name,
            "title": recipe.title,
            "status": status,
            "recipe": recipe.model_dump(by_alias=True),
            "recipe_text": source.text,
            "overrides": list(source.overrides.values()),
            "started": self._started,
            "seconds": round(time.monotonic() - self._clock, 3),
            "machine": machine,
            "versions": provenance.versions(),
            "report": recipe.report,
            "planned": len(self._plan.instances),
            "steps": [
                {
                    "id": i.id,
                    "step": i.step,
                    "verb": i.verb,
                    "at": i.point.at,
                    "options": self._shown(self._records[i.key]["options"]),
                    "result": self._records[i.key]["result"],
                    "seconds": self._records[i.key]["seconds"],
                    "cached": i.key in self._cached,
                    "folder": f"store/{i.key}",
                }
                for i in self._plan.instances
                if i.key in self._records
            ],
        }
        write_json(store.run / "run.json", self.summary)

    def _shown(self, options: dict[str, Any]) -> dict[str, Any]:
        # A report is shown to others: it need not tell where on this machine the recipe lies.
        folder = str(self._plan.source.folder)

        def short(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: short(item) for key, item in value.items()}
            if isinstance(value, list):
                return [short(item) for item in value]
            return value.removeprefix(f"{folder}/") if isinstance(value, str) else value

        return {name: short(value) for name, value in options.items()}


def _render(folder: Path) -> str | None:
    try:
        from modelwright.report.render import render
    except ImportError:
        return None
    trace = folder / "report.error.txt"
    try:
        path = render(folder)
    except UserError:
        raise
    except Exception as error:
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        raise StepFailed(
            f"every step is done, but the report failed through a defect, {type(error).__name__}: {error} "
            f"(traceback in {trace}); the results are in {folder}"
        ) from error
    trace.unlink(missing_ok=True)
    return str(path)
