"""`modelwright evaluate --tasks …`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Evaluate:
    """Measure a model: tasks of lm-eval through any decoding method; or one of the measures named below.

    Scores of given answers and generated text both go through the methods.
    """

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    tasks: Annotated[list[str], Arg("Tasks, groups or tags of lm-eval, or of --include-path; also with commas.")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="results.json")]
    samples: Annotated[
        Path | None, Arg("File for a row per document (JSONL, Parquet, CSV).", kind="output", filename="samples.jsonl")
    ] = None
    with_: Annotated[
        list[str | dict[str, Any]],
        Arg("A decoding method: a YAML or JSON file, a name, or 'name: {option: value}'.", kind="methods"),
    ] = field(default_factory=list)
    include_path: Annotated[list[str], Arg("Folder with task files of your own.", kind="input")] = field(
        default_factory=list
    )
    num_fewshot: Annotated[int | None, Arg("Examples before each question; the task's own number by default.")] = None
    limit: Annotated[int | None, Arg("Use only this many documents of each task.")] = None
    max_length: Annotated[int | None, Arg("Longest input in tokens; the model's own by default.")] = None
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    chat: Annotated[bool, Arg("Ask by the tokenizer's chat template.")] = False
    system: Annotated[str | None, Arg("System message.")] = None
    seed: Annotated[int, Arg("Seed of examples and draws.")] = 0
    run_code: Annotated[bool, Arg("Let tasks that run what the model wrote do so.")] = False
    batch_size: Annotated[int, Arg("Requests at once.", kind="run")] = 1
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Evaluates; returns each task's metrics."""
        from modelwright import provenance
        from modelwright.data.write import check_format, write_rows
        from modelwright.decoding.parts import read_parts
        from modelwright.evaluation.harness import evaluate_tasks, find_tasks
        from modelwright.files import check_output, write_json
        from modelwright.models.loading import describe, load_model, load_tokenizer

        check_output(self.output, self.force)
        if self.samples is not None:
            check_output(self.samples, self.force)
            check_format(self.samples)
        parts = read_parts(self.with_)
        tasks = [task.strip() for given in self.tasks for task in given.split(",") if task.strip()]
        manager = find_tasks(tasks, self.include_path)
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        progress.start(f"evaluate: {parts.name}")
        found = evaluate_tasks(
            model, tokenizer, tasks, parts=parts, manager=manager, num_fewshot=self.num_fewshot, limit=self.limit,
            batch_size=self.batch_size, chat=self.chat, system=self.system, max_length=self.max_length, seed=self.seed,
            run_code=self.run_code,
        )  # fmt: skip
        by_task = found.pop("samples")
        if self.samples is not None:
            write_rows(
                self.samples, ({"task": task, **row} for task, rows in by_task.items() for row in rows), self.force
            )
        whole = {
            **found,
            "method": parts.name,
            "methods": parts.identity(),
            "model": {"name": self.model, **describe(model)},
            "software": provenance.versions(),
        }
        write_json(self.output, whole, self.force)
        return {"output": str(self.output), "method": parts.name, "results": _metrics(found["results"])}


def _metrics(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metric to value for each task, without lm-eval's names of filters where there is none, and without errors."""
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in found.items()
            if isinstance(value, float) and "_stderr" not in name
        }
        for task, found in results.items()
    }
