"""`modelwright speculate analyse`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress


@dataclass(kw_only=True)
class SpeculateAnalyse:
    """See what each way of verifying drafts would keep on your prompts, beside the best that any could; writes JSON."""

    target: Annotated[str, Arg("The model that is to be sped up: a folder or a hub id.", kind="input")]
    draft: Annotated[str, Arg("A smaller model with the same tokenizer: a folder or a hub id.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="speculate.json")]
    prompts: Annotated[
        list[str], Arg("Files with prompts: JSONL and others; text, one prompt a file.", kind="input")
    ] = field(default_factory=list)
    prompt: Annotated[list[str], Arg("A prompt, as it stands; may be given several times.", short="-p")] = field(
        default_factory=list
    )
    prompt_field: Annotated[str, Arg("Field that holds the prompt.")] = "prompt"
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the target's folder has none.", kind="input")] = None
    limit: Annotated[int | None, Arg("Use only this many prompts of the files.")] = None
    num_drafts: Annotated[list[int], Arg("A number of drafts to look at; may be given several times.")] = field(
        default_factory=lambda: [1, 2, 4, 8]
    )
    max_new_tokens: Annotated[int, Arg("Tokens that the target goes on with, at most, per prompt.")] = 64
    temperature: Annotated[float, Arg("0: the most probable token; else draw.")] = 1.0
    top_k: Annotated[int, Arg("Draw among this many most probable tokens; 0: all.")] = 0
    top_p: Annotated[float, Arg("Draw among the most probable tokens that have this probability together.")] = 1.0
    min_p: Annotated[float, Arg("Drop tokens below this fraction of the most probable one.")] = 0.0
    repetition_penalty: Annotated[float, Arg("Above 1: tokens seen before are less probable.")] = 1.0
    draft_temperature: Annotated[float, Arg("Flattens the draft law, on top of the temperature.")] = 1.0
    lp_size: Annotated[int, Arg("Of the verifier is: tokens whose pairs are variables of the linear program.")] = 5
    alphabet_size: Annotated[int | None, Arg("Of the verifier is: likely tokens that go before all others.")] = 40
    order: Annotated[str, Arg("Of the verifier is: difference (the paper's) or ratio.")] = "difference"
    measure: Annotated[bool, Arg("Also generate with every verifier, and time it.")] = False
    draft_length: Annotated[int, Arg("Tokens a draft, with --measure.")] = 4
    pad_vocabulary: Annotated[bool, Arg("Allow tables of another size for the same tokenizer.")] = False
    seed: Annotated[int, Arg("Seed of the draws.")] = 0
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the models.")] = False
    force: Annotated[bool, Arg("Replace an existing output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Analyses; returns prompts, tokens, and the best verifier's acceptance beside the optimum."""
        import dataclasses
        import itertools

        from modelwright.data.records import Records
        from modelwright.decoding.companion import load_companion
        from modelwright.decoding.generate import Sampling
        from modelwright.decoding.multi_draft.analyse import analyse, measure
        from modelwright.decoding.multi_draft.drafts import vocabulary_size
        from modelwright.errors import UserError
        from modelwright.files import check_output, write_json
        from modelwright.models.loading import load_model, load_tokenizer
        from modelwright.provenance import machine, versions

        check_output(self.output, self.force)
        if not self.prompts and not self.prompt:
            raise UserError("There are no prompts: give --prompt TEXT or --prompts FILE.")
        names = [f.name for f in dataclasses.fields(Sampling) if f.name != "stop"]
        sampling = Sampling(**{name: getattr(self, name) for name in names})
        sampling.check()
        check_limit(self.limit)
        if self.draft_length < 1:
            raise UserError(f"Drafts need at least 1 token, not {self.draft_length} (--draft-length).")
        records = Records(self.prompts, self.prompt_field, field_option="prompt_field") if self.prompts else ()
        prompts = [*self.prompt, *itertools.islice((record.text for record in records), self.limit)]
        loading: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        tokenizer = load_tokenizer(self.tokenizer or self.target, trust_remote_code=self.trust_remote_code)
        target = load_model(self.target, device=self.device, **loading)
        draft = load_companion(self.draft, target, tokenizer, **loading)
        own, wanted = vocabulary_size(draft), vocabulary_size(target)
        if own != wanted and not self.pad_vocabulary:
            raise UserError(
                f"The draft model has {own} tokens and the target {wanted}: they must share a tokenizer. If they do "
                f"and only their tables were padded differently, give --pad-vocabulary."
            )
        common: dict[str, Any] = {
            "sampling": sampling, "num_drafts": self.num_drafts, "draft_temperature": self.draft_temperature,
            "lp_size": self.lp_size, "alphabet_size": self.alphabet_size, "order": self.order,
        }  # fmt: skip
        progress.start("analyse", len(prompts))
        found = analyse(target, draft, tokenizer, prompts, **common, progress=progress)
        for line in _lines(found["table"]):
            progress.message(line)
        if self.measure:
            progress.start("measure")
            found["measured"] = measure(
                target, draft, tokenizer, prompts, **common, draft_length=self.draft_length,
                pad_vocabulary=self.pad_vocabulary, progress=progress,
            )  # fmt: skip
            for row in found["measured"]:
                progress.message(
                    f"{row['drafts']} drafts, {row['verifier']}: {row['block_efficiency']:.2f} tokens a call, "
                    f"{row['tokens_per_second']:.1f} tokens/s"
                )
        settings = {**dataclasses.asdict(sampling), "draft_temperature": self.draft_temperature}
        settings |= {"lp_size": self.lp_size, "alphabet_size": self.alphabet_size, "order": self.order}
        settings |= {"target": self.target, "draft": self.draft, "draft_length": self.draft_length}
        whole = {**found, "settings": settings, "machine": machine(), "versions": versions()}
        write_json(self.output, whole, self.force)
        most = max(self.num_drafts)
        rows = {row["verifier"]: row for row in found["table"] if row["drafts"] == most}
        best = max((row for name, row in rows.items() if name != "optimum"), key=lambda row: row["acceptance"])
        return {
            "output": str(self.output),
            "prompts": found["prompts"],
            "tokens": found["tokens"],
            "drafts": most,
            "best_verifier": best["verifier"],
            "acceptance": best["acceptance"],
            "optimum": best["optimum"],
            "left": best["left"],
        }


def _lines(table: list[dict[str, Any]]) -> list[str]:
    """The acceptance of each verifier by number of drafts, as lines of text."""
    counts = list(dict.fromkeys(row["drafts"] for row in table))
    names = list(dict.fromkeys(row["verifier"] for row in table))
    value = {(row["drafts"], row["verifier"]): row["acceptance"] for row in table}
    lines = ["acceptance".ljust(12) + "".join(f"K = {k}".rjust(9) for k in counts)]
    return lines + [n.ljust(12) + "".join(f"{value[k, n]:9.3f}" for k in counts) for n in names]
