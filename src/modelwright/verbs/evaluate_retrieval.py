"""`modelwright evaluate retrieval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Retrieval:
    """Measure recall@k of a dual encoder (CLIP, SigLIP, a text-embedding model) on held-out pairs; writes JSON."""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    data: Annotated[list[str], Arg("Pairs: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="retrieval.json")]
    name: Annotated[str, Arg("Name of the task in the results.")] = "retrieval"
    ks: Annotated[str, Arg("Every k of recall@k, with commas between them.")] = "1,5,10"
    query_field: Annotated[str | None, Arg("Field of the image or query; found by its name by default.")] = None
    key_field: Annotated[str | None, Arg("Field of the text that belongs to it; found by its name by default.")] = None
    base: Annotated[Path | None, Arg("Folder that paths of images start from; the data file's by default.")] = None
    skip_bad: Annotated[bool, Arg("Leave out pairs whose image or text cannot be used, and count them.")] = False
    limit: Annotated[int | None, Arg("Use only this many pairs.")] = None
    pooling: Annotated[Literal["auto", "mean", "cls", "last"], Arg("Of a text encoder's hidden states.")] = "auto"
    max_tokens: Annotated[int | None, Arg("Longest text in tokens; the model's own by default.")] = None
    batch_size: Annotated[int, Arg("Pairs at once.", kind="run")] = 64
    workers: Annotated[int, Arg("Processes that decode images ahead.", kind="run")] = 0
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the existing output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measures; returns recall@k, mrr and median rank of both directions, mean_recall@k, and counts."""
        import torch

        from modelwright.errors import UserError
        from modelwright.evaluation.retrieval import as_results, evaluate_retrieval
        from modelwright.files import check_output, write_json
        from modelwright.training.contrastive.encoders import load_pair_encoder
        from modelwright.training.contrastive.pairs import read_pairs

        check_output(self.output, self.force)
        try:
            ks = [int(k) for k in self.ks.split(",")]
        except ValueError as error:
            raise UserError(
                f"--ks must be numbers with commas between them, such as 1,5,10, not '{self.ks}'."
            ) from error
        for option, value in (("limit", self.limit), ("batch-size", self.batch_size), ("ks", min(ks))):
            if value is not None and value < 1:
                raise UserError(f"--{option} must be at least 1, not {value}.")
        pairs = read_pairs(
            self.data,
            query_field=self.query_field,
            key_field=self.key_field,
            base=self.base,
            bad_texts="keep" if self.skip_bad else "refuse",
        )
        encoder = load_pair_encoder(
            self.model,
            pooling=self.pooling,
            max_tokens=self.max_tokens,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        if self.limit is not None:
            pairs = pairs.select(range(min(self.limit, len(pairs))))
        skipped = 0
        if self.skip_bad:
            pairs, bad = pairs.without_bad(progress)
            skipped = len(bad)
        try:
            found = evaluate_retrieval(
                encoder, pairs, batch_size=self.batch_size, ks=ks, workers=self.workers, progress=progress
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"Memory is full at {self.batch_size} pairs: use a smaller --batch-size.") from error
        results = as_results(encoder, found, task=self.name, ks=ks, batch_size=self.batch_size)
        results["counts"]["skipped"] = skipped
        write_json(self.output, results, self.force)
        return {"output": str(self.output), **found, "skipped": skipped}
