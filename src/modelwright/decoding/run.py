"""What `modelwright generate` does: prompts in, rows out as they come, continued where it was cut short."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.data.write import check_format, write_rows
from modelwright.decoding.generate import Completion, Sampling, chat_prompt, generate
from modelwright.errors import UserError
from modelwright.files import atomic_path, check_output
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_to_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    output: str | Path,
    sampling: Sampling,
    *,
    plan: Mapping[str, Any],
    samples: int = 1,
    batch_size: int = 8,
    chat: bool = False,
    system: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Completes prompts and writes a row for each completion: the prompt's row and prompt, completion, tokens, finish.

    Rows go to ``<output>.partial.jsonl`` as they come; the output appears when all are there. The same call after a
    crash goes on with the first prompt that is not there.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        rows: Prompts with the rows they come from.
        output: File to write: JSONL, Parquet or CSV.
        sampling: How tokens are chosen.
        plan: Everything the result depends on; an unfinished file of another plan is not continued.
        samples: Completions per prompt.
        batch_size: Prompts at once.
        chat: Whether to lay prompts out by the chat template.
        system: System message of the chat.
        force: Whether to replace ``output``, and to discard an unfinished file of another plan.
        progress: Counts prompts.

    Raises:
        UserError: See :func:`~modelwright.decoding.generate.generate`; or files are in the way.
    """
    output, progress = Path(output), progress or Silent()
    check_output(output, force)
    check_format(output)
    partial = output.with_name(output.name + ".partial.jsonl")
    done = _reopen(partial, dict(plan), samples, force)
    progress.start("generate")
    if done:
        progress.message(f"{done} prompts were done before.")
        progress.advance(done)
    kept: list[tuple[str, Mapping[str, Any]]] = []

    def prompts() -> Iterator[str]:
        for prompt, row in islice(rows, done, None):
            kept.append((prompt, row))
            yield chat_prompt(tokenizer, prompt, system) if chat else prompt

    tokens, began = 0, time.perf_counter()
    try:
        with partial.open("a", encoding="utf-8") as stream:
            found = generate(
                model, tokenizer, prompts(), sampling,
                samples=samples, batch_size=batch_size, special_tokens=not chat, start=done,
            )  # fmt: skip
            for completions in found:
                prompt, row = kept.pop(0)
                stream.write("".join(_line(row, prompt, c, i, samples) for i, c in enumerate(completions)))
                stream.flush()
                tokens += sum(c.tokens for c in completions)
                progress.advance(1, f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
    except (UserError, OSError):
        if not done and not tokens:  # nothing to continue, so nothing to stand in the mended command's way
            partial.unlink(missing_ok=True)
        raise
    seconds = time.perf_counter() - began
    counts: dict[str, Any] = {"completions": 0, "generated_tokens": 0, "finish": {}, "examples": []}
    write_rows(output, _counted(partial, counts), force)
    partial.unlink()
    return {
        "output": str(output),
        "prompts": counts["completions"] // samples,
        **counts,
        "tokens_per_second": round(tokens / seconds, 1) if tokens else None,
    }


def _line(row: Mapping[str, Any], prompt: str, completion: Completion, number: int, samples: int) -> str:
    value = {**row, "prompt": prompt, "completion": completion.text, "tokens": completion.tokens}
    value["finish"] = completion.finish
    if samples > 1:
        value["sample"] = number
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"


def _reopen(partial: Path, plan: dict[str, Any], samples: int, force: bool) -> int:
    """Prepares the partial file, whose first line is the plan; returns how many prompts are in it already."""
    header = json.dumps({"plan": plan}, default=str) + "\n"
    lines = partial.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if partial.exists() else []
    if len(lines) > 1 and lines[0] != header and not force:
        raise UserError(
            f"{partial} holds an unfinished run with other options: repeat that command to finish it, or give --force."
        )
    whole = [line for line in lines[1:] if line.endswith("\n")] if lines and lines[0] == header else []
    done = len(whole) // samples
    with atomic_path(partial, force=True) as new:
        new.write_text(header + "".join(whole[: done * samples]), encoding="utf-8")
    return done


def _counted(partial: Path, counts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with partial.open(encoding="utf-8") as stream:
        next(stream)
        for line in stream:
            row = json.loads(line)
            counts["completions"] += 1
            counts["generated_tokens"] += row["tokens"]
            counts["finish"][row["finish"]] = counts["finish"].get(row["finish"], 0) + 1
            if len(counts["examples"]) < 3:
                counts["examples"].append({"prompt": row["prompt"], "completion": row["completion"][:500]})
            yield row
