"""`modelwright edit hallucinations`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress
from modelwright.verbs import arguments


@dataclass(kw_only=True)
class EditHallucinations:
    """Find the facts that a model gets wrong, and write each as an item with the questions that test an edit of it."""

    model: arguments.Model
    questions: Annotated[
        list[str], Arg("Facts with question, answer and subject: JSONL, CSV, Parquet, folders.", kind="input")
    ]
    output: Annotated[
        Path, Arg("File for the items (CSV, JSONL, Parquet).", short="-o", kind="output", filename="items.csv")
    ]
    limit: Annotated[int | None, Arg("Ask only this many questions.")] = None
    skip_relations: Annotated[
        list[str],
        Arg("Relations to leave out, with commas between; vague stands for the benchmark's 31, none for none."),
    ] = field(default_factory=lambda: ["vague"])
    min_subject_popularity: Annotated[
        int, Arg("Leave out facts whose subject_popularity is lower; rows without one stay.")
    ] = 8
    min_object_popularity: Annotated[
        int, Arg("Leave out facts whose object_popularity is lower; rows without one stay.")
    ] = 5
    tokenizer: arguments.Tokenizer = None
    layout: arguments.Layout = "auto"
    new_tokens: arguments.NewTokens = 16
    protocol: Annotated[Literal["word", "paper"], Arg("Match whole words, or substrings as the paper.")] = "word"
    judge: arguments.Judge = None
    seed: Annotated[int, Arg("Decides choices and locality questions.")] = 0
    batch_size: Annotated[int, Arg("Questions at once.", kind="run")] = 16
    dtype: arguments.Dtype = "auto"
    device: arguments.Device = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Asks and writes; returns how many facts were asked, were left out, and are wrong."""
        from modelwright.data.write import check_format, write_rows
        from modelwright.errors import UserError
        from modelwright.evaluation.asking import layout_for
        from modelwright.evaluation.hallueditbench import find_hallucinations
        from modelwright.evaluation.hallueditbench.choice import choose_facts
        from modelwright.evaluation.hallueditbench.questions import general_item, read_facts
        from modelwright.files import check_output
        from modelwright.models.loading import load_model, load_tokenizer
        from modelwright.verbs.evaluate_hallueditbench import load_judge

        check_output(self.output, self.force)
        check_format(self.output)
        check_limit(self.limit)
        check_limit(self.batch_size, "--batch-size")
        given = read_facts(self.questions)
        chosen, left_out = choose_facts(
            given, without=self._skipped(), subject_popularity=self.min_subject_popularity,
            object_popularity=self.min_object_popularity,
        )  # fmt: skip
        facts = chosen[: self.limit]  # only now: a second answer may stand anywhere in the file
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        layout = layout_for(tokenizer, self.layout, self.new_tokens)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        judge = load_judge(self.judge, self.dtype, self.device)
        progress.start("questions", len(facts))
        wrong = find_hallucinations(
            model, tokenizer, [f.question for f in facts], [f.answer for f in facts], layout=layout,
            protocol=self.protocol, judge=judge, batch_size=self.batch_size, progress=progress,
        )  # fmt: skip
        if not wrong:
            raise UserError(f"The model answers all {len(facts)} questions rightly: there is nothing to edit.")
        items = [general_item(facts[h.index], h.output, facts, self.seed) for h in wrong]
        write_rows(self.output, (item.to_row() for item in items), self.force)
        return {
            "output": str(self.output),
            "questions": len(facts),
            "left_out": left_out,
            "wrong": len(wrong),
            "share_wrong": len(wrong) / len(facts),
            "examples": [
                {"question": h.question, "right": h.answer, "the model said": h.output} for h in wrong[:5]
            ],
        }  # fmt: skip

    def _skipped(self) -> set[str]:
        from modelwright.evaluation.hallueditbench.choice import VAGUE

        named = {name.strip() for text in self.skip_relations for name in text.split(",")} - {"", "none"}
        return (named - {"vague"}) | (VAGUE if "vague" in named else set())
