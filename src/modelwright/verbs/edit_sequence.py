"""`modelwright edit sequence`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress
from modelwright.verbs import arguments


@dataclass(kw_only=True)
class EditSequence:
    """Write facts into a model one after the other, and measure what is left of its abilities on the way.

    The model itself is not changed on disk. Edits and measurements are kept in the output folder: the same command
    continues a run that was stopped, with the same bits.
    """

    model: arguments.Model
    requests: Annotated[list[str], Arg("Facts to write, in this order: JSONL, CSV, JSON.", kind="input")]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="sequence")]
    methods: Annotated[list[str], Arg("Editors, with commas between.")] = field(
        default_factory=lambda: ["ft-m", "rome", "grace"]
    )
    checkpoints: Annotated[list[str], Arg("Numbers of edits at which to measure, with commas between.")] = field(
        default_factory=lambda: ["1,10,50,100"]
    )
    edit_batch: Annotated[int, Arg("Facts that one fit writes.")] = 1
    tasks: Annotated[
        list[str],
        Arg("Abilities: arithmetic, copying, context (generated), or tasks of lm-eval; with commas between."),
    ] = field(default_factory=lambda: ["arithmetic,copying,context"])
    include_path: Annotated[list[str], Arg("Folders with lm-eval tasks of your own.", kind="input")] = field(
        default_factory=list
    )
    keep: Annotated[
        list[str], Arg("Facts that should be kept: question and answer; those known before are asked.", kind="input")
    ] = field(default_factory=list)
    neutral: Annotated[list[str], Arg("Texts that no edit should change: files, folders.", kind="input")] = field(
        default_factory=list
    )
    limit: Annotated[int, Arg("Tests of each ability; documents of each task.")] = 100
    statistics: arguments.Statistics = None
    options: arguments.EditorOptions = field(default_factory=dict)
    stop_on_collapse: Annotated[bool, Arg("End a method's sequence when the model has collapsed.")] = False
    max_delta_norm: Annotated[float | None, Arg("End it when a layer has changed by more than this share.")] = None
    kept_share: Annotated[float, Arg("An ability counts as kept while it has this share of what it had.")] = 0.9
    layout: arguments.Layout = "auto"
    new_tokens: arguments.NewTokens = 16
    tokenizer: arguments.Tokenizer = None
    seed: Annotated[int, Arg("Seed of the generated abilities.")] = 0
    batch_size: Annotated[int, Arg("Prompts at once.", kind="run")] = 16
    dtype: arguments.Dtype = "auto"
    device: arguments.Device = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace an existing output of another run.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Edits and measures; returns each method's states in short, and which editor to use for how many edits."""
        from modelwright import provenance
        from modelwright.data.records import Records
        from modelwright.editing.named_statistics import NamedStatistics
        from modelwright.editing.requests import read_requests
        from modelwright.errors import UserError
        from modelwright.evaluation.asking import layout_for
        from modelwright.evaluation.editing_evaluation import SequentialEditing, advice, stands
        from modelwright.evaluation.editing_evaluation.verdict import present
        from modelwright.evaluation.editors import describe, editors_by_name, laid_out, writes_prompt
        from modelwright.files import write_json
        from modelwright.models.loading import describe as describe_model
        from modelwright.models.loading import load_model, load_tokenizer
        from modelwright.report.editing import render_sequence

        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output} is a file: choose a folder for the output.")
        if (self.output / "config.json").exists():
            raise UserError(f"{self.output} is a model's folder: choose another for the output.")
        for value, option in (
            (self.limit, "--limit"),
            (self.edit_batch, "--edit-batch"),
            (self.batch_size, "--batch-size"),
        ):
            check_limit(value, option)
        if not 0 < self.kept_share <= 1:
            raise UserError(f"--kept-share is {self.kept_share}: give a share above 0 and at most 1.")
        checkpoints = _numbers(self.checkpoints)
        editors = editors_by_name(self.methods, self.options)
        requests = read_requests(self.requests)
        if checkpoints[-1] > len(requests):
            raise UserError(
                f"The last checkpoint is {checkpoints[-1]}, but there are only {len(requests)} requests: give more, or "
                f"other checkpoints, such as --checkpoints {','.join(map(str, sorted({1, len(requests)})))}."
            )
        neutral = list(Records(self.neutral, field_option=None).texts())[:64] if self.neutral else _PLAIN
        statistics = NamedStatistics(self.statistics, editors.values(), self.output)
        for editor in editors.values():  # before the first of them has worked for hours
            editor.check(requests[: checkpoints[-1]])
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        layout = layout_for(tokenizer, self.layout, self.new_tokens)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        abilities = self._abilities(model, tokenizer, layout)
        if "lm_eval" in abilities and (names := [name for name, e in editors.items() if writes_prompt(e)]):
            raise UserError(
                f"Tasks of lm-eval have prompts of their own, into which the facts of {names[0]} cannot be put: leave "
                f"out one of the two."
            )
        sequences = {
            name: SequentialEditing(
                model=model, tokenizer=tokenizer, editor=editor, requests=laid_out(requests, editor, layout),
                checkpoints=[0, *(n for n in checkpoints if n)], batch_size=self.edit_batch, neutral=neutral,
                layout=layout, folder=self.output / name, max_delta_norm=self.max_delta_norm,
                stop_on_collapse=self.stop_on_collapse, force=self.force, progress=progress,
            )
            for name, editor in editors.items()
        }  # fmt: skip
        statistics.collect(model, tokenizer, progress=progress)  # now that nothing is left to be refused
        runs: dict[str, list[dict[str, Any]]] = {}
        stopped: dict[str, str] = {}
        for name, sequence in sequences.items():
            runs[name] = sequence.run(abilities)
            if sequence.stopped:
                stopped[name] = sequence.stopped
        said = advice(runs, self.kept_share)
        result = {
            "task": "editing-evaluation",
            "advice": said,
            # What a model cannot do at all cannot be lost, and that is no praise of an editor.
            "stands": {m: stands(s, self.kept_share) for m, s in runs.items() if not abilities or present(s[0])},
            "stopped": stopped,
            "states": runs,
            "model": {"name": self.model, **describe_model(model)},
            "settings": {
                "editors": {name: describe(editor) for name, editor in editors.items()}, "edit_batch": self.edit_batch,
                "tests": self.limit, "requests": self.requests, "kept_share": self.kept_share,
            },
            "software": provenance.versions(),
        }  # fmt: skip
        write_json(self.output / "sequence.json", result, True)
        page = self.output / "sequence.html"
        render_sequence(result, page, title=f"{Path(self.model).name} after N edits")
        counted = {"stands": result["stands"]} if result["stands"] else {}
        return {"output": str(self.output), "report": str(page), **counted, "advice": said}

    def _abilities(self, model: Any, tokenizer: Any, layout: Any) -> dict[str, Any]:
        from modelwright.data.records import Records
        from modelwright.errors import UserError
        from modelwright.evaluation.editing_evaluation.abilities import WORLD, LmEvalTasks, facts_to_keep, world_tasks

        names = [name.strip() for text in self.tasks for name in text.split(",") if name.strip()]
        found: dict[str, Any] = {
            name: dataclasses.replace(ability, batch_size=self.batch_size)
            for name, ability in world_tasks(
                tokenizer, layout, [n for n in names if n in WORLD], tests=self.limit, seed=self.seed
            ).items()
        }
        if self.keep:
            rows = [record.row for record in Records(self.keep, "question", field_option=None)][: self.limit]
            if missing := [i for i, row in enumerate(rows) if not row.get("answer")]:
                raise UserError(f"Row {missing[0] + 1} of --keep has no answer: give question and answer.")
            facts = facts_to_keep(model, tokenizer, layout, rows)
            if facts is None:
                raise UserError(
                    f"The model knows none of the {len(rows)} facts of --keep, so there is nothing to keep."
                )
            found["facts"] = dataclasses.replace(facts, batch_size=self.batch_size)
        if others := tuple(name for name in names if name not in WORLD):
            found["lm_eval"] = LmEvalTasks(
                tokenizer, others, self.limit, batch_size=self.batch_size, include_path=tuple(self.include_path)
            )
        if not found:
            raise UserError("No ability is named: give --tasks or --keep.")
        return found


def _numbers(texts: list[str]) -> list[int]:
    from modelwright.errors import UserError

    parts = [part.strip() for text in texts for part in str(text).split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UserError(f"The checkpoints are {', '.join(parts) or 'none'}: give whole numbers such as 1,10,50,100.")
    if not any(map(int, parts)):
        raise UserError("The only checkpoint is 0, which is the model itself: give numbers of edits such as 1,10,50.")
    return sorted({int(part) for part in parts})


#: Neutral text for whoever gives none: plain sentences about nothing that anyone would edit.
_PLAIN = [
    "The rain had stopped by the time we reached the village, and the children were already playing in the street.",
    "To make the dough, mix the flour with the water and the salt, cover it with a cloth, and let it rest for an hour.",
    "She closed the window, put the letters back into the drawer, and went down to see who had knocked at the door.",
    "When a metal is heated it expands, which is why long bridges are built with small gaps between their parts.",
    "The committee will meet again in spring; until then, members may send their questions to the secretary by post.",
    "If the list is empty the function returns zero; otherwise it adds up the values and divides by their number.",
]
