"""`modelwright evaluate needles`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Needles:
    """Test what a model finds again of a long prompt, by length and depth, with or without STRING."""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="needles.json")]
    heatmap: Annotated[
        Path | None, Arg("Heat map to write: .png, .svg or .html.", kind="output", filename="needles.html")
    ] = None
    samples: Annotated[
        Path | None, Arg("File for a row per test (JSONL, Parquet, CSV).", kind="output", filename="samples.jsonl")
    ] = None
    tasks: Annotated[list[str], Arg("single, multikey, multi, variables or words.")] = field(
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
    compare: Annotated[bool, Arg("With --shift: test the plain model on the same prompts too.")] = False
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

        from modelwright import catalog, provenance
        from modelwright.data.records import Records
        from modelwright.data.write import check_format, write_rows
        from modelwright.errors import UserError
        from modelwright.evaluation.needles import THRESHOLD, cells, effective_length, needle_rows
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
        if self.compare and self.shift is None:
            raise UserError("--compare sets STRING beside the plain model: give STRING's --shift too.")
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        haystack = list(Records(self.haystack, self.text_field).texts()) if self.haystack else []
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        lengths = list(dict.fromkeys(self.lengths))
        if not lengths:
            longest = context_length(model)
            if longest is None:
                raise UserError("The model has no bound on its positions: say which lengths to test with --lengths.")
            lengths = [longest * quarter // 4 for quarter in (1, 2, 3, 4)]
        contexts: dict[str, Any] = {}
        if self.shift is None or self.compare:
            contexts["plain"] = contextlib.nullcontext
        if self.shift is not None:
            # From a command line a whole number arrives as 4096.0.
            shift = int(self.shift) if self.shift >= 1 and self.shift == int(self.shift) else self.shift
            config = catalog.load("contexts", "string")(
                shift=shift, window=self.window, attention_factor=self.attention_factor
            )
            with config.apply(model):  # refuses what it refuses before hours of the other grid
                pass
            contexts["string"] = lambda: config.apply(model)
        per_grid = self.trials * len(lengths) * sum(1 if t == "words" else len(self.depths) for t in self.tasks)
        progress.start("needles", per_grid * len(contexts))
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in contexts}
        applied: dict[str, Any] = {}
        try:
            for name, context in contexts.items():
                with context() as now:
                    if name == "string":
                        applied = {"shift": now.shift, "window": now.window, "attention_factor": now.attention_factor}
                    for row in needle_rows(
                        model, tokenizer, lengths=lengths, depths=self.depths, tasks=self.tasks, trials=self.trials,
                        needles=self.needles, haystack=haystack, seed=self.seed, new_tokens=self.new_tokens,
                        chat=self.chat, batch_size=self.batch_size,
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
                "haystack": self.haystack or "generated", "string": applied or None,
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
                labels = {"plain": "plain", "string": f"STRING, shift {applied.get('shift')}"}
                part = all_or_none.enter_context(atomic_path(self.heatmap, self.force))
                write_map(part, {labels[n]: g for n, g in grids.items()}, title=f"Needles: {self.model}", note=note)
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
