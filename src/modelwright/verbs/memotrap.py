"""`modelwright evaluate memotrap`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class MemoTrap:
    """Test whether a model follows an instruction against a text that it knows by heart, on MemoTrap's own files."""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    data: Annotated[list[str], Arg("MemoTrap's CSV files, or their folder; also JSONL, Parquet.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="memotrap.json")]
    samples: Annotated[
        Path | None, Arg("File for a row per question (JSONL, Parquet, CSV).", kind="output", filename="samples.jsonl")
    ] = None
    with_: Annotated[
        list[str | dict[str, Any]],
        Arg("A decoding method: a YAML or JSON file, a name, or 'name: {option: value}'.", kind="methods"),
    ] = field(default_factory=list)
    macro_with_all: Annotated[
        bool, Arg("Count the accuracy over all questions as a fifth subset in macro, as DeCoRe's numbers do.")
    ] = False
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    limit: Annotated[int | None, Arg("Use only this many questions of each subset.")] = None
    batch_size: Annotated[int, Arg("Continuations at once.", kind="run")] = 8
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Tests; returns macro, micro, and the accuracy of each subset."""
        from collections import Counter

        from modelwright import provenance
        from modelwright.data.records import Records
        from modelwright.data.write import check_format, write_rows
        from modelwright.decoding.parts import read_parts
        from modelwright.errors import UserError
        from modelwright.evaluation.memotrap import memotrap_rows, read_traps, summarise
        from modelwright.files import check_output, write_json
        from modelwright.models.loading import describe, load_model, load_tokenizer

        check_output(self.output, self.force)
        if self.samples is not None:
            check_output(self.samples, self.force)
            check_format(self.samples)
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}.")
        parts = read_parts(self.with_)
        seen: Counter[str] = Counter()
        traps = []
        for trap in read_traps(Records(self.data, "prompt")):
            seen[trap.subset] += 1
            if self.limit is None or seen[trap.subset] <= self.limit:
                traps.append(trap)
        if not traps:
            raise UserError("There are no questions: --limit must be at least 1.")
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        progress.start(f"memotrap: {parts.name}", len(traps))
        rows = []
        with parts.on(model, tokenizer) as applied:
            for row in memotrap_rows(applied, traps, batch_size=self.batch_size):
                rows.append(row)
                progress.advance(1, f"{sum(r['right'] for r in rows) / len(rows):.1%} right")
        found = summarise(rows, macro_with_all=self.macro_with_all)
        if self.samples is not None:
            write_rows(self.samples, rows, self.force)
        whole = {
            "task": "memotrap", **found, "macro_with_all": self.macro_with_all, "method": parts.name,
            "methods": parts.identity(), "model": {"name": self.model, **describe(model)},
            "software": provenance.versions(),
        }  # fmt: skip
        write_json(self.output, whole, self.force)
        return {"output": str(self.output), "method": parts.name, **found}
