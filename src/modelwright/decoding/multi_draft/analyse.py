"""What each verifier would keep of a draft model's tokens on a person's own prompts, beside the optimum."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelwright.decoding.generate import Sampling, generate
from modelwright.decoding.multi_draft.decoding import MultiDraftDecoding
from modelwright.decoding.multi_draft.drafts import vocabulary_size
from modelwright.decoding.multi_draft.laws import optimal_acceptance
from modelwright.decoding.multi_draft.verifiers import VERIFIERS, Verifier
from modelwright.errors import UserError
from modelwright.models.tokenizers import prefix_ids
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The linear program over a whole vocabulary is out of reach; its value is the optimum, which is in the table.
METHODS = tuple(method for method in VERIFIERS if method != "optimal")


def laws_along(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    ids: Tensor,
    start: int,
    sampling: Sampling,
    *,
    draft_temperature: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields draft law and target law of each token of a text from ``start`` on, float64 ``(V,)``.

    Args:
        target: The target.
        draft: The draft model; logits beyond the target's vocabulary are cut, missing ones get no probability.
        ids: Tokens, ``(n,)``.
        start: First token to be predicted, at least 1.
        sampling: Shapes both laws; a temperature of 0 makes the target's a point.
        draft_temperature: Flattens the draft law further.
    """
    from transformers import RepetitionPenaltyLogitsProcessor

    shape = sampling.warpers()
    if sampling.repetition_penalty != 1:
        shape.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    with torch.no_grad():
        size = vocabulary_size(target)
        q_logits = target(input_ids=ids[None]).logits[0, start - 1 : -1]
        p_logits = draft(input_ids=ids[None].to(draft.device)).logits[0, start - 1 : -1].to(q_logits.device)
        p_logits = p_logits[:, :size]
        p_logits = torch.nn.functional.pad(p_logits, (0, size - p_logits.shape[1]), value=-math.inf)
        for at, (p, q) in enumerate(zip(p_logits, q_logits, strict=True)):
            prefix = ids[None, : start + at]
            p, q = (shape(prefix, logits[None].float())[0].double() for logits in (p, q))
            if sampling.temperature == 0:
                point = torch.zeros_like(q)
                point[q.argmax()] = 1
                yield (p / draft_temperature).softmax(-1), point
            else:
                yield (p / draft_temperature).softmax(-1), q.softmax(-1)


