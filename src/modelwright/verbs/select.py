"""`modelwright select`: choose training data from a pool by a published method."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Select:
    """Choose documents from a pool that look like a target, and write them with their score and rank.

    Say how much to keep by --top, --token-budget, --byte-budget or --threshold. A pool may be larger than memory. A run
    that was stopped is continued by the same command.
    """

    method: Annotated[str, Arg("Method of selection, such as zip-fit, dsir, tfidf or random.", positional=True)]
    pool: Annotated[
        list[str],
        Arg(
            "Where to choose from: JSONL, JSON, CSV, Parquet or text files, folders, patterns, hub ids "
            "(org/name[:config][@split]), or - for standard input. May be repeated.",
            kind="input",
        ),
    ]
    target: Annotated[
        list[str], Arg("Examples of what is wanted, in any of the same forms. May be repeated.", kind="input")
    ] = field(default_factory=list)
    output: Annotated[
        Path,
        Arg(
            "File for the chosen rows (.jsonl, .json, .csv, .parquet).",
            short="-o",
            kind="output",
            filename="chosen.jsonl",
        ),
    ] = Path("chosen.jsonl")
    top: Annotated[int | None, Arg("Documents to keep.")] = None
    token_budget: Annotated[int | None, Arg("Tokens to keep: documents by rank while they fit.")] = None
    byte_budget: Annotated[int | None, Arg("Bytes (UTF-8) to keep: documents by rank while they fit.")] = None
    threshold: Annotated[float | None, Arg("Keep documents with a score above this.")] = None
    tokenizer: Annotated[str | None, Arg("Folder or hub id of the tokenizer that counts the tokens.", kind="input")] = (
        None
    )
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    target_field: Annotated[str | None, Arg("Field that holds the target's text, if it is another.")] = None
    order: Annotated[Literal["rank", "pool"], Arg("Order of the rows: best first, or as in the pool.")] = "rank"
    dedup: Annotated[bool, Arg("Keep one of documents that differ only in case, white space and punctuation.")] = False
    length_buckets: Annotated[
        int, Arg("Rank documents within this many groups by length, against a score that favours a length.")
    ] = 1
    heldout: Annotated[
        list[str], Arg("Held-out documents: reports which chosen ones share text with them.", kind="input")
    ] = field(default_factory=list)
    heldout_field: Annotated[str | None, Arg("Field that holds the held-out text, if it is another.")] = None
    ngram: Annotated[int, Arg("Words in a row that count as shared text.")] = 13
    drop_contaminated: Annotated[bool, Arg("Drop documents that share text with a held-out one.")] = False
    group_field: Annotated[str | None, Arg("Field that names a document's kind: reports what was chosen by kind.")] = (
        None
    )
    target_group: Annotated[list[str], Arg("Kind that is wanted: reports precision and recall. May be repeated.")] = (
        field(default_factory=list)
    )
    scores: Annotated[Path | None, Arg("Also write the score of every document to this file.")] = None
    report: Annotated[Path | None, Arg("Also write the numbers to this JSON file.")] = None
    encoding_errors: Annotated[
        Literal["strict", "replace"], Arg("What to do with bytes that are not UTF-8: refuse or replace.")
    ] = "strict"
    seed: Annotated[int, Arg("Seed, for methods that draw.")] = 0
    workers: Annotated[int, Arg("Processes to use; 0 takes all cores.", kind="run")] = 1
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False
    options: Annotated[dict[str, Any], Arg("The method's own options (see modelwright show METHOD).")] = field(
        default_factory=dict
    )

    def run(self, progress: Progress) -> dict[str, Any]:
        """Chooses and writes; returns counts, score quantiles, length correlation and composition.

        Raises:
            UserError: Bad options or data. Nothing half-written is left.
        """
        import dataclasses

        from modelwright.curation.choose import Rule
        from modelwright.curation.overlap import HeldOut
        from modelwright.curation.selector import make_selector
        from modelwright.curation.stream import Outputs, select_records
        from modelwright.data import Records
        from modelwright.errors import UserError
        from modelwright.files import check_output, write_json

        selector = self._selector(make_selector)
        if self.pool.count("-") + self.target.count("-") + self.heldout.count("-") > 1:
            raise UserError("Standard input ('-') can be read for one option only: give the others as files.")
        if self.target_group and not self.group_field:
            raise UserError("--target-group needs --group-field: say which field names a document's kind.")
        if self.ngram < 1:
            raise UserError(f"--ngram must be at least 1, not {self.ngram}.")
        rule = Rule(
            top=self.top,
            threshold=self.threshold,
            token_budget=self.token_budget,
            byte_budget=self.byte_budget,
            length_buckets=self.length_buckets,
            dedup=self.dedup,
        )
        outputs = Outputs(chosen=self.output, order=self.order, scores=self.scores, force=self.force)
        if self.report is not None:
            check_output(self.report, self.force)
        records = Records(self.pool, self.text_field, self.encoding_errors)
        outputs.check(records)
        heldout = None
        if self.heldout:
            heldout = HeldOut(n=self.ngram).add(
                Records(
                    self.heldout,
                    self.heldout_field or self.text_field,
                    self.encoding_errors,
                    field_option="heldout_field",
                ).texts()
            )
        result: dict[str, Any] = {
            "method": self.method,
            "output": str(self.output),
            "options": {f.name: getattr(selector, f.name) for f in dataclasses.fields(selector) if f.init},
        }
        target = self._target(selector, progress)
        result["target_documents"] = len(target)
        result |= select_records(
            selector,
            records,
            target,
            rule,
            outputs,
            tokenizer=self.tokenizer,
            group_field=self.group_field,
            target_groups=self.target_group,
            heldout=heldout,
            drop_contaminated=self.drop_contaminated,
            workers=self._workers(),
            progress=progress,
        )
        result["details"] = selector.details()
        if self.report is not None:
            from modelwright.provenance import machine, versions

            write_json(self.report, result | {"versions": versions(), "machine": machine()}, self.force)
        return result

    def _selector(self, make_selector: Any) -> Any:
        from modelwright.catalog import load
        from modelwright.errors import UserError

        options = dict(self.options)
        cls = load("selectors", self.method)
        if "seed" in getattr(cls, "__dataclass_fields__", {}):
            options.setdefault("seed", self.seed)
        if cls.needs_target and not self.target:
            raise UserError(f"{self.method} needs examples of what is wanted: give them (--target).")
        return make_selector(self.method, options)

    def _target(self, selector: Any, progress: Progress) -> list[str]:
        from modelwright.data import read_texts
        from modelwright.errors import UserError

        if not self.target:
            return []
        texts = read_texts(
            self.target,
            self.target_field or self.text_field,
            encoding_errors=self.encoding_errors,
            columns=(),
            field_option="target_field",
        )
        kept = [text for text in texts if text and not text.isspace()]
        if not kept:
            raise UserError(f"All {len(texts)} target documents are blank: give examples with text.")
        if len(kept) < len(texts):
            progress.message(f"{len(texts) - len(kept)} blank target documents are left out.")
        return kept

    def _workers(self) -> int:
        import os

        from modelwright.errors import UserError

        if self.workers < 0:
            raise UserError(f"--workers must be 0 (all cores) or more, not {self.workers}.")
        return (
            self.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
        )
