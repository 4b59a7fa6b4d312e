"""`modelwright heads detect`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelwright.options import Arg
from modelwright.progress import Progress

if TYPE_CHECKING:
    from modelwright.decoding.decore.detection import Sample

#: Heads that are named in the summary.
_SHOWN = 20


@dataclass(kw_only=True)
class HeadsDetect:
    """Find the attention heads that copy from the context, by needles in haystacks. Interrupted, it goes on there."""

    model: Annotated[str, Arg("Model: a folder or a hub id.", kind="input")]
    output: Annotated[Path, Arg("JSON file to write.", short="-o", kind="output", filename="heads.json")]
    haystack: Annotated[
        list[str], Arg("Texts to hide needles in: text files, JSONL and others; by default generated.", kind="input")
    ] = field(default_factory=list)
    text_field: Annotated[str, Arg("Field of the haystack's rows that holds the text.")] = "text"
    needles: Annotated[
        list[str], Arg("Files of needles: rows with text, question and answer; by default generated.", kind="input")
    ] = field(default_factory=list)
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the model's folder has none.", kind="input")] = None
    max_length: Annotated[int, Arg("Longest prompt in tokens; less if the model has fewer positions.")] = 5000
    lengths: Annotated[int, Arg("Lengths of prompts, evenly up to the longest.")] = 20
    depths: Annotated[int, Arg("Depths, evenly from the beginning to the end.")] = 10
    count: Annotated[int, Arg("Needles, where they are generated.")] = 3
    new_tokens: Annotated[int, Arg("Tokens of an answer at most.")] = 50
    form: Annotated[
        Literal["set", "steps"], Arg("Score: share of the needle's tokens copied (the paper), or copying steps.")
    ] = "set"
    least_recall: Annotated[float, Arg("Keep answers with more than this share of the needle's words.")] = 0.5
    chat: Annotated[bool, Arg("Ask by the tokenizer's chat template.")] = False
    seed: Annotated[int, Arg("Seed of what is generated.")] = 0
    dtype: Annotated[str, Arg("auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measures; returns samples asked and kept, and the best heads with their scores."""
        import dataclasses
        import json

        import torch

        from modelwright.data.records import Records
        from modelwright.decoding.decore.detection import Needle, RetrievalHeadScorer
        from modelwright.errors import UserError
        from modelwright.files import check_output
        from modelwright.models.heads import fingerprint
        from modelwright.models.loading import load_model, load_tokenizer
        from modelwright.models.scoring import context_length
        from modelwright.worlds.copying import copying

        check_output(self.output, self.force)
        if min(self.lengths, self.depths, self.count, self.max_length) < 1:
            raise UserError("--lengths, --depths, --count and --max-length must be at least 1.")
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        world = copying(self.seed, needles=self.count, haystacks=self.count)
        haystacks = [row["text"] for row in world.haystacks]
        if self.haystack:
            haystacks = list(Records(self.haystack, self.text_field).texts())
        needles = [Needle(**row) for row in world.needles]
        if self.needles:
            needles = [_needle(record.row) for record in Records(self.needles, "text")]
        scorer = RetrievalHeadScorer(
            model, tokenizer, new_tokens=self.new_tokens, form=self.form, least_recall=self.least_recall, chat=self.chat
        )
        longest = context_length(model)
        top = self.max_length if longest is None else min(self.max_length, longest - self.new_tokens)
        lengths = sorted({max(1, round(top * (i + 1) / self.lengths)) for i in range(self.lengths)})
        # What is too short for the needles alone is left out, unless nothing else is there.
        least = max(scorer.least_length(needle) for needle in needles)
        lengths = [length for length in lengths if length >= least] or lengths
        probes = scorer.probes(haystacks, needles, lengths, self.depths)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plan = {k: v for k, v in values.items() if k not in ("output", "device", "force", "least_recall")}
        plan |= {"model": fingerprint(model), "probes": [hash_of(probe.ids) for probe in probes]}
        partial = self.output.with_name(self.output.name + ".partial.jsonl")
        samples = _reopen(partial, plan, self.force)
        progress.start("heads detect", len(probes))
        if samples:
            progress.message(f"{len(samples)} of {len(probes)} prompts were done before.")
            progress.advance(len(samples))
        kept = sum(s.recall > self.least_recall for s in samples)
        try:
            with partial.open("a", encoding="utf-8") as stream:
                for probe in probes[len(samples) :]:
                    sample = scorer.run(probe)
                    stream.write(json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n")
                    stream.flush()
                    samples.append(sample)
                    kept += sample.recall > self.least_recall
                    progress.advance(1, f"{kept} of {len(samples)} answers right")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Memory is full at a prompt of {len(probe.ids)} tokens: use a smaller --max-length, or bfloat16."
            ) from error
        except (UserError, OSError):
            if not samples:
                partial.unlink(missing_ok=True)
            raise
        settings = {
            "model": self.model, "lengths": lengths, "depths": self.depths, "needles": len(needles), "seed": self.seed,
            "haystack": self.haystack or "generated",
        }  # fmt: skip
        found = scorer.collect(samples, settings)
        found.save_json(self.output, self.force)
        partial.unlink()
        best = list(found.means().items())[:_SHOWN]
        for (layer, head), value in best:
            progress.message(f"layer {layer:3d}, head {head:3d}: {value:.3f}")
        every = list(found.means().values())
        return {
            "output": str(self.output),
            "prompts": len(samples),
            "kept": found.samples,
            "heads": len(every),
            "median_score": every[len(every) // 2],
            "heads_above_0.1": sum(value > 0.1 for value in every),
            "top": {f"{layer}-{head}": round(value, 4) for (layer, head), value in best},
        }


def hash_of(ids: list[int]) -> str:
    """Returns a short hash of tokens."""
    import hashlib

    return hashlib.sha256(repr(ids).encode()).hexdigest()[:12]


def _needle(row: Any) -> Any:
    from modelwright.decoding.decore.detection import Needle
    from modelwright.errors import UserError

    # The published needle files call them so.
    text, answer = row.get("text") or row.get("needle"), row.get("answer") or row.get("real_needle")
    if not isinstance(text, str) or not isinstance(row.get("question"), str):
        raise UserError(f"A needle needs text and question, and may have an answer: {str(row)[:80]} has not.")
    return Needle(text, row["question"], answer or "")


def _reopen(partial: Path, plan: dict[str, Any], force: bool) -> list[Sample]:
    """Prepares the partial file, whose first line is the plan; returns the samples that are in it already."""
    import json

    from modelwright.decoding.decore.detection import Sample
    from modelwright.errors import UserError
    from modelwright.files import atomic_path

    header = json.dumps({"plan": plan}, default=str) + "\n"
    text = partial.read_text(encoding="utf-8", errors="replace") if partial.exists() else ""
    # Not splitlines: a completion may hold U+2028 or U+0085, which JSON leaves as they are. The last may be torn.
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    if len(lines) > 1 and lines[0] != header and not force:
        raise UserError(
            f"{partial} holds an unfinished run with other options: repeat that command to finish it, or give --force."
        )
    whole = lines[1:] if lines and lines[0] == header else []
    with atomic_path(partial, force=True) as new:
        new.write_text(header + "".join(whole), encoding="utf-8")
    rows = [json.loads(line) for line in whole]
    return [Sample(tuple(r["cell"]), r["recall"], r["scores"], r["completion"]) for r in rows]
