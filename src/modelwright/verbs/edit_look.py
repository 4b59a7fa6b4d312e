"""`modelwright edit statistics` and `edit trace`: what editors need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress
from modelwright.verbs import arguments


@dataclass(kw_only=True)
class EditStatistics:
    """Run text through a model and keep the covariance of its MLPs' keys, which ROME, MEMIT and PMET weigh edits by.

    A run that was stopped is continued by the same command. A layer takes 4 d_ff² bytes: 0.5 GB in Llama-2-7B.
    """

    model: arguments.Model
    data: Annotated[
        list[str], Arg("Text: JSONL, CSV, Parquet, text files, folders, hub ids. May be repeated.", kind="input")
    ]
    output: Annotated[
        Path, Arg("File to write (.safetensors).", short="-o", kind="output", filename="keys.safetensors")
    ]
    method: Annotated[str, Arg("Editor whose layers to look at, with its own defaults: rome, memit or pmet.")] = "memit"
    layers: Annotated[list[int], Arg("Layers to look at instead. May be repeated.")] = field(default_factory=list)
    tokens: Annotated[int, Arg("Tokens to see.")] = 1_000_000
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    window: Annotated[int | None, Arg("Longest input in tokens; the model's own, at most 2,048.")] = None
    batch_tokens: Annotated[int, Arg("Tokens at once.", kind="run")] = 4096
    tokenizer: arguments.Tokenizer = None
    dtype: arguments.Dtype = "auto"
    device: arguments.Device = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace the output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Collects and writes; returns layers, tokens, documents, tokens per second and the model's fingerprint.

        Raises:
            UserError: Bad options, text or model.
        """
        import time

        from modelwright.data import Records
        from modelwright.editing import KeyStatistics, make_editor
        from modelwright.editing.locate_and_edit import LocateAndEdit
        from modelwright.errors import UserError
        from modelwright.files import atomic_path, check_output
        from modelwright.models.loading import load_model, load_tokenizer
        from modelwright.models.roles import roles

        check_output(self.output, self.force)
        editor = None if self.layers else make_editor(self.method)
        if editor is not None and not isinstance(editor, LocateAndEdit):
            raise UserError(f"{self.method} needs no key statistics: give rome, memit or pmet, or --layers.")
        records = Records(self.data, self.text_field)
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        layers = self.layers or (editor.layers_of(len(roles(model).layers)) if editor else [])
        unfinished = self.output.with_name(f".{self.output.name}.unfinished")
        if self.force:
            unfinished.unlink(missing_ok=True)
        started = time.perf_counter()
        found = KeyStatistics.collect(
            model, tokenizer, records, layers, n_tokens=self.tokens, window=self.window,
            batch_tokens=self.batch_tokens, path=unfinished, progress=progress,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        with atomic_path(self.output, self.force) as partial:
            unfinished.replace(partial)
        return {
            "output": str(self.output),
            "layers": list(found.grams),
            "layers_collected": len(found.grams),
            "tokens": found.count,
            "documents": found.documents,
            "tokens_per_second": found.count / seconds,
            "fingerprint": found.fingerprint,
        }


@dataclass(kw_only=True)
class EditTrace:
    """Find where a model recalls facts, by causal tracing: in which layer, at the subject's end or the prompt's.

    Facts whose answer the model does not give are left out; without old_answer (or attribute, target_true) in the
    files, what the model says counts as the answer. Use what it recommends as --set layer=… --set fact_token=….
    """

    model: arguments.Model
    requests: Annotated[
        list[str], Arg("Files of facts with prompt and subject, such as known_1000. May be repeated.", kind="input")
    ]
    output: Annotated[
        Path | None, Arg("JSON file for all effects.", short="-o", kind="output", filename="trace.json")
    ] = None
    limit: Annotated[int | None, Arg("Use only this many of the facts.")] = 100
    noise: Annotated[float, Arg("Noise, in standard deviations of the subjects' embeddings.")] = 3.0
    samples: Annotated[int, Arg("Draws of the noise a fact.")] = 10
    window: Annotated[int | None, Arg("Neighbouring layers put back together; a fifth of all.")] = None
    seed: Annotated[int, Arg("Seed of the noise.")] = 0
    batch_size: Annotated[int, Arg("Rows at once.", kind="run")] = 64
    tokenizer: arguments.Tokenizer = None
    dtype: arguments.Dtype = "auto"
    device: arguments.Device = "auto"
    trust_remote_code: arguments.TrustRemoteCode = False
    force: Annotated[bool, Arg("Replace the output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Traces; returns effects by kind and place, and the recommended layer and token.

        Raises:
            UserError: Bad options, facts or model.
        """
        import dataclasses

        from modelwright.editing import read_requests
        from modelwright.editing.trace import causal_trace
        from modelwright.files import check_output, write_json
        from modelwright.models.loading import load_model, load_tokenizer

        if self.output is not None:
            check_output(self.output, self.force)
        requests = read_requests(self.requests, limit=self.limit, known=True)
        tokenizer = load_tokenizer(self.tokenizer or self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        progress.start(f"Trace {len(requests)} facts", total=len(requests))
        trace = causal_trace(
            model, tokenizer, requests, noise=self.noise, samples=self.samples, window=self.window, seed=self.seed,
            batch_size=self.batch_size, progress=progress,
        )  # fmt: skip
        found = dataclasses.asdict(trace)
        result = {**{k: found[k] for k in ("facts", "skipped", "clean", "blurred")}, "recommended": trace.recommended()}
        if self.output is not None:
            write_json(self.output, {**result, "effects": found["effects"]}, self.force)
        return {**result, "effects": found["effects"]}

    def show(self, result: dict[str, Any]) -> None:
        """Prints the effects of MLPs as a table, and what they recommend."""
        import sys

        write = sys.stdout.write
        write(
            f"{result['facts']} facts ({result['skipped']} that the model does not say are left out): probability of "
            f"the answer {result['clean']:.3f}, with a blurred subject {result['blurred']:.3f}\n"
        )
        write("What comes back when one place is put back as it was:\n")
        for kind, places in result["effects"].items():
            for place, effects in places.items():
                if effects is not None:
                    numbers = " ".join(f"{effect:6.3f}" for effect in effects)
                    write(f"  {kind:<9} {place.replace('_', ' '):<12} {numbers}\n")
        best = result["recommended"]
        write(f"Try --set layer={best['layer']} --set fact_token={best['fact_token']}\n")