def analyse(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    *,
    sampling: Sampling | None = None,
    num_drafts: Sequence[int] = (1, 2, 4, 8),
    draft_temperature: float = 1.0,
    lp_size: int = 5,
    alphabet_size: int | None = 40,
    order: str = "difference",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Lets the target continue prompts, and computes at each of its tokens what every verifier would have kept.

    These are expectations over drafts, computed from both laws, not counts of draws. At temperature 0 drafts begin with
    the draft model's most probable tokens, as in :class:`MultiDraftDecoding`: one is kept if it is the target's.

    Args:
        target: The target.
        draft: The draft model.
        tokenizer: The target's tokenizer.
        prompts: Prompts.
        sampling: How the target continues; 64 tokens at temperature 1 by default.
        num_drafts: Numbers of drafts to look at.
        draft_temperature: Flattens the draft law.
        lp_size: Of the verifier ``is``.
        alphabet_size: Of the verifier ``is``.
        order: Of the verifier ``is``.
        progress: Counts prompts.

    Returns:
        ``table``: a row for each number of drafts and verifier with its mean ``acceptance`` over tokens, the standard
        error over prompts, the ``optimum`` and what is ``left`` up to it; ``prompts`` and ``tokens``.

    Raises:
        UserError: There is no prompt, or an option is out of range.
    """
    sampling = sampling or Sampling(max_new_tokens=64, temperature=1.0)
    sampling.check()
    progress = progress or Silent()
    if not num_drafts or min(num_drafts) < 1:
        raise UserError(f"Numbers of drafts must be at least 1, not {list(num_drafts)}.")
    if not draft_temperature > 0:
        raise UserError(f"The draft temperature must be above 0, not {draft_temperature}.")
    verifiers = [
        Verifier(method=method, lp_size=lp_size, alphabet_size=alphabet_size, order=order) for method in METHODS
    ]
    # By number of drafts and verifier (the optimum is one too): per prompt, the sum over its tokens.
    sums: dict[tuple[int, str], list[float]] = {}
    lengths: list[int] = []
    for number, prompt in enumerate(prompts):
        ids, start = _continued(target, tokenizer, prompt, sampling, number)
        if len(ids) == start:
            continue
        for values in sums.values():
            values.append(0.0)
        lengths.append(len(ids) - start)
        for p, q in laws_along(target, draft, ids, start, sampling, draft_temperature=draft_temperature):
            for k in num_drafts:
                if sampling.temperature == 0:
                    # Where nothing is drawn, all verifiers are one.
                    found = {v.method: _listed(p, q, 1 if v.method == "single" else k) for v in verifiers}
                    found["optimum"] = _listed(p, q, k)
                else:
                    found = {v.method: v.prepare([p] * k, q).acceptance() for v in verifiers}
                    found["optimum"] = optimal_acceptance(p, q, k)
                for method, value in found.items():
                    sums.setdefault((k, method), [0.0])[-1] += value
        progress.advance()
    if not lengths:
        raise UserError("There is nothing to analyse: no prompt was given, or the target says nothing.")
    tokens = sum(lengths)
    table = []
    for k in num_drafts:
        optimum = sum(sums[k, "optimum"]) / tokens
        for method in (*METHODS, "optimum"):
            mean = sum(sums[k, method]) / tokens
            table.append(
                {
                    "drafts": k, "verifier": method, "acceptance": mean,
                    "standard_error": _error(sums[k, method], lengths, mean), "optimum": optimum,
                    "left": max(0.0, optimum - mean),
                }
            )  # fmt: skip
    return {"table": table, "prompts": len(lengths), "tokens": tokens}


def _listed(p: Tensor, q: Tensor, count: int) -> float:
    """1 if the target's most probable token is among so many of the draft's, else 0."""
    return float((p.topk(min(count, len(p))).indices == q.argmax()).any())


def _continued(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling, number: int
) -> tuple[Tensor, int]:
    """Returns a prompt's tokens with those that the target says after it, and where they begin."""
    said: list[Tensor] = []

    def run(**inputs: Any) -> Tensor:
        said.append(target.generate(**inputs))
        return said[-1]

    for _ in generate(target, tokenizer, [prompt], sampling, batch_size=1, start=number, generate_with=run):
        pass
    return said[0][0], len(tokenizer(prompt)["input_ids"] or prefix_ids(tokenizer))


def _error(sums: list[float], lengths: list[int], mean: float) -> float | None:
    """Standard error of a ratio of sums over prompts."""
    if len(sums) < 2:
        return None
    rest = [total - mean * length for total, length in zip(sums, lengths, strict=True)]
    return statistics.stdev(rest) * math.sqrt(len(sums)) / sum(lengths)


def measure(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    num_drafts: Sequence[int],
    draft_length: int = 4,
    draft_temperature: float = 1.0,
    pad_vocabulary: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Generates with every verifier, one prompt at a time, and without drafts.

    Args:
        target: The target.
        draft: The draft model.
        tokenizer: The target's tokenizer.
        prompts: Prompts.
        sampling: How tokens are chosen.
        num_drafts: Numbers of drafts.
        draft_length: Tokens a draft.
        draft_temperature: Flattens the draft law.
        pad_vocabulary: See :class:`~modelwright.decoding.multi_draft.AssistantDrafts`.
        progress: Counts settings.
        **options: Further fields of the verifier ``is``.

    Returns:
        A row for each: ``drafts``, ``verifier``, ``block_efficiency``, ``acceptance_rate``, ``tokens_per_second``.
    """
    progress = progress or Silent()
    settings = [(0, "no draft"), (1, "single"), *((k, m) for k in num_drafts if k > 1 for m in METHODS[:-1])]
    rows = []
    for k, method in settings:
        decode = None
        if k:
            decode = MultiDraftDecoding(
                draft, num_drafts=k, draft_length=draft_length, draft_temperature=draft_temperature, verifier=method,
                pad_vocabulary=pad_vocabulary, **options,
            )  # fmt: skip

        def run(decode: Any = decode, **inputs: Any) -> Tensor:
            out: Tensor = target.generate(**inputs, custom_generate=decode)
            return out

        # Once for what is set up at the first call.
        list(generate(target, tokenizer, prompts[:1], sampling, batch_size=1, generate_with=run))
        if decode is not None:
            decode.stats.clear()
        began = time.perf_counter()
        said = sum(c[0].tokens for c in generate(target, tokenizer, prompts, sampling, batch_size=1, generate_with=run))
        seconds = time.perf_counter() - began
        rows.append(
            {
                "drafts": k, "verifier": method, "tokens_per_second": said / seconds,
                "block_efficiency": decode.stats.block_efficiency if decode else 1.0,
                "acceptance_rate": decode.stats.acceptance_rate if decode else None,
            }
        )  # fmt: skip
        progress.advance()
    return rows
