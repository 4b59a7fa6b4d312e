"""`modelwright evaluate nq-swap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress


@dataclass(kw_only=True)
class NqSwap:
    """Test whether a model answers from a context that contradicts what it knows, on NQ-Swap's own files.

    Interrupted or killed, the same command goes on where it was.
    """

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    data: Annotated[list[str], Arg("NQ-Swap's Parquet file, or the same rows as JSONL or CSV.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="nq-swap.json")]
    samples: Annotated[
        Path | None,
        Arg("File for a row per question; beside the output by default.", kind="output", filename="samples.jsonl"),
    ] = None
    with_: Annotated[
        list[str | dict[str, Any]],
        Arg("A decoding method: a YAML or JSON file, a name, or 'name: {option: value}'.", kind="methods"),
    ] = field(default_factory=list)
    shots: Annotated[int, Arg("Examples before each question: the file's first, which are not asked then.")] = 4
    limit: Annotated[int | None, Arg("Ask only this many questions.")] = None
    max_new_tokens: Annotated[int, Arg("Tokens of an answer at most; its first line counts.")] = 24
    chat: Annotated[bool, Arg("Ask by the tokenizer's chat template.")] = False
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    batch_size: Annotated[int, Arg("Questions at once.", kind="run")] = 8
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Tests; returns exact match and containment of the context's answer (sub) and of the true one (org)."""
        import itertools

        from modelwright import provenance
        from modelwright.data.records import Records
        from modelwright.decoding.generate import Sampling
        from modelwright.decoding.parts import read_parts
        from modelwright.decoding.run import Layout, generate_to_file
        from modelwright.errors import UserError
        from modelwright.evaluation.nq_swap import prompts, read_questions, summarise
        from modelwright.files import check_output, content_hash, write_json
        from modelwright.models.loading import describe, load_model, load_tokenizer

        check_output(self.output, self.force)
        samples = self.samples or self.output.with_suffix(".samples.jsonl")
        check_output(samples, self.force)
        check_limit(self.limit)
        if self.batch_size < 1 or self.shots < 0:
            raise UserError("--batch-size must be at least 1, and --shots at least 0.")
        parts = read_parts(self.with_)
        records = Records(self.data, "question")
        rows = list(itertools.islice(prompts(read_questions(records), shots=self.shots), self.limit))
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        folder = Path(self.model)
        sampling = Sampling(max_new_tokens=self.max_new_tokens, stop=("\n",))
        plan = {
            "model": content_hash(folder) if folder.is_dir() else self.model, "data": records.fingerprint(),
            "with": parts.identity(), "dtype": self.dtype, "tokenizer": self.tokenizer,
            "options": [self.shots, self.limit, self.max_new_tokens, self.chat],
        }  # fmt: skip
        kept: list[dict[str, Any]] = []
        done = generate_to_file(
            model, tokenizer, rows, samples, sampling, plan=plan, parts=parts, batch_size=self.batch_size,
            layout=Layout(chat=self.chat), force=self.force, progress=progress, keep=kept.append,
        )  # fmt: skip
        found = summarise(kept)
        whole = {
            "task": "nq-swap", **found, "shots": self.shots, "method": parts.name, "methods": parts.identity(),
            "tokens_per_second": done["tokens_per_second"], "model": {"name": self.model, **describe(model)},
            "software": provenance.versions(),
        }  # fmt: skip
        write_json(self.output, whole, self.force)
        return {"output": str(self.output), "samples": str(samples), "method": parts.name, **found}
