"""`modelwright select jest`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class SelectJest:
    """Choose pairs (image and text, or text and text) that a model can still learn from, jointly, batch by batch.

    The pool is cut into super-batches, and of each the part is kept that is hard for --model and easy for --reference,
    a model trained on a small clean set. While a model trains, use `modelwright train contrastive --select jest`
    instead, which scores with the model as it is at each step. With --cache-only nothing is chosen: the reference's
    embeddings are written beside the pairs, and cost nothing from then on. A run that was stopped is continued by the
    same command.
    """

    pool: Annotated[
        list[str],
        Arg(
            "Pairs to choose from: JSONL, CSV, Parquet or WebDataset files, folders, patterns or hub ids. May be "
            "repeated.",
            kind="input",
        ),
    ]
    output: Annotated[
        Path, Arg("File for the chosen pairs (.parquet).", short="-o", kind="output", filename="chosen.parquet")
    ] = Path("chosen.parquet")
    model: Annotated[str | None, Arg("The learner: a folder or hub id.", kind="input")] = None
    reference: Annotated[
        str | None,
        Arg("The reference: a folder or hub id; left out where the pool holds its cached embeddings.", kind="input"),
    ] = None
    cache_only: Annotated[bool, Arg("Only write the pool with the reference's embeddings.")] = False
    super_batch: Annotated[int, Arg("Pairs of a super-batch.")] = 1024
    filter_ratio: Annotated[float, Arg("Share of each super-batch that is left out.")] = 0.8
    n_chunks: Annotated[int, Arg("Rounds of the joint draw; 1 chooses pairs independently.")] = 16
    criterion: Annotated[
        Literal["learnability", "hard", "easy_reference", "uniform"],
        Arg(
            "What counts: the learner's loss minus the reference's (learnability), either alone, or nothing (uniform)."
        ),
    ] = "learnability"
    form: Annotated[
        Literal["auto", "sigmoid", "softmax"],
        Arg("Loss that pairs are scored by; auto: the model's (the softmax form is experimental)."),
    ] = "auto"
    normalize: Annotated[bool, Arg("Divide each logit of the draw by its number of terms: less greedy.")] = False
    temperature: Annotated[float, Arg("What divides the logits of the draw; 0 takes the best.")] = 1.0
    query_field: Annotated[str | None, Arg("Field of the image or first text, if it is not found by its name.")] = None
    key_field: Annotated[str | None, Arg("Field of the text, if it is not found by its name.")] = None
    group_field: Annotated[str | None, Arg("Field that names a pair's kind: reports what was chosen by kind.")] = None
    target_group: Annotated[list[str], Arg("Kind that is wanted: reports precision and recall. May be repeated.")] = (
        field(default_factory=list)
    )
    seed: Annotated[int, Arg("Seed of the cut and of the draws.")] = 0
    batch_size: Annotated[int, Arg("Pairs in a model at a time.", kind="run")] = 64
    workers: Annotated[int, Arg("Processes that read and prepare pairs; 0: none beside this.", kind="run")] = 0
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    report: Annotated[Path | None, Arg("Also write the numbers to this JSON file.")] = None
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Chooses and writes; returns counts, losses, learnability, and shares of clean pairs and kinds.

        Raises:
            UserError: Bad options or data, or a model that does not fit. Nothing half-written is left.
        """
        from modelwright.curation.jest.offline import select_offline
        from modelwright.curation.jest.reference import cache_reference_embeddings, check_parquet
        from modelwright.curation.jest.sampler import JointSampler
        from modelwright.errors import UserError
        from modelwright.files import check_output, write_json
        from modelwright.training.contrastive.encoders import load_pair_encoder
        from modelwright.training.contrastive.pairs import read_pairs

        check_parquet(self.output, self.force)
        if self.report is not None:
            check_output(self.report, self.force)
        if self.cache_only and not self.reference:
            raise UserError("--cache-only writes the reference's embeddings: give the model (--reference).")
        sampler = JointSampler(
            n_chunks=self.n_chunks,
            filter_ratio=self.filter_ratio,
            criterion=self.criterion,
            form="sigmoid" if self.form == "auto" else self.form,
            normalize=self.normalize,
            temperature=self.temperature,
        )
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}.")
        pairs = read_pairs(self.pool, query_field=self.query_field, key_field=self.key_field)
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "workers": self.workers,
            "force": self.force,
            "progress": progress,
        }
        if self.cache_only:
            reference = load_pair_encoder(str(self.reference), device=self.device)
            cached = cache_reference_embeddings(pairs, reference, output=self.output, **common)
            result: dict[str, Any] = {"output": str(self.output), "pairs": len(cached), "reference": self.reference}
        else:
            result = select_offline(
                pairs,
                self.output,
                sampler,
                learner=self.model,
                reference=self.reference,
                super_batch=self.super_batch,
                form="auto" if self.form == "auto" else None,
                seed=self.seed,
                device=self.device,
                group_field=self.group_field,
                target_groups=self.target_group,
                **common,
            )
            result |= {"criterion": self.criterion, "n_chunks": self.n_chunks, "filter_ratio": self.filter_ratio}
        if self.report is not None:
            from modelwright.provenance import machine, versions

            write_json(self.report, result | {"versions": versions(), "machine": machine()}, self.force)
        return result
