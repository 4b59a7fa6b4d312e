"""JEST's scores and sampler on whole matrices: short, B x B, and the specification of the running sums."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from modelwright.errors import UserError
from modelwright.training.contrastive.encoded import Encoded


class Draw(NamedTuple):
    """What was drawn from a super-batch, in the order of the draw.

    Attributes:
        indices: (b,) int64, rows of the super-batch, no row twice.
        chunks: (b,) int64, the round of each draw, from 0.
        scores: (b,), each row's score given the rows of earlier rounds (the logit of its draw at temperature 1).
    """

    indices: Tensor
    chunks: Tensor
    scores: Tensor


def pairwise_sigmoid_nll(
    image_embeds: Tensor, text_embeds: Tensor, scale: Tensor | float, bias: Tensor | float
) -> Tensor:
    """Sigmoid (SigLIP) loss of every pair (paper, Section 3).

    Their sum over a batch of b, divided by b, is the batch's SigLIP loss.

    Args:
        image_embeds: (B, d), rows of length 1.
        text_embeds: (B, d), rows of length 1.
        scale: What multiplies the cosines (``exp(t)``).
        bias: What is added to them.

    Returns:
        (B, B): ``softplus(-x_ii)`` on the diagonal and ``softplus(x_ij)`` elsewhere, where x are the logits.
    """
    logits = scale * (image_embeds @ text_embeds.T) + bias
    signs = 1 - 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return softplus(signs * logits)


def softmax_scores(logits: Tensor, chosen: Tensor) -> Tensor:
    """Loss of each pair in the softmax (CLIP) form, given the chosen ones.

    The softmax loss is no sum over pairs, and the paper does not print this score. It is a reconstruction: the loss
    that pair c would have in a batch of A and itself, mean of both directions. Given nothing, it is ``-x_cc`` instead,
    since the loss of a batch of one is always 0.

    Args:
        logits: (B, B).
        chosen: int64, the rows of A.

    Returns:
        (B,).
    """
    own = logits.diagonal()
    if len(chosen) == 0:
        return -own
    losses = [
        torch.logaddexp(own, x[:, chosen].logsumexp(1)) - own
        for x in (logits, logits.T)  # its image among A's texts, its text among A's images
    ]
    return (losses[0] + losses[1]) / 2


def batch_loss(encoded: Encoded, rows: Tensor, size: int, form: Literal["sigmoid", "softmax"] = "sigmoid") -> float:
    """Returns the loss that pairs would have, on average, in a batch of ``size`` pairs like them.

    With ``size`` rows it is the loss of that batch; with fewer it is an estimate, where negatives count for those that
    were left out.

    Args:
        encoded: Embeddings of a super-batch.
        rows: (m,) int64, which of its pairs, at most ``size``.
        size: Pairs of the batch.
        form: Which loss: SigLIP's, ``(1/b)`` times the sum over pairs, or CLIP's, the mean of both directions.
    """
    queries, keys = (side[rows].to(accumulated(side)) for side in (encoded.queries, encoded.keys))
    with torch.autocast(queries.device.type, enabled=False):
        logits = encoded.scale.to(queries.dtype) * (queries @ keys.T)
    more = (size - 1) / max(1, len(rows) - 1)
    if form == "sigmoid":
        assert encoded.bias is not None
        logits = logits + encoded.bias.to(queries.dtype)
        own = logits.diagonal()
        others = (softplus(logits).sum() - softplus(own).sum()) * more
        return float(softplus(-own).sum() + others) / len(rows)
    own = logits.diagonal()
    if len(rows) == 1:
        return 0.0
    masked = logits.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=logits.device), -math.inf)
    losses = [torch.logaddexp(own, x.logsumexp(1) + math.log(more)) - own for x in (masked, masked.T)]
    return float((losses[0] + losses[1]).mean() / 2)


def accumulated(rows: Tensor) -> torch.dtype:
    """Returns the type that products of embeddings are made in: float32 at least."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def chunk_sizes(size: int, n_chunks: int, strict: bool = False) -> list[int]:
    """Returns how many pairs each round draws: equal numbers, with the remainder in the last round.

    A batch of fewer pairs than rounds is drawn one by one.

    Args:
        size: Size b of the batch.
        n_chunks: Rounds.
        strict: Refuse a remainder.

    Raises:
        UserError: Either number is below 1, or there is a remainder and ``strict`` is on.
    """
    if size < 1 or n_chunks < 1:
        raise UserError(f"A batch of {size} cannot be drawn in {n_chunks} chunks: both must be at least 1.")
    if strict and size % n_chunks:
        raise UserError(
            f"A batch of {size} cannot be drawn in {n_chunks} equal chunks: change one, or turn strict off."
        )
    n_chunks = min(n_chunks, size)
    sizes = [size // n_chunks] * n_chunks
    sizes[-1] += size % n_chunks
    return sizes


def gumbel(count: int, generator: torch.Generator | None) -> Tensor:
    """Returns Gumbel noise, (count,) float64 on the CPU, so that a seed means the same draw on every device."""
    waits = torch.empty(count, dtype=torch.float64).exponential_(generator=generator)
    return -waits.clamp_min(math.ulp(0.0)).log()


def draw_chunk(
    logits: Tensor, taken: Tensor, size: int, generator: torch.Generator | None, temperature: float
) -> Tensor:
    """Draws without replacement with probability proportional to ``exp(logits / temperature)``, by Gumbel top-k.

    Args:
        logits: (B,).
        taken: (B,) bool, rows that may not be drawn.
        size: How many.
        generator: On the CPU; None takes torch's.
        temperature: 0 takes the largest.

    Returns:
        (size,) int64, in the order of the draw.

    Raises:
        UserError: A logit that counts is not finite.
    """
    if not bool((logits.isfinite() | taken).all()):
        where = int((~logits.isfinite() & ~taken).nonzero()[0])
        raise UserError(
            f"The score of row {where} of the super-batch is {float(logits[where])}: check the embeddings, scales and "
            f"biases that it was made of."
        )
    noise = gumbel(len(logits), generator)  # at temperature 0 too, so that the stream of noise stays in step
    keys = logits.double()
    if temperature > 0:
        keys = keys / temperature + noise.to(keys.device)
    return keys.masked_fill(taken, -math.inf).topk(size).indices


def check_temperature(temperature: float) -> None:
    """Raises :class:`UserError` unless the temperature is a number of at least 0."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"temperature must be a number of at least 0, not {temperature}.")


def draw_from_scores(
    scores: Tensor,
    size: int,
    n_chunks: int,
    generator: torch.Generator | None = None,
    *,
    normalize: bool = False,
    temperature: float = 1.0,
    strict: bool = False,
) -> Draw:
    """As :func:`select_from_scores`, and returns rounds and scores too."""
    count = len(scores)
    if scores.shape != (count, count):
        raise UserError(f"The scores must be a square matrix, not of shape {tuple(scores.shape)}.")
    if size > count:
        raise UserError(f"{size} pairs cannot be chosen from a super-batch of {count}: lower the batch size.")
    check_temperature(temperature)
    taken = torch.zeros(count, dtype=torch.bool, device=scores.device)
    chosen = torch.empty(0, dtype=torch.int64, device=scores.device)
    chunks, found = [], []
    for number, wanted in enumerate(chunk_sizes(size, n_chunks, strict)):
        logits = scores.diagonal() + scores[:, chosen].sum(1) + scores[chosen].sum(0)
        if normalize:
            logits = logits / (1 + 2 * len(chosen))
        new = draw_chunk(logits, taken, wanted, generator, temperature)
        taken[new] = True
        chosen = torch.cat([chosen, new])
        chunks.append(torch.full_like(new, number))
        found.append(logits[new])
    return Draw(chosen, torch.cat(chunks), torch.cat(found))


def select_from_scores(
    scores: Tensor,
    size: int,
    n_chunks: int,
    generator: torch.Generator | None = None,
    *,
    normalize: bool = False,
    temperature: float = 1.0,
    strict: bool = False,
) -> Tensor:
    """Draws a joint batch from a matrix of pair scores (paper, Algorithm 1): blocks of Gibbs-like draws.

    Every round draws its share without replacement with probability proportional to ``exp(logits)``; the logit of row i
    is ``S_ii`` plus the sum of ``S_ij + S_ji`` over the rows j of earlier rounds. One round is independent selection.

    Args:
        scores: (B, B), pair scores S.
        size: Size b of the batch, at most B.
        n_chunks: Rounds.
        generator: On the CPU; None takes torch's.
        normalize: Divide each logit by its number of terms (1 + 2 for each row chosen): less greedy in late rounds than
            the paper's sums.
        temperature: What divides the logits; the paper has none (1). 0 takes the largest.
        strict: Refuse a batch that does not divide into equal rounds; otherwise the last takes the remainder.

    Returns:
        (size,) int64, in the order of the draw.

    Raises:
        UserError: Sizes that do not fit, or a score that is not finite.
    """
    return draw_from_scores(
        scores, size, n_chunks, generator, normalize=normalize, temperature=temperature, strict=strict
    ).indices
