"""What `modelwright generate` does: prompts in, rows out as they come, continued where it was cut short."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.data.write import check_format, write_rows
from modelwright.decoding.generate import (
    Completion,
    Prompt,
    Sampling,
    chat_prompt,
    check_prompt,
    encode_prompt,
    generate,
)
from modelwright.decoding.parts import Applied, Parts
from modelwright.errors import UserError
from modelwright.files import atomic_path, check_output
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: A prompt, the row it comes from, and where that stands.
Source = tuple[str, Mapping[str, Any], str]


@dataclass(frozen=True)
class Layout:
    """How a prompt is made of a row's text.

    Attributes:
        chat: Whether it is laid out by the chat template.
        system: System message of the chat.
        context_field: Field whose text is taken out of the prompt for methods that look at it without its context.
    """

    chat: bool = False
    system: str | None = None
    context_field: str = "context"

    def lay_out(self, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """Returns a text as the model is to read it."""
        return chat_prompt(tokenizer, text, self.system) if self.chat else text

    def without_context(self, text: str, row: Mapping[str, Any], where: str) -> str:
        """Returns a prompt without its context: the row's ``prompt_without_context``, or with the context taken out.

        Raises:
            UserError: The row has no context, or it does not stand in the prompt.
        """
        if isinstance(given := row.get("prompt_without_context"), str):
            return given
        context = row.get(self.context_field)
        if not isinstance(context, str) or not context.strip():
            raise UserError(
                f"{where} has no text in the field '{self.context_field}', which the method needs to know what to "
                f"leave out of the prompt: name the field with --context-field."
            )
        if context.strip() not in text:
            raise UserError(
                f"{where}: the text of the field '{self.context_field}' does not stand in the prompt, so it cannot be "
                f"left out of it."
            )
        return text.replace(context.strip(), "").strip()


def generate_to_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Source],
    output: str | Path,
    sampling: Sampling,
    *,
    plan: Mapping[str, Any],
    parts: Parts | None = None,
    compare: Callable[[dict[str, Any], Callable[[], Iterator[dict[str, Any]]]], None] | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    samples: int = 1,
    batch_size: int = 8,
    layout: Layout | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Completes prompts and writes a row for each completion: the prompt's row and prompt, completion, tokens, finish.

    Rows go to ``<output>.partial.jsonl`` as they come; the output appears when all are there. The same call after a
    crash goes on with the first prompt that is not there. Every prompt is looked at before the first is completed.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        rows: Prompts with the rows they come from; read more than once.
        output: File to write: JSONL, Parquet or CSV.
        sampling: How tokens are chosen.
        plan: Everything the result depends on; an unfinished file of another plan is not continued.
        parts: Decoding methods.
        compare: If given, the prompts are completed without the methods too, with the same random streams; each row
            then also has ``plain``, ``plain_tokens`` and ``first_difference`` (the first token that differs, from 0, or
            None). It is called with the summary and the rows, before the output appears.
        keep: Called with every row before the output appears.
        samples: Completions per prompt.
        batch_size: Prompts at once.
        layout: How prompts are made.
        force: Whether to replace ``output``, and to discard an unfinished file of another plan.
        progress: Counts prompts.

    Raises:
        UserError: See :func:`~modelwright.decoding.generate.generate`; or files are in the way, or the methods do not
            go with the model.
    """
    output, progress, layout, parts = Path(output), progress or Silent(), layout or Layout(), parts or Parts()
    check_output(output, force)
    check_format(output)
    plain = Pass(output.with_name(output.name + ".plain.partial.jsonl"), "plain", Parts())
    own = Pass(output.with_name(output.name + ".partial.jsonl"), parts.name, parts)
    passes = [plain, own] if compare else [own]
    for one in passes:
        one.open({**plan, "plain": True} if one is plain else dict(plan), samples, force)
    work = _Work(model, tokenizer, rows, sampling, samples, batch_size, layout, progress)
    stats: dict[str, Any] = {}
    try:
        with parts.on(model, tokenizer, prompts=True) as applied:  # refuses what it refuses before the plain pass too
            work.check(applied)
        for one in passes:
            with one.parts.on(model, tokenizer, prompts=True) as applied:
                one.run(work, applied)
                stats = _stats(applied)
    except (UserError, OSError):
        for one in passes:
            one.forget_if_empty()
        raise
    finished = _Finished(own, plain if compare else None)
    summary = finished.summary(samples)
    summary = {"output": str(output), **({"method": parts.name} if parts.all else {}), **summary, **stats}
    if compare:
        compare(summary, finished.rows)
    if keep:
        for row in finished.rows():
            keep(row)
    write_rows(output, finished.rows(), force)
    for one in passes:
        one.path.unlink()
    return summary


