"""`modelwright generate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Generate:
    """Let a model complete prompts, in batches. Interrupted or killed, the same command goes on where it was."""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    output: Annotated[
        Path,
        Arg(
            "File for a row per completion (JSONL, Parquet, CSV).",
            short="-o",
            kind="output",
            filename="completions.jsonl",
        ),
    ]
    prompts: Annotated[
        list[str], Arg("Files with prompts: JSONL and others; text, one prompt a file.", kind="input")
    ] = field(default_factory=list)
    prompt: Annotated[list[str], Arg("A prompt, as it stands; may be given several times.", short="-p")] = field(
        default_factory=list
    )
    prompt_field: Annotated[str, Arg("Field that holds the prompt.")] = "prompt"
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    limit: Annotated[int | None, Arg("Use only this many prompts of the files.")] = None
    max_new_tokens: Annotated[int, Arg("Tokens at most per completion.")] = 128
    with_: Annotated[
        list[str | dict[str, Any]],
        Arg("A decoding method: a YAML or JSON file, a name, or 'name: {option: value}'.", kind="methods"),
    ] = field(default_factory=list)
    cache: Annotated[
        str | None,
        Arg("Where keys and values are kept, given as a method is: saq, kivi-2, kivi-4, quantized, offloaded ..."),
    ] = None
    cache_plot: Annotated[
        Path | None,
        Arg(
            "With --cache saq or kivi: also draw its memory by level (.svg, .png, .pdf).",
            kind="output",  # without a name: a recipe draws none
        ),
    ] = None
    compare: Annotated[
        bool,
        Arg("Also complete without the methods; sets both side by side on an HTML page named as the output."),
    ] = False
    temperature: Annotated[float, Arg("0: the most probable token; else draw.")] = 0.0
    top_k: Annotated[int, Arg("Draw among this many most probable tokens; 0: all.")] = 0
    top_p: Annotated[float, Arg("Draw among the most probable tokens that have this probability together.")] = 1.0
    min_p: Annotated[float, Arg("Drop tokens below this fraction of the most probable one.")] = 0.0
    repetition_penalty: Annotated[float, Arg("Above 1: tokens seen before are less probable.")] = 1.0
    stop: Annotated[list[str], Arg("A text that ends a completion.")] = field(default_factory=list)
    samples: Annotated[int, Arg("Completions per prompt.")] = 1
    seed: Annotated[int, Arg("Seed of the draws.")] = 0
    chat: Annotated[bool, Arg("Lay each prompt out as a user's message by the tokenizer's chat template.")] = False
    system: Annotated[str | None, Arg("System message, with --chat.")] = None
    context_field: Annotated[str, Arg("Field with the part of the prompt that a contrast leaves out.")] = "context"
    answer_field: Annotated[
        str | None, Arg("With --compare: field with right answers; found by the names answers and answer.")
    ] = None
    batch_size: Annotated[int, Arg("Prompts at once.", kind="run")] = 8
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Generates; returns prompts, completions, generated_tokens, tokens_per_second and how completions ended."""
        import dataclasses

        from modelwright.attention.saq.memory import Level, check_plot, memory_table, plot_memory
        from modelwright.data.records import Records
        from modelwright.data.write import check_format
        from modelwright.decoding.generate import Sampling
        from modelwright.decoding.parts import read_cache, read_parts
        from modelwright.decoding.run import Layout, generate_to_file
        from modelwright.errors import UserError
        from modelwright.files import check_output, content_hash
        from modelwright.models.loading import load_model, load_tokenizer

        check_output(self.output, self.force)
        check_format(self.output)
        page = self.output.with_suffix(".html")
        if not self.prompts and not self.prompt:
            raise UserError("There are no prompts: give --prompt TEXT or --prompts FILE.")
        if self.batch_size < 1 or self.samples < 1:
            raise UserError("--batch-size and --samples must be at least 1.")
        names = [f.name for f in dataclasses.fields(Sampling)]
        sampling = Sampling(**{n: getattr(self, n) for n in names if n != "stop"}, stop=tuple(self.stop))
        sampling.check()
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"At temperature 0 all {self.samples} samples of a prompt would be the same: give another.")
        check_limit(self.limit)
        parts = read_parts(self.with_)
        if self.cache is not None:
            parts = dataclasses.replace(parts, cache=read_cache(self.cache))
        if self.cache_plot is not None:
            if parts.cache is None:
                raise UserError("--cache-plot draws the memory of a cache by level: name one, such as --cache saq.")
            check_plot(self.cache_plot, self.force)
        if self.compare:
            if not parts.all:
                raise UserError("--compare sets a method beside none: name one with --with, or a cache with --cache.")
            check_output(page, self.force)
        records = Records(self.prompts, self.prompt_field, field_option="prompt_field") if self.prompts else None
        if self.compare and self.answer_field is not None:
            from modelwright.evaluation.answers import answers_of

            if not any(answers_of(record.row, self.answer_field) for record in records or ()):
                raise UserError(f"No row has right answers in the field '{self.answer_field}': check --answer-field.")
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        folder = Path(self.model)
        plan = {
            "model": content_hash(folder) if folder.is_dir() else self.model,
            "prompts": [self.prompt, records.fingerprint() if records else None, self.prompt_field, self.limit],
            "sampling": dataclasses.asdict(sampling),
            "with": parts.identity(),
            "rest": [self.samples, self.chat, self.system, self.tokenizer, self.dtype, self.context_field],
        }

        def compare(summary: dict[str, Any], rows: Any) -> None:
            from modelwright.report.comparison import write_comparison

            settings = {"model": self.model, "with": parts.identity(), "sampling": plan["sampling"]}
            summary |= write_comparison(
                page, rows(), summary, settings=settings, answer_field=self.answer_field, force=self.force
            )

        summary = generate_to_file(
            model, tokenizer, _Rows(self.prompt, records, self.limit), self.output, sampling,
            plan=plan, parts=parts, compare=compare if self.compare else None, samples=self.samples,
            batch_size=self.batch_size, layout=Layout(self.chat, self.system, self.context_field), force=self.force,
            progress=progress,
        )  # fmt: skip
        if "cache_memory" in summary:
            levels = [Level(**level) for level in summary["cache_memory"]]
            progress.message("Memory of the largest cache, by bits:\n" + memory_table(levels))
            if self.cache_plot is not None:
                plot_memory(levels, self.cache_plot, force=self.force)
        elif self.cache_plot is not None:
            progress.message(f"This run has no memory by level, so {self.cache_plot} was not drawn.")
        return summary


class _Rows:
    """Prompts of the command line and then of the files, each time anew."""

    def __init__(self, prompts: list[str], records: Any, limit: int | None) -> None:
        self.prompts, self.records, self.limit = prompts, records, limit

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        yield from ((prompt, {}, "") for prompt in self.prompts)
        if self.records is not None:
            yield from ((r.text, r.row, r.where) for r in itertools.islice(self.records, self.limit))
