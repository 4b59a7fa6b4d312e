"""What the commands `modelwright prune …` share, and those that need no search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from modelwright.options import Arg
from modelwright.progress import Progress

if TYPE_CHECKING:
    from modelwright.compression.calibration import CalibrationBatches
    from modelwright.compression.measure import Comparison

#: Without text to test on, every so manyth document of the calibration text is kept from calibration for it.
HELD_OUT = 10


@dataclass(kw_only=True)
class Prune:
    """Options of every command that prunes, and its work around the method's own."""

    method: ClassVar[str] = ""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    output: Annotated[Path, Arg("Model folder to write.", short="-o", kind="output", filename="model")]
    data: Annotated[list[str], Arg("Calibration text: files, folders, patterns or hub ids.", kind="input")]
    ratio: Annotated[float, Arg("Share of the blocks' parameters to keep, between 0 and 1.")] = 0.5
    round_to: Annotated[
        int | None, Arg("Widths are multiples of this; by default 8, or 1 in models narrower than 512.")
    ] = None
    block_size: Annotated[int | None, Arg("Tokens of a block; 2048, or the model's context, by default.")] = None
    batch_size: Annotated[int, Arg("Blocks at once.")] = 1
    test: Annotated[
        list[str], Arg("Text for perplexity before and after; by default every tenth document of --data.", kind="input")
    ] = field(default_factory=list)
    test_limit: Annotated[int, Arg("Documents of it at most.")] = 100
    tasks: Annotated[list[str], Arg("Tasks of lm-eval to measure before and after; also with commas.")] = field(
        default_factory=list
    )
    include_path: Annotated[list[str], Arg("Folder with task files of your own.", kind="input")] = field(
        default_factory=list
    )
    task_limit: Annotated[int | None, Arg("Use only this many documents of each task.")] = None
    speed_batch: Annotated[int, Arg("Sequences at once when speed is measured.", kind="run")] = 1
    speed_length: Annotated[int, Arg("Tokens of each of them.", kind="run")] = 512
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    seed: Annotated[int, Arg("Seed of order and draws.")] = 0
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished search.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Prunes, measures, and writes model and report; returns parameters, perplexity and speed before and after."""
        import torch

        from modelwright.compression.budget import check_ratio, check_round
        from modelwright.compression.selections import blocks_of
        from modelwright.data.records import Records
        from modelwright.errors import UserError
        from modelwright.files import check_output
        from modelwright.models.loading import load_model, load_tokenizer

        check_output(self.output, self.force)
        check_ratio(self.ratio)
        counts = (self.batch_size, self.test_limit, self.speed_batch, self.speed_length, self.round_to or 1)
        if min(counts) < 1 or self.round_to == 0:
            raise UserError(
                "--batch-size, --test-limit, --speed-batch, --speed-length and --round-to must be at least 1."
            )
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}.")
        self._check()
        measure_tasks = self._tasks()
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        blocks = blocks_of(model)
        if self.round_to is None:
            # Odd widths cost matrix products a fifth of their speed; in narrow models eight are too large a step.
            self.round_to = 8 if blocks[0].hidden >= 512 else 1
        check_round(blocks, self.round_to)
        self._records = Records(self.data, self.text_field)  # one for all: standard input can be read only once
        texts, said = self._texts()
        from modelwright.compression.calibration import CalibrationBatches

        batches = CalibrationBatches(
            model, tokenizer, self._documents(bool(texts) and not self.test), block_size=self.block_size,
            batch_size=self.batch_size, seed=self.seed, progress=progress,
        )  # fmt: skip
        if not texts:
            texts, said = self._first(self._records), "Perplexity is of the calibration text itself, which flatters."
        from modelwright.compression.measure import Comparison

        try:
            small, history = self._prune(model, batches, progress)
            progress.start("measure")
            comparison = Comparison(
                model, tokenizer, texts, tasks=None if measure_tasks is None else lambda m: measure_tasks(m, tokenizer),
                batch=self.speed_batch, length=self.speed_length,
            )  # fmt: skip
            progress.advance(1, "dense")
            row = comparison.add(self.method, small)
            progress.advance(1, self.method)
            self._compare(model, batches, comparison, progress)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Memory is full at {self.batch_size} blocks of {batches.block_size} tokens: use a smaller "
                "--batch-size or --block-size, --gradient-checkpointing where there is a search, or --dtype bfloat16."
            ) from error
        self._write(small, tokenizer, comparison, blocks, history, said)
        dense = comparison.rows[0]
        return {
            "output": str(self.output),
            "method": self.method,
            "ratio": row["ratio"],
            "block_parameters": row["block_parameters"],
            "parameters": row["parameters"],
            "parameters_before": dense["parameters"],
            "perplexity": row["perplexity"],
            "perplexity_before": dense["perplexity"],
            "prefill_times": row["prefill_times"],
            "decode_times": row["decode_times"],
            "compared": {r["name"]: {k: r[k] for k in ("ratio", "perplexity")} for r in comparison.rows[2:]},
        }

    def _check(self) -> None:
        """Refuses bad options of the method before anything is loaded."""

    def _prune(self, model: Any, batches: CalibrationBatches, progress: Progress) -> tuple[Any, Any]:
        """Returns the smaller model, and the history of a search or None."""
        raise NotImplementedError

    def _compare(self, model: Any, batches: CalibrationBatches, comparison: Comparison, progress: Progress) -> None:
        """Adds other methods to the comparison."""

    def _documents(self, without_held_out: bool) -> Iterator[str]:
        for i, text in enumerate(self._records.texts()):
            if not without_held_out or i % HELD_OUT != HELD_OUT - 1:
                yield text

    def _first(self, records: Any) -> list[str]:
        import itertools

        return list(itertools.islice(records.texts(), self.test_limit))

    def _texts(self) -> tuple[list[str], str]:
        """Text for perplexity, and what is to be said of it; no text where --data has too few documents."""
        import itertools

        from modelwright.data.records import Records

        if self.test:
            return self._first(Records(self.test, self.text_field)), f"Perplexity is of {', '.join(self.test)}."
        held_out = itertools.islice(self._records.texts(), HELD_OUT - 1, None, HELD_OUT)
        texts = list(itertools.islice(held_out, self.test_limit))
        return texts, (
            f"Perplexity is of {len(texts)} documents of the calibration text that calibration did not see: text of "
            "the same kind, which is kind to every method that calibrates; test on other text with --test."
        )

    def _tasks(self) -> Any:
        from modelwright.evaluation.harness import evaluate_tasks, find_tasks

        names = [task.strip() for given in self.tasks for task in given.split(",") if task.strip()]
        if not names:
            return None
        manager = find_tasks(names, self.include_path)

        def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
            found = evaluate_tasks(
                model, tokenizer, names, manager=manager, limit=self.task_limit, batch_size=self.batch_size,
                seed=self.seed,
            )  # fmt: skip
            return {
                task: {
                    name.removesuffix(",none"): value
                    for name, value in own.items()
                    if isinstance(value, float) and "_stderr" not in name
                }
                for task, own in found["results"].items()
            }

        return measure

    def _write(self, small: Any, tokenizer: Any, comparison: Comparison, blocks: Any, history: Any, said: str) -> None:
        import json

        from modelwright import provenance
        from modelwright.compression.selections import KINDS
        from modelwright.files import atomic_path
        from modelwright.models.loading import write_model
        from modelwright.report.pruning import write_pruning

        settings = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("output", "force", "model", "device", "trust_remote_code")
        }
        found = {
            "method": self.method,
            "model": self.model,
            "rows": comparison.rows,
            "blocks": [{kind: block.size(kind) for kind in KINDS} for block in blocks],
            "widths": getattr(small.config, "widths", None),
            "history": history,
            "settings": settings,
            "test": said,
            "versions": provenance.versions(),
            "machine": provenance.machine(),
        }
        with atomic_path(self.output, self.force) as folder:
            write_model(small, tokenizer, folder)
            (folder / "pruning.json").write_text(
                json.dumps(found, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
            )
            write_pruning(folder / "pruning.html", found)


#: Batches of calibration text that scores and axes are made from.
BATCHES = 128


def first_batches(batches: CalibrationBatches, count: int = BATCHES) -> list[Any]:
    """The first batches, at most one pass over the text."""
    import itertools

    once = -(-batches.blocks.blocks // batches.batch_size)
    return list(itertools.islice(batches, min(count, once)))


@dataclass(kw_only=True)
class _Scored(Prune):
    mode: Annotated[
        Literal["independent", "same", "same_mlp", "structural"],
        Arg("Each block its own residual dimensions, or one choice for all."),
    ] = "independent"
    balance: Annotated[float, Arg("Keep this share more of the MLP's units, and less of the residual dimensions.")] = (
        0.0
    )

    def _prune(self, model: Any, batches: CalibrationBatches, progress: Progress) -> tuple[Any, Any]:
        from modelwright.compression.width_pruning import prune_width

        progress.start(f"prune: {self.method}")
        return prune_width(
            model, self.method, self.ratio, batches=first_batches(batches), mode=self.mode, balance=self.balance,
            round_to=self.round_to or 1, seed=self.seed,
        ), None  # fmt: skip


@dataclass(kw_only=True)
class PruneMagnitude(_Scored):
    """Keep the residual dimensions and MLP units with the largest weights."""

    method: ClassVar[str] = "magnitude"


@dataclass(kw_only=True)
class PruneWanda(_Scored):
    """Keep the residual dimensions and MLP units with the largest weights times activations (Wanda, structured)."""

    method: ClassVar[str] = "wanda"


@dataclass(kw_only=True)
class PruneRandom(_Scored):
    """Keep residual dimensions and MLP units at random: what every other method should beat."""

    method: ClassVar[str] = "random"


@dataclass(kw_only=True)
class PruneSliceGpt(Prune):
    """Rotate the residual stream to its principal axes and drop the smallest (in the manner of SliceGPT)."""

    method: ClassVar[str] = "slicegpt"

    def _prune(self, model: Any, batches: CalibrationBatches, progress: Progress) -> tuple[Any, Any]:
        from modelwright.compression.width_pruning import slice_model

        progress.start("prune: slicegpt")
        return slice_model(model, self.ratio, first_batches(batches), round_to=self.round_to or 1), None
