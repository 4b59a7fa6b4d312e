"""`modelwright evaluate needles`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Needles:
    """Test what a model finds again of a long prompt, by length and depth, with or without a method."""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="needles.json")]
    heatmap: Annotated[
        Path | None, Arg("Heat map to write: .png, .svg or .html.", kind="output", filename="needles.html")
    ] = None
    samples: Annotated[
        Path | None, Arg("File for a row per test (JSONL, Parquet, CSV).", kind="output", filename="samples.jsonl")
    ] = None
    with_: Annotated[
        list[str | dict[str, Any]],
        Arg("A decoding method: a YAML or JSON file, a name, or 'name: {option: value}'.", kind="methods"),
    ] = field(default_factory=list)
    tasks: Annotated[list[str], Arg("single, multikey, multi, multiquery, variables, qa, words or frequent.")] = field(
        default_factory=lambda: ["single"]
    )
    lengths: Annotated[
        list[int],
        Arg("Tokens of prompt and answer; by default a quarter, half, three quarters and all of the model's."),
    ] = field(default_factory=list)
    depths: Annotated[list[float], Arg("Places of the needle: 0 is the start, 1 the end.")] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0]
    )
    trials: Annotated[int, Arg("Tests for each length and depth.")] = 10
    needles: Annotated[int, Arg("Numbers, keys, variables or words of a test (single: always one).")] = 4
    haystack: Annotated[list[str], Arg("Texts to hide needles in: files, folders, patterns.", kind="input")] = field(
        default_factory=list
    )
    text_field: Annotated[str, Arg("Field that holds the haystack's text.")] = "text"
    shift: Annotated[
        float | None, Arg("Apply STRING with this shift: tokens, or below 1 a fraction of the training length.")
    ] = None
    window: Annotated[int, Arg("STRING's window.")] = 128
    attention_factor: Annotated[float, Arg("STRING's factor of cosines and sines; 1 is the paper's.")] = 1.0
    compare: Annotated[bool, Arg("Test the plain model on the same prompts too.")] = False
    new_tokens: Annotated[int, Arg("Tokens of an answer at most.")] = 64
    chat: Annotated[bool, Arg("Ask by the tokenizer's chat template.")] = False
    seed: Annotated[int, Arg("Seed of the tests.")] = 0
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    batch_size: Annotated[int, Arg("Prompts at once.", kind="run")] = 1
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Tests; returns for each grid the mean share found by task and length, and the effective lengths."""
        import contextlib

        import torch

        from modelwright import provenance
        from modelwright.data.records import Records
        from modelwright.data.write import check_format, write_rows
        from modelwright.decoding.parts import Parts, read_parts
        from modelwright.errors import UserError
        from modelwright.evaluation.needles import THRESHOLD, WITHOUT_DEPTH, cells, effective_length, needle_rows
        from modelwright.evaluation.needles_map import check_map, write_map
        from modelwright.files import atomic_path, check_output, write_json
        from modelwright.models.loading import describe, load_model, load_tokenizer
        from modelwright.models.scoring import context_length

        check_output(self.output, self.force)
        if self.heatmap is not None:
            check_map(check_output(self.heatmap, self.force))
        if self.samples is not None:
            check_output(self.samples, self.force)
            check_format(self.samples)
        if self.shift is not None and self.with_:
            raise UserError("--shift is short for --with 'string: {shift: …}': give one of them.")
        given: list[Any] = list(self.with_)
        if self.shift is not None:
            options = {"shift": self.shift, "window": self.window, "attention_factor": self.attention_factor}
            # From a command line a whole number arrives as 4096.0.
            if self.shift >= 1 and self.shift == int(self.shift):
                options["shift"] = int(self.shift)
            given = [{"string": options}]
        parts = read_parts(given)
        if self.compare and not parts.all:
            raise UserError("--compare sets a method beside the plain model: give --with, or STRING's --shift.")
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        haystack = list(Records(self.haystack, self.text_field).texts()) if self.haystack else []
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        lengths = list(dict.fromkeys(self.lengths))
        if not lengths:
            longest = context_length(model)
            if longest is None:
                raise UserError("The model has no bound on its positions: say which lengths to test with --lengths.")
            lengths = [longest * quarter // 4 for quarter in (1, 2, 3, 4)]
        ways = {"plain": Parts()} if self.compare else {}
        ways[parts.name] = parts
        with parts.on(model, tokenizer) as applied:  # refuses what it refuses before hours of the other grid
            if applied.needs_context:
                raise UserError(f"'{parts.name}' needs each prompt without its context, which a needle test has not.")
        per_grid = self.trials * len(lengths) * sum(1 if t in WITHOUT_DEPTH else len(self.depths) for t in self.tasks)
        progress.start("needles", per_grid * len(ways))
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        try:
            for name, way in ways.items():
                with way.on(model, tokenizer) as applied:
                    for row in needle_rows(
                        model, tokenizer, lengths=lengths, depths=self.depths, tasks=self.tasks, trials=self.trials,
                        needles=self.needles, haystack=haystack, seed=self.seed, new_tokens=self.new_tokens,
                        chat=self.chat, batch_size=self.batch_size, generate_with=applied.generate,
                    ):  # fmt: skip
                        rows[name].append(row)
                        mean = sum(r["found"] for r in rows[name]) / len(rows[name])
                        progress.advance(1, f"{name}: {mean:.0%} found")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Memory is full at {self.batch_size} prompts of up to {max(lengths)} tokens: use a smaller "
                f"--batch-size or --dtype bfloat16."
            ) from error
        grids = {name: cells(found) for name, found in rows.items()}
        effective = {name: effective_length(grid) for name, grid in grids.items()}
        result = {
            "task": "needles",
            "settings": {
                "tasks": self.tasks, "lengths": lengths, "depths": self.depths, "trials": self.trials,
                "needles": self.needles, "new_tokens": self.new_tokens, "chat": self.chat, "seed": self.seed,
                "haystack": self.haystack or "generated", "methods": parts.identity(),
            },
            "model": {"name": self.model, **describe(model)},
            "grids": grids,
            "effective_length": effective,
            "effective_length_threshold": THRESHOLD,
            "software": provenance.versions(),
        }  # fmt: skip
        with contextlib.ExitStack() as all_or_none:
            if self.samples is not None:
                part = all_or_none.enter_context(atomic_path(self.samples, self.force))
                write_rows(part, ({"grid": name, **row} for name, found in rows.items() for row in found))
            if self.heatmap is not None:
                note = f"{self.trials} tests a cell; {'the haystack given' if haystack else 'generated sentences'}."
                part = all_or_none.enter_context(atomic_path(self.heatmap, self.force))
                write_map(part, grids, title=f"Needles: {self.model}", note=note)
            write_json(self.output, result, self.force)
        return {
            "output": str(self.output),
            **({"heatmap": str(self.heatmap)} if self.heatmap is not None else {}),
            "tests": sum(map(len, rows.values())),
            "found": {name: _by_length(grid) for name, grid in grids.items()},
            "effective_length": {
                f"{name}, {task}": length for name, found in effective.items() for task, length in found.items()
            },
        }


def _by_length(grid: list[dict[str, Any]]) -> dict[str, float]:
    means: dict[str, float] = {}
    for length in dict.fromkeys(cell["length"] for cell in grid):
        values = [cell["found"] for cell in grid if cell["length"] == length]
        means[f"{length} tokens"] = sum(values) / len(values)
    return means


@dataclass(kw_only=True)
class Ruler(Needles):
    """Test long prompts by tasks of RULER's kinds on generated text: needles, tracing, counting, questions.

    All tasks at each length; the wording is ours, so compare numbers within this tool only.
    """

    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="ruler.json")]
    heatmap: Annotated[
        Path | None, Arg("Heat map to write: .png, .svg or .html.", kind="output", filename="ruler.html")
    ] = None
    tasks: Annotated[list[str], Arg("Tasks; all of them by default.")] = field(
        default_factory=lambda: ["single", "multikey", "multi", "multiquery", "variables", "qa", "words", "frequent"]
    )
    trials: Annotated[int, Arg("Tests for each length and depth.")] = 4
