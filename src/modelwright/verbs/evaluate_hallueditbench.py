"""`modelwright evaluate hallueditbench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress
from modelwright.verbs import arguments


@dataclass(kw_only=True)
class HalluEditBench:
    """Edit what a model has wrong, one fact at a time, and score each editor in five dimensions.

    Answers are kept beside the output as they come; the same command continues a run that was stopped. With --published
    it scores the answers that the benchmark's authors published instead, and needs no model.
    """

    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="hallueditbench.json")]
    model: Annotated[str | None, Arg("Model: a folder or a hub id.", kind="input")] = None
    items: Annotated[
        list[str], Arg("Items: the published CSV files, or those of `edit hallucinations`.", kind="input")
    ] = field(default_factory=list)
    methods: Annotated[list[str], Arg("Editors, with commas between; all is the paper's seven.")] = field(
        default_factory=lambda: ["all"]
    )
    published: Annotated[Path | None, Arg("Folder 'results' of the benchmark's repository.", kind="input")] = None
    report: Annotated[Path | None, Arg("HTML page to write.", kind="output", filename="hallueditbench.html")] = None
    statistics: arguments.Statistics = None
    per_topic: Annotated[int | None, Arg("Use only this many items of each topic.")] = None
    turns: Annotated[int, Arg("Turns of the robustness test; 10 in the paper.")] = 0
    sure: Annotated[bool, Arg("With turns: also ask, in a third dialogue, whether the model is sure.")] = False
    protocol: Annotated[
        Literal["word", "paper"], Arg("Whole words and one way of asking for all; or as in the published runs.")
    ] = "word"
    judge: arguments.Judge = None
    layout: arguments.Layout = "auto"
    new_tokens: arguments.NewTokens = 16
    options: arguments.EditorOptions = field(default_factory=dict)
    tokenizer: arguments.Tokenizer = None
    batch_size: Annotated[int, Arg("Questions at once.", kind="run")] = 16
    fit_batch: Annotated[int, Arg("Edits that are fitted together; each is alone on the model.", kind="run")] = 16
    dtype: arguments.Dtype = "auto"
    device: arguments.Device = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace existing outputs.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Edits and scores; returns the five dimensions of each method and which to use."""
        from modelwright.errors import UserError
        from modelwright.files import check_output

        check_output(self.output, self.force)
        if self.report is not None:
            check_output(self.report, self.force)
        if self.published is not None:
            return self._published(progress)
        if self.model is None or not self.items:
            raise UserError("Give --model and --items; or --published to score the published answers.")
        check_limit(self.per_topic, "--per-topic")
        if self.sure and not self.turns:
            raise UserError("--sure asks at the turns of the robustness test: give --turns too.")
        return self._measured(progress)

    def _measured(self, progress: Progress) -> dict[str, Any]:
        from modelwright import provenance
        from modelwright.editing.named_statistics import NamedStatistics
        from modelwright.evaluation.asking import layout_for
        from modelwright.evaluation.editors import describe, editors_by_name, writes_prompt
        from modelwright.evaluation.hallueditbench import SingleEditing, read_items
        from modelwright.evaluation.hallueditbench.items import unique
        from modelwright.models.loading import describe as describe_model
        from modelwright.models.loading import load_model, load_tokenizer

        assert self.model is not None
        items = unique(read_items(self.items, per_topic=self.per_topic))
        editors = editors_by_name(self.methods, self.options)
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        layout = layout_for(tokenizer, self.layout, self.new_tokens)
        statistics = NamedStatistics(self.statistics, editors.values(), self.output)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        judge = load_judge(self.judge, self.dtype, self.device)
        loop = SingleEditing(
            editors=editors, layout=layout, protocol=self.protocol, judge=judge, turns=self.turns,
            sure=self.sure, batch_size=self.batch_size, fit_batch=self.fit_batch,
        )  # fmt: skip
        statistics.collect(model, tokenizer, progress=progress)
        kept = self.output.with_name(self.output.name + ".answers.jsonl")
        rows = loop.rows(model, tokenizer, items, kept=kept, force=self.force, progress=progress)
        settings = {
            "items": len(items), "protocol": self.protocol, "turns": self.turns, "sure": self.sure,
            "layout": layout.kind,
            "editors": {name: describe(editor) for name, editor in editors.items()},
        }  # fmt: skip
        about = {"name": self.model, **describe_model(model)}
        in_prompt = [name for name, editor in editors.items() if writes_prompt(editor)]
        found = {"model": about, "settings": settings, "software": provenance.versions()}
        return self._write(rows, self.model, in_prompt, found)

    def _published(self, progress: Progress) -> dict[str, Any]:
        from modelwright.evaluation.hallueditbench.published import published_models, published_rows
        from modelwright.evaluation.hallueditbench.scores import score
        from modelwright.files import write_json

        assert self.published is not None
        found: dict[str, Any] = {}
        models = [self.model] if self.model else published_models(self.published)
        progress.start("models", len(models))
        # Under the published rule the published verdicts stand; else the answers are matched anew.
        for model in models:
            rows = list(published_rows(self.published, model))
            scores = score(rows, None if self.protocol == "paper" else "word")
            found[model] = [s.to_dict() for s in scores]
            progress.advance(1, model)
        write_json(self.output, {"task": "hallueditbench", "published": found, "protocol": self.protocol}, self.force)
        return {
            "output": str(self.output),
            "scores": {
                f"{model}, {s['method']}": {k: s["parts"].get(k) for k in ("efficacy", "rephrase", "locality")}
                for model, scores in found.items()
                for s in scores
            },
        }

    def _write(
        self, rows: list[dict[str, Any]], model: str, in_prompt: list[str], about: dict[str, Any]
    ) -> dict[str, Any]:
        from modelwright.evaluation.hallueditbench.scores import DIMENSIONS, advice, score
        from modelwright.files import write_json
        from modelwright.report.editing import render_single

        scores = score(rows)
        said = advice(scores, in_prompt)
        result = {"task": "hallueditbench", "advice": said, "scores": [s.to_dict() for s in scores], **about}
        write_json(self.output, result, self.force)
        if self.report is not None:
            render_single(result, rows, self.report, title=f"Editing {Path(model).name}", force=self.force)
        return {
            "output": str(self.output),
            **({"report": str(self.report)} if self.report is not None else {}),
            "scores": {s.method: {n: v for n in DIMENSIONS if (v := getattr(s, n)) is not None} for s in scores},
            "advice": said,
        }


def load_judge(path: str | None, dtype: str, device: str) -> Any:
    """Loads the model that judges, or returns None where none is named."""
    if path is None:
        return None
    from modelwright.evaluation.matching import ModelJudge
    from modelwright.models.loading import load_model, load_tokenizer

    return ModelJudge(load_model(path, dtype=dtype, device=device), load_tokenizer(path))
