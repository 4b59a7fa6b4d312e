"""Generating from many prompts: batched, left-padded, and the same for a prompt whoever shares its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modelwright.errors import UserError
from modelwright.models.scoring import context_length
from modelwright.models.tokenizers import prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Tokens at most per completion.
        temperature: 0 takes the most probable token; else logits are divided by it and a token is drawn.
        top_k: Draw among this many most probable tokens; 0 for all.
        top_p: Draw among the most probable tokens that together have this probability.
        min_p: Drop tokens less probable than this fraction of the most probable one.
        repetition_penalty: Above 1 makes tokens that were seen less probable.
        seed: Seed of the draws; each prompt and sample has its own stream.
        stop: Texts that end a completion; they are cut off.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises :class:`UserError` for the first value that makes no sense."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if self.temperature < 0 or self.top_k < 0:
            raise UserError("temperature and top_k must be 0 or more.")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1:
            raise UserError("top_p must be above 0 and at most 1; min_p must be 0 or more and below 1.")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty must be greater than 0, not {self.repetition_penalty}.")

    def warpers(self) -> LogitsProcessorList:
        """Returns the processors that shape the distribution, without the draw."""
        found = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(MinPLogitsWarper(self.min_p))
        return found


class GumbelDraw(LogitsProcessor):
    """Adds Gumbel noise, so that the argmax is a draw from the softmax; each row has a random stream of its own.

    ``generate(do_sample=True)`` draws the whole batch from one stream, so that a prompt's completion depends on its
    neighbours and on where a run was resumed.

    Args:
        seeds: A seed for each row of the batch.
        device: Where the noise is made.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Returns (rows, vocabulary) float32 scores with noise."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()


class RefuseNan(LogitsProcessor):
    """Stops at scores that are not numbers, from which every token could be taken for the most probable."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Returns the scores as they are.

        Raises:
            UserError: One of them is NaN.
        """
        if torch.isnan(scores).any():
            raise UserError(
                "The model's scores of the next token are not numbers: its weights hold values that are not finite, or "
                "they overflow in this dtype (try --dtype float32)."
            )
        return scores


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote.

    Attributes:
        text: The completion, without prompt, special tokens and stop text.
        tokens: Tokens generated, an end token included.
        finish: ``eos``, ``stop`` or ``length``.
    """

    text: str
    tokens: int
    finish: str


def stream_seed(seed: int, prompt: int, sample: int) -> int:
    """Returns the seed of a prompt's sample: 63 bits that share nothing with those of its neighbours."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()[:8]) >> 1


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None = None) -> str:
    """Returns a user's message as the tokenizer's chat template lays it out, up to where the answer begins.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template: leave out --chat, or use a chat model.")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int = 8,
    special_tokens: bool = True,
    start: int = 0,
    generate_with: Callable[..., torch.Tensor] | None = None,
) -> Iterator[list[Completion]]:
    """Completes prompts as a stream, in their order.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Prompts; an empty one starts a document.
        sampling: How tokens are chosen.
        samples: Completions per prompt.
        batch_size: Prompts at once.
        special_tokens: Whether the tokenizer adds its own special tokens; off for prompts from a chat template.
        start: Number of the first prompt, when earlier ones were done before: seeds count from it.
        generate_with: Used in place of ``model.generate``; for a decoding method, with the same arguments.

    Yields:
        The ``samples`` completions of a prompt.

    Raises:
        UserError: A value makes no sense, or a prompt is too long for the model.
    """
    sampling.check()
    run = generate_with or model.generate
    longest = context_length(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    number, stream = start, iter(prompts)
    while group := list(islice(stream, batch_size)):
        rows = [tokenizer(p, add_special_tokens=special_tokens)["input_ids"] or prefix_ids(tokenizer) for p in group]
        if (top := max(map(max, rows))) >= vocabulary:
            raise UserError(
                f"The tokenizer gives token {top}, but the model knows only {vocabulary}: it is another model's."
            )
        for offset, row in enumerate(rows):
            if longest is not None and len(row) + sampling.max_new_tokens > longest:
                raise UserError(
                    f"Prompt {number + offset + 1} has {len(row)} tokens, which leaves no room for "
                    f"{sampling.max_new_tokens} new ones in the model's {longest}: shorten one or the other."
                )
        ids, mask = left_pad([row for row in rows for _ in range(samples)], _padding(model, tokenizer))
        seeds = [stream_seed(sampling.seed, number + i, s) for i in range(len(group)) for s in range(samples)]
        processors = LogitsProcessorList([RefuseNan()])
        if sampling.temperature > 0:
            processors += sampling.warpers()
            processors.append(GumbelDraw(seeds, model.device))
        with torch.no_grad():
            out = run(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                num_beams=1,
                # Set, so that a checkpoint's generation_config.json does not decide behind the caller's back.
                temperature=None,
                top_k=None,
                top_p=None,
                repetition_penalty=sampling.repetition_penalty,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=_padding(model, tokenizer),
                logits_processor=processors,
                **({"stop_strings": list(sampling.stop), "tokenizer": tokenizer} if sampling.stop else {}),
            )
        completions = [_completion(row, model, tokenizer, sampling) for row in out[:, ids.shape[1] :].tolist()]
        for at in range(0, len(completions), samples):
            yield completions[at : at + samples]
        number += len(group)


def left_pad(rows: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and attention mask, both (rows, longest) int64, with padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(_ends(model, tokenizer), default=0)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found = model.generation_config.eos_token_id
    ends = set(found if isinstance(found, list) else [] if found is None else [found])
    return ends or ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def _completion(
    ids: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> Completion:
    ends = _ends(model, tokenizer)
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    finish = "length" if length is None else "eos"
    # A row that a stop text ended is padded while others go on.
    padding = _padding(model, tokenizer)
    if length is None and sampling.stop:
        while ids and ids[-1] == padding:
            ids = ids[:-1]
    ids = ids[:length]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if found:
        text, finish = text[: min(found)], "stop"
    return Completion(text, len(ids), finish)
