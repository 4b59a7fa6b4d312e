"""`modelwright probe token-loss`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class TokenLoss:
    """Measure a model's loss by how frequent tokens were in training, and averaged over types beside occurrences.

    Counts come from `probe token-counts`, of the training corpus, also when --data is held-out text.
    """

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    data: Annotated[list[str], Arg("Documents to measure on: files, folders, patterns or hub ids.", kind="input")]
    counts: Annotated[str | None, Arg("Counts of the training corpus (Parquet).", kind="input")] = None
    train_data: Annotated[
        list[str], Arg("The training corpus, to be counted now, instead of --counts.", kind="input")
    ] = field(default_factory=list)
    output: Annotated[
        Path | None, Arg("JSON file for the result.", short="-o", kind="output", filename="token-loss.json")
    ] = None
    types: Annotated[
        Path | None, Arg("Parquet file for a row per token type.", kind="output", filename="types.parquet")
    ] = None
    page: Annotated[Path | None, Arg("HTML page with plots.", kind="output", filename="token-loss.html")] = None
    against: Annotated[
        str | None, Arg("A model to compare with, such as one without the regulariser or quantisation.", kind="input")
    ] = None
    earlier: Annotated[
        list[str], Arg("Earlier checkpoints of the same run, oldest first: adds learning speed.", kind="input")
    ] = field(default_factory=list)
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    limit: Annotated[int | None, Arg("Use only this many documents.")] = None
    base: Annotated[int, Arg("Ratio of the frequency bins' edges.")] = 3
    bootstrap: Annotated[int, Arg("Resamples of types for the 95% intervals; 0 for none.")] = 1000
    window: Annotated[int | None, Arg("Longest input in tokens; the model's own, at most 2048, by default.")] = None
    stride: Annotated[int | None, Arg("New tokens a window; half the window by default.")] = None
    batch_size: Annotated[int, Arg("Windows at once.", kind="run")] = 8
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measures; returns average and balanced loss, accuracies, slope, gap and bins of each model."""
        import contextlib
        import itertools

        import torch

        from modelwright import provenance
        from modelwright.data.records import Records
        from modelwright.errors import UserError
        from modelwright.files import atomic_path, check_output, write_json
        from modelwright.models.loading import describe, load_model, load_tokenizer
        from modelwright.probing.fair_lm.audit import audit, check_options, write_types
        from modelwright.probing.fair_lm.counts import TokenCounts, count_tokens
        from modelwright.probing.fair_lm.measure import measure_documents
        from modelwright.probing.fair_lm.report import TokenLossReport
        from modelwright.report.token_loss import render_audit

        for path in (self.output, self.types, self.page):
            if path is not None:
                check_output(path, self.force)
        check_options(self)
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        if self.counts is not None:
            counts = TokenCounts.load(self.counts)
            counts.check(tokenizer)
            if counts.tokenizer is None:
                progress.message(f"{self.counts} does not say of which tokenizer it is: make sure that it is this one.")
        else:
            counts = count_tokens(Records(self.train_data, self.text_field).texts(), tokenizer, progress=progress)
        records = Records(self.data, self.text_field)
        about: dict[str, Any] = {}

        def measured(name: str) -> TokenLossReport:
            model = load_model(name, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
            about[name] = describe(model)
            texts = itertools.islice(records.texts(), self.limit)
            try:
                tracker = measure_documents(
                    model, tokenizer, texts, window=self.window, stride=self.stride, batch_size=self.batch_size,
                    progress=progress,
                )  # fmt: skip
            except torch.OutOfMemoryError as error:
                raise UserError(f"Memory is full at {self.batch_size} windows: use a smaller --batch-size.") from error
            return tracker.compute()

        earlier = [measured(name) for name in self.earlier]
        report = measured(self.model)
        other = None if self.against is None else measured(self.against)
        found = audit(report, counts, base=self.base, bootstrap=self.bootstrap, against=other, earlier=earlier)
        found |= {
            "model": about[self.model],
            "software": provenance.versions(),
        }
        with contextlib.ExitStack() as all_of_them:  # in place only when all are: a disk that fills up leaves none
            if self.types is not None:
                partial = all_of_them.enter_context(atomic_path(self.types, self.force))
                write_types(partial, report, counts, tokenizer, base=self.base, against=other)
            if self.page is not None:
                partial = all_of_them.enter_context(atomic_path(self.page, self.force))
                render_audit(found, partial, title=f"Loss by token frequency: {self.model}")
            if self.output is not None:
                write_json(self.output, found, self.force)
        names = {"output": "output", "types": "types_file", "page": "page"}
        written = {key: str(p) for n, key in names.items() if (p := getattr(self, n)) is not None}
        return {**written, **{name: value for name, value in found.items() if name != "software"}}
