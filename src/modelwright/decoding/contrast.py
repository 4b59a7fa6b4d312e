"""The arithmetic of contrastive decoding: two laws of the next token, one pushed away from the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelwright.errors import UserError


def as_float(logits: Tensor) -> Tensor:
    """Returns logits in float32, or in float64 if that is what they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def contrast(base: Tensor, other: Tensor, alpha: float | Tensor) -> Tensor:
    """Returns ``(1 + alpha) base - alpha other``.

    A log-softmax takes one number from all logits of a token, which no softmax sees: so raw logits will do, and the
    result is a law of the next token up to such a number.

    Args:
        base: Logits ``(…, V)``.
        other: Logits to be pushed away from, of the same shape.
        alpha: Strength: a number, or ``(…)``.
    """
    # With strength 0 nothing of the other law may come through, not even a rounding.
    if not isinstance(alpha, Tensor) and not alpha:
        return base
    strength = alpha[..., None] if isinstance(alpha, Tensor) else alpha
    # What the model rules out stays ruled out: the difference of two infinities is no number.
    return (base + strength * (base - other)).masked_fill(base == -math.inf, -math.inf)


def entropy(logits: Tensor) -> Tensor:
    """Returns the entropy of the softmax over the last dimension in nats, ``(…)``, as ``-sum p log(p + 1e-12)``."""
    p = as_float(logits).softmax(-1)
    return -(p * (p + 1e-12).log()).sum(-1)


def keep_plausible(scores: Tensor, base: Tensor, relative_top: float | None) -> Tensor:
    """Sets scores to -inf where the base law has less than a fraction of its most probable token.

    Args:
        scores: ``(…, V)``.
        base: Logits of the base law, ``(…, V)``.
        relative_top: The fraction (beta in arXiv 2210.15097, where it is 0.1); None keeps all.
    """
    if relative_top is None:
        return scores
    least = base.max(-1, keepdim=True).values + math.log(relative_top)
    return scores.masked_fill(base < least, -math.inf)


def fill_up(scores: Tensor, size: int) -> Tensor:
    """Returns scores ``(…, size)``, in which the tokens behind those given are ruled out."""
    missing = size - scores.shape[-1]
    return torch.nn.functional.pad(scores, (0, missing), value=-math.inf) if missing else scores


def check_vocabularies(own: int, wanted: int, pad: bool) -> None:
    """Refuses an amateur whose table of tokens has another size than the model's.

    Raises:
        UserError: It has, and tables of different padding are not allowed.
    """
    if own != wanted and not pad:
        raise UserError(
            f"The amateur has {own} tokens and the model {wanted}: they must share a tokenizer. If they do, and only "
            f"their tables were padded differently, set pad_vocabulary."
        )


def check_relative_top(value: float | None) -> None:
    """Refuses a fraction outside (0, 1].

    Raises:
        UserError: It is.
    """
    if value is not None and not 0 < value <= 1:
        raise UserError(f"relative_top is {value}: give a fraction above 0 and at most 1, or leave it out.")


def check_alpha(value: float) -> None:
    """Refuses a strength that is negative or no number.

    Raises:
        UserError: It is.
    """
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise UserError(f"alpha is {value}: give a number of 0 or more.")
