"""Log-probabilities of given continuations of prompts, through decoding methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelwright.decoding.generate import encode_prompt
from modelwright.errors import UserError
from modelwright.models.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from modelwright.decoding.parts import Applied


@dataclass(frozen=True)
class Continuation:
    """A prompt and how it goes on.

    Attributes:
        prompt: The prompt.
        text: The continuation; spaces at the prompt's end are taken for its beginning, as lm-eval does.
        without_context: The prompt without its context, for methods that need it.
        where: Where it comes from, for messages.
    """

    prompt: str
    text: str
    without_context: str | None = None
    where: str = ""


@torch.no_grad()
def score_continuations(
    applied: Applied, continuations: Sequence[Continuation], *, batch_size: int = 8, special_tokens: bool = True
) -> Iterator[float]:
    """Scores continuations in their order.

    Args:
        applied: The model with its methods.
        continuations: What to score.
        batch_size: Continuations at once; does not change the scores beyond rounding.
        special_tokens: Whether the tokenizer adds its own special tokens before a prompt.

    Yields:
        The sum of the continuation's log-probabilities (natural), given the prompt.

    Raises:
        UserError: A continuation is empty, or too long for the model; the method says no law of given texts; or a
            score is no number.
    """
    model, tokenizer = applied.model, applied.tokenizer
    longest = context_length(model)
    for start in range(0, len(continuations), batch_size):
        batch = continuations[start : start + batch_size]
        rows, others, lengths = [], [], []
        for one in batch:
            prompt, more = split(tokenizer, one.prompt, one.text, special_tokens)
            if not more:
                raise UserError(f"{one.where or 'A prompt'} has a continuation without any token.")
            if longest is not None and len(prompt) + len(more) - 1 > longest:
                raise UserError(
                    f"{one.where or 'A prompt'} has {len(prompt) + len(more)} tokens with its continuation, more than "
                    f"the model's {longest}."
                )
            rows.append(prompt + more[:-1])
            lengths.append(more)
            if applied.needs_context:
                if one.without_context is None:
                    raise UserError(
                        f"The method looks at a prompt without its context, which {one.where or 'it'} has not."
                    )
                others.append(split(tokenizer, one.without_context, one.text, special_tokens)[0] + more[:-1])
        ids, mask = _left_padded(rows, model.device)
        extra = {}
        if others:
            extra = dict(zip(("without_context_ids", "without_context_mask"), _left_padded(others, model.device)))
        law = applied.log_probs(ids, mask, **extra)
        for row, more in zip(law, lengths, strict=True):
            wanted = torch.tensor(more, device=row.device)
            score = float(row[-len(more) :].gather(-1, wanted[:, None]).double().sum())
            if math.isnan(score):
                raise UserError(
                    "The model's log-probabilities are not numbers: its weights hold values that are not finite, or "
                    "they overflow in this dtype (try --dtype float32)."
                )
            yield score


def split(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """Returns the tokens of a prompt and those of its continuation, as the whole is cut into tokens."""
    stripped = prompt.rstrip()
    text = prompt[len(stripped) :] + text
    before = encode_prompt(tokenizer, stripped, special_tokens)
    if not stripped:
        return before, list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = encode_prompt(tokenizer, stripped + text, special_tokens)
    return before, list(whole[len(before) :])


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    from modelwright.decoding.generate import left_pad

    ids, mask = left_pad(rows, 0)
    return ids.to(device), mask.to(device)
