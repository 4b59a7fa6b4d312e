"""`modelwright evaluate perplexity`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Perplexity:
    """Measure bits per byte and perplexities of a model on documents; writes JSON as lm-eval does."""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    data: Annotated[list[str], Arg("Documents: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="perplexity.json")]
    samples: Annotated[
        Path | None, Arg("File for a row per document (JSONL, Parquet, CSV).", kind="output", filename="samples.jsonl")
    ] = None
    name: Annotated[str, Arg("Name of the task in the results.")] = "perplexity"
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    limit: Annotated[int | None, Arg("Use only this many documents.")] = None
    window: Annotated[int | None, Arg("Longest input in tokens; the model's own, at most 2048, by default.")] = None
    stride: Annotated[int | None, Arg("New tokens a window; half the window by default.")] = None
    batch_size: Annotated[int, Arg("Windows at once.", kind="run")] = 8
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measures; returns bits_per_byte, byte_perplexity, token_perplexity, documents, bytes, tokens and more."""
        import contextlib
        import itertools

        import torch

        from modelwright.data.records import Records
        from modelwright.data.write import check_format, write_rows
        from modelwright.errors import UserError
        from modelwright.evaluation.perplexity import Totals, as_results, sample_rows
        from modelwright.files import atomic_path, check_output, write_json
        from modelwright.models.loading import load_model, load_tokenizer
        from modelwright.models.scoring import resolve_window, score_documents

        check_output(self.output, self.force)
        if self.samples is not None:
            check_output(self.samples, self.force)
            check_format(self.samples)
        check_limit(self.limit)
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}.")
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        records = Records(self.data, self.text_field)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        window, stride = resolve_window(model, self.window, self.stride)
        totals = Totals()

        def rows() -> Any:
            texts = itertools.islice(records.texts(), self.limit)
            scores = score_documents(model, tokenizer, texts, window=window, stride=stride, batch_size=self.batch_size)
            for row in sample_rows(scores, totals):
                progress.advance()
                yield row

        progress.start("evaluate", self.limit)
        try:
            with contextlib.ExitStack() as both:
                if self.samples is not None:
                    # In place only when the results are: a disk that fills up leaves neither of them.
                    write_rows(both.enter_context(atomic_path(self.samples, self.force)), rows())
                else:
                    for _ in rows():
                        pass
                write_json(
                    self.output,
                    as_results(model, totals, task=self.name, window=window, stride=stride, batch_size=self.batch_size),
                    self.force,
                )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Memory is full at {self.batch_size} windows of {window} tokens: use a smaller --batch-size."
            ) from error
        return {
            "output": str(self.output),
            **totals.metrics(),
            "documents": totals.documents,
            "bytes": totals.bytes,
            "tokens": totals.tokens,
            "words": totals.words,
            "window": window,
            "stride": stride,
        }