@dataclass(frozen=True)
class _Work:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Iterable[Source]
    sampling: Sampling
    samples: int
    batch_size: int
    layout: Layout
    progress: Progress

    def check(self, applied: Applied) -> None:
        """Looks at every prompt, so that a long one at the end of the file does not stop a run in its middle."""
        for number, (text, row, where) in enumerate(self.rows, start=1):
            name = f"Prompt {number} ({where})" if where else f"Prompt {number}"
            laid_out = self.layout.lay_out(self.tokenizer, applied.prompt(text))
            ids = encode_prompt(self.tokenizer, laid_out, not self.layout.chat)
            check_prompt(self.model, ids, self.sampling, name)
            if applied.needs_context:
                without = applied.prompt(self.layout.without_context(text, row, name))
                without = self.layout.lay_out(self.tokenizer, without)
                ids = encode_prompt(self.tokenizer, without, not self.layout.chat)
                check_prompt(self.model, ids, self.sampling, f"{name} without its context")

    def prompt(self, applied: Applied, source: Source) -> str | Prompt:
        text, row, where = source
        laid_out = self.layout.lay_out(self.tokenizer, applied.prompt(text))
        if not applied.needs_context:
            return laid_out
        without = applied.prompt(self.layout.without_context(text, row, where))
        return Prompt(laid_out, self.layout.lay_out(self.tokenizer, without))


class Pass:
    """All prompts once, by one way of decoding, in a file of its own whose first line is the plan."""

    def __init__(self, path: Path, label: str, parts: Parts) -> None:
        self.path, self.label, self.parts, self.done = path, label, parts, 0

    def open(self, plan: Mapping[str, Any], samples: int, force: bool) -> None:
        """Prepares the file, and counts what is in it already."""
        header = json.dumps({"plan": plan}, default=str) + "\n"
        old = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        # Not splitlines: a completion may hold U+2028 or U+0085, which JSON leaves as they are. The last may be torn.
        lines = [line + "\n" for line in old.split("\n")[:-1]]
        if len(lines) > 1 and lines[0] != header and not force:
            raise UserError(
                f"{self.path} holds an unfinished run with other options: repeat that command to finish it, or give "
                f"--force."
            )
        whole = lines[1:] if lines and lines[0] == header else []
        self.done = len(whole) // samples
        with atomic_path(self.path, force=True) as new:
            new.write_text(header + "".join(whole[: self.done * samples]), encoding="utf-8")

    def run(self, work: _Work, applied: Applied) -> None:
        """Completes what is missing."""
        progress = work.progress
        progress.start("generate" if self.label == "plain" else f"generate: {self.label}")
        if self.done:
            progress.message(f"{self.done} prompts were done before.")
            progress.advance(self.done)
        kept: list[Source] = []

        def prompts() -> Iterator[str | Prompt]:
            for source in islice(work.rows, self.done, None):
                kept.append(source)
                yield work.prompt(applied, source)

        tokens, began = 0, time.perf_counter()
        last = began
        with self.path.open("a", encoding="utf-8") as stream:
            found = generate(
                work.model, work.tokenizer, prompts(), work.sampling, samples=work.samples, batch_size=work.batch_size,
                special_tokens=not work.layout.chat, start=self.done, generate_with=applied.generate,
            )  # fmt: skip
            for completions in found:
                now = time.perf_counter()
                prompt, row, _ = kept.pop(0)
                for number, completion in enumerate(completions):
                    seconds = now - last if number == 0 else 0.0
                    stream.write(_line(row, prompt, completion, number, work.samples, seconds))
                stream.flush()
                last = now
                tokens += sum(c.tokens for c in completions)
                self.done += 1
                progress.advance(1, f"{tokens / (now - began):.0f} tokens/s")

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields what was kept of each completion: row, ids and seconds."""
        with self.path.open(encoding="utf-8") as stream:
            next(stream)
            for line in stream:
                yield json.loads(line)

    def forget_if_empty(self) -> None:
        """Removes the file if there is nothing in it to continue, so that it does not stand in anybody's way."""
        if not self.done:
            self.path.unlink(missing_ok=True)


