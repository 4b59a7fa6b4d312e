"""`modelwright generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
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
    batch_size: Annotated[int, Arg("Prompts at once.", kind="run")] = 8
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Generates; returns prompts, completions, generated_tokens, tokens_per_second and how completions ended."""
        import dataclasses
        import itertools

        from modelwright.data.records import Records
        from modelwright.data.write import check_format
        from modelwright.decoding.generate import Sampling
        from modelwright.decoding.run import generate_to_file
        from modelwright.errors import UserError
        from modelwright.files import check_output, content_hash
        from modelwright.models.loading import load_model, load_tokenizer

        check_output(self.output, self.force)
        check_format(self.output)
        if not self.prompts and not self.prompt:
            raise UserError("There are no prompts: give --prompt TEXT or --prompts FILE.")
        if self.batch_size < 1 or self.samples < 1:
            raise UserError("--batch-size and --samples must be at least 1.")
        names = [f.name for f in dataclasses.fields(Sampling)]
        sampling = Sampling(**{n: getattr(self, n) for n in names if n != "stop"}, stop=tuple(self.stop))
        sampling.check()
        records = Records(self.prompts, self.prompt_field, field_option="prompt_field") if self.prompts else None
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        folder = Path(self.model)
        plan = {
            "model": content_hash(folder) if folder.is_dir() else self.model,
            "prompts": [self.prompt, records.fingerprint() if records else None, self.prompt_field, self.limit],
            "sampling": dataclasses.asdict(sampling),
            "rest": [self.samples, self.chat, self.system, self.tokenizer, self.dtype],
        }
        from_files = ((r.text, r.row) for r in records) if records else iter(())
        rows = itertools.chain(((p, {}) for p in self.prompt), itertools.islice(from_files, self.limit))
        return generate_to_file(
            model, tokenizer, rows, self.output, sampling,
            plan=plan, samples=self.samples, batch_size=self.batch_size, chat=self.chat, system=self.system,
            force=self.force, progress=progress,
        )  # fmt: skip
