"""Generating from many prompts: batched, left-padded, and the same for a prompt whoever shares its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StopStringCriteria

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
        shaping = [n for n, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, n) != off]
        if self.temperature == 0 and shaping:
            raise UserError(
                f"{shaping[0]} says what tokens are drawn among, but at temperature 0 nothing is drawn: give a "
                f"temperature above 0, or leave {shaping[0]} out."
            )

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
        ids: The tokens.
    """

    text: str
    tokens: int
    finish: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for methods that set it beside itself without its context.

    Attributes:
        text: The prompt.
        without_context: The same without what is to be relied on.
    """

    text: str
    without_context: str


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
    prompts: Iterable[str | Prompt],
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
        prompts: Prompts; an empty one starts a document. All of them, or none, are :class:`Prompt`.
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
    if batch_size < 1 or samples < 1:
        raise UserError(f"batch_size and samples must be at least 1, not {batch_size} and {samples}.")
    run = generate_with or model.generate
    padding = _padding(model, tokenizer)
    stops = StoppingCriteriaList([StopStringCriteria(tokenizer, list(sampling.stop))] if sampling.stop else [])
    number, stream = start, iter(prompts)
    while group := list(islice(stream, batch_size)):
        rows = [encode_prompt(tokenizer, _text(prompt), special_tokens) for prompt in group]
        for offset, row in enumerate(rows):
            check_prompt(model, row, sampling, f"Prompt {number + offset + 1}")
        ids, mask = left_pad([row for row in rows for _ in range(samples)], padding)
        without = [p.without_context for p in group if isinstance(p, Prompt)]
        extra = {}
        if without:
            others = [encode_prompt(tokenizer, text, special_tokens) for text in without for _ in range(samples)]
            both = (tensor.to(model.device) for tensor in left_pad(others, padding))
            extra = dict(zip(("without_context_ids", "without_context_mask"), both, strict=True))
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
                pad_token_id=padding,
                logits_processor=processors,
                # generate would make it itself, but loses the tokenizer where a decoder takes the loop's place.
                stopping_criteria=stops,
                **extra,
            )
        completions = [_completion(row, model, tokenizer, sampling) for row in out[:, ids.shape[1] :].tolist()]
        for at in range(0, len(completions), samples):
            yield completions[at : at + samples]
        number += len(group)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = True) -> list[int]:
    """Returns a prompt's tokens; at least one, which starts a document."""
    return tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"] or prefix_ids(tokenizer)


def check_prompt(model: PreTrainedModel, ids: Sequence[int], sampling: Sampling, name: str) -> None:
    """Refuses a prompt that the model cannot take.

    Args:
        model: The model.
        ids: The prompt's tokens.
        sampling: Says how many tokens must still fit.
        name: What the prompt is called in the message.

    Raises:
        UserError: A token is beyond the model's vocabulary, or prompt and completion beyond its positions.
    """
    vocabulary, longest = model.get_input_embeddings().weight.shape[0], context_length(model)
    if (top := max(ids)) >= vocabulary:
        raise UserError(
            f"The tokenizer gives token {top}, but the model knows only {vocabulary}: it is another model's."
        )
    if longest is not None and len(ids) + sampling.max_new_tokens > longest:
        raise UserError(
            f"{name} has {len(ids)} tokens, which leaves no room for {sampling.max_new_tokens} new ones in the model's "
            f"{longest}: shorten one or the other."
        )


def _text(prompt: str | Prompt) -> str:
    return prompt.text if isinstance(prompt, Prompt) else prompt


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
    return Completion(text, len(ids), finish, tuple(ids))
