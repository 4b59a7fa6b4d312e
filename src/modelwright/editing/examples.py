"""Prompts with the answers they shall get, as tensors; and what a model gives those answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelwright.editing.subject import encode_pair
from modelwright.errors import DivergedError, UserError
from modelwright.models.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Prompts and targets in one batch, padded on the right.

    Attributes:
        input_ids: (n, length) int64.
        attention_mask: (n, length) int64.
        is_target: (n, length) bool: tokens of the target.
        last: (n,) int64: the last token of each prompt.
        targets: The target's token ids, row by row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    is_target: torch.Tensor
    last: torch.Tensor
    targets: tuple[tuple[int, ...], ...]

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}


def make_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> Examples:
    """Makes a batch on the model's device.

    Args:
        model: The model that will read it.
        tokenizer: Its tokenizer.
        pairs: Prompts and targets.

    Raises:
        UserError: An empty prompt or target, one that is too long for the model, or another model's tokenizer.
    """
    rows = [encode_pair(tokenizer, text, target) for text, target in pairs]
    longest, vocabulary = context_length(model), model.get_input_embeddings().weight.shape[0]
    width = max(len(prompt) + len(target) for prompt, target in rows)
    if longest is not None and width > longest:
        raise UserError(f"A prompt and its target have {width} tokens, but the model reads {longest}: shorten them.")
    if (top := max(max(prompt + target) for prompt, target in rows)) >= vocabulary:
        raise UserError(
            f"The tokenizer gives token {top}, but the model knows only {vocabulary}: it is another model's."
        )
    ids = torch.full((len(rows), width), min(tokenizer.pad_token_id or 0, vocabulary - 1))
    mask, is_target = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, target) in enumerate(rows):
        length = len(prompt) + len(target)
        ids[row, :length] = torch.tensor(prompt + target)
        mask[row, :length] = 1
        is_target[row, len(prompt) : length] = True
    last = torch.tensor([len(prompt) - 1 for prompt, _ in rows])
    device = model.device
    return Examples(
        ids.to(device), mask.to(device), is_target.to(device), last.to(device), tuple(tuple(t) for _, t in rows)
    )


def target_log_probabilities(logits: torch.Tensor, examples: Examples) -> torch.Tensor:
    """Returns each target's log-probability, the sum over its tokens, teacher forced.

    Args:
        logits: (n, length, vocabulary), any floating-point dtype.
        examples: What the model was called with.

    Returns:
        (n,) float32.
    """
    rows, columns = examples.is_target.nonzero(as_tuple=True)
    chosen = logits[rows, columns - 1].float().log_softmax(-1)
    values = chosen.gather(1, examples.input_ids[rows, columns][:, None])[:, 0]
    return torch.zeros(len(logits), device=logits.device).index_add(0, rows, values)


def target_loss(logits: torch.Tensor, examples: Examples) -> torch.Tensor:
    """Returns the mean over rows of the targets' mean negative log-probability a token, float32.

    Args:
        logits: (n, length, vocabulary), any floating-point dtype.
        examples: What the model was called with.
    """
    return -(target_log_probabilities(logits, examples) / examples.is_target.sum(1)).mean()


def token_divergence(base: torch.Tensor, other: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns KL(base ‖ other) in nats, the mean over real tokens.

    Args:
        base: (n, length, vocabulary) logits.
        other: (n, length, vocabulary) logits, or log-probabilities.
        attention_mask: (n, length).
    """
    kept = attention_mask.bool()
    first, second = base[kept].float().log_softmax(-1), other[kept].float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).mean()


@torch.no_grad()
def answer_logits(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 32
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields what a model predicts in each place of answers, with their prompts in a call of their own.

    For edits that read whole rows (:attr:`~modelwright.editing.edit.Edit.reads_rows`): they must not see the answer
    when they decide about the prompt.

    Args:
        model: A causal language model.
        pairs: Tokens of a prompt and of an answer, at least one of each.
        batch_size: Pairs at once; prompts are padded on the left and answers on the right.

    Yields:
        The number of a pair, the longest first, and its logits (answer, vocabulary), float32.
    """
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), -len(pairs[i][1])))
    for at in range(0, len(order), batch_size):
        picked = order[at : at + batch_size]
        width, longest = (max(len(pairs[i][part]) for i in picked) for part in (0, 1))
        ids = torch.zeros(len(picked), width + longest - 1, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(picked):
            whole = [*pairs[i][0], *pairs[i][1][:-1]]
            start = width - len(pairs[i][0])
            ids[row, start : start + len(whole)] = torch.tensor(whole)
            mask[row, start : start + len(whole)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids[:, :width], attention_mask=mask[:, :width], position_ids=places[:, :width], use_cache=True
        )
        logits = out.logits[:, -1:]
        if longest > 1:
            rest = model(
                input_ids=ids[:, width:], attention_mask=mask, position_ids=places[:, width:],
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
            logits = torch.cat([logits, rest.logits], 1)
        for row, i in enumerate(picked):
            yield i, logits[row, : len(pairs[i][1])].float()


def check_finite(loss: float, method: str) -> None:
    """Refuses a loss that is no number: what would be written is nothing, or destroys the model.

    Raises:
        DivergedError: It is infinite or not a number.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"The loss of the {method} edit is not finite: the model overflows in this dtype (load it in float32 or "
            f"bfloat16), or the learning rate is too large."
        )


def check_keys(values: torch.Tensor) -> None:
    """Refuses keys, or their products, that are no numbers: the model is ruined, or overflows.

    Raises:
        DivergedError: One is infinite or not a number.
    """
    if not bool(values.isfinite().all()):
        raise DivergedError(
            "The model's keys are not finite: it is ruined by earlier edits, or overflows in this dtype (load it in "
            "float32)."
        )


@contextlib.contextmanager
def trainable_only(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Lets only some parameters have gradients inside the block, in evaluation mode; then all is as before."""
    states = [(p, p.requires_grad) for p in model.parameters()]
    training = [module for module in model.modules() if module.training]
    chosen = {id(p) for p in parameters}
    try:
        model.eval()
        for parameter, _ in states:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in states:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True