class _Finished:
    """What the passes left: rows and their sums."""

    def __init__(self, own: Pass, plain: Pass | None) -> None:
        self.own, self.plain = own, plain

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of the output."""
        if self.plain is None:
            yield from (line["row"] for line in self.own.lines())
            return
        for ours, theirs in zip(self.own.lines(), self.plain.lines(), strict=True):
            extra = {"plain": theirs["row"]["completion"], "plain_tokens": theirs["row"]["tokens"]}
            yield {**ours["row"], **extra, "first_difference": first_difference(ours["ids"], theirs["ids"])}

    def summary(self, samples: int) -> dict[str, Any]:
        """Returns counts, rates and examples."""
        found: dict[str, Any] = {"completions": 0, "generated_tokens": 0, "finish": {}, "examples": []}
        seconds = 0.0
        for line in self.own.lines():
            row = line["row"]
            seconds += line["seconds"]
            found["completions"] += 1
            found["generated_tokens"] += row["tokens"]
            found["finish"][row["finish"]] = found["finish"].get(row["finish"], 0) + 1
            if len(found["examples"]) < 3:
                found["examples"].append({"prompt": row["prompt"], "completion": row["completion"][:500]})
        found = {"prompts": found["completions"] // samples, **found}
        found["tokens_per_second"] = _rate(found["generated_tokens"], seconds)
        if self.plain is not None:
            tokens, seconds = 0, 0.0
            for line in self.plain.lines():
                tokens += line["row"]["tokens"]
                seconds += line["seconds"]
            found["plain_tokens_per_second"] = _rate(tokens, seconds)
            differ = [row["first_difference"] for row in self.rows() if row["first_difference"] is not None]
            found["completions_that_differ"] = len(differ)
            found["mean_first_difference"] = sum(differ) / len(differ) if differ else None
        return found


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Returns the place of the first token that differs, from 0, or None where both are the same."""
    for at, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return at
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 1) if tokens and seconds else None


def _stats(applied: Applied) -> dict[str, Any]:
    """What a decoder counted, as far as they are plain numbers and rates of this session, and what a cache weighed."""
    stats: Any = getattr(applied.decoder, "stats", None)
    found = stats.as_dict() if hasattr(stats, "as_dict") else {}
    counted: dict[str, Any] = {name: value for name, value in found.items() if isinstance(value, float)}
    if applied.memory:
        counted["cache_memory"] = [asdict(level) for level in applied.memory]
    return counted


def _line(
    row: Mapping[str, Any], prompt: str, completion: Completion, number: int, samples: int, seconds: float
) -> str:
    value = {**row, "prompt": prompt, "completion": completion.text, "tokens": completion.tokens}
    value["finish"] = completion.finish
    if samples > 1:
        value["sample"] = number
    kept = {"row": value, "ids": completion.ids, "seconds": seconds}
    return json.dumps(kept, ensure_ascii=False, default=str) + "\n"
