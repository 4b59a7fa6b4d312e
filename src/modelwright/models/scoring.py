"""Log-probabilities of documents under a model: the part that evaluation and training share.

Each token is predicted once. A document stands behind the tokenizer's prefix (see
:func:`~modelwright.models.tokenizers.prefix_ids`), so its first token counts as well and all its bytes are paid for.
A document longer than the window is read in windows that overlap, so that no token has less than
``window - stride`` tokens of context, as far as the document has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelwright.errors import UserError
from modelwright.models.tokenizers import encode, prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Logits (numbers) that are brought to float32 at once: 64 MiB, whatever the vocabulary.
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """What a model gives a document.

    Attributes:
        log_probability: Sum over its tokens, natural log, accumulated in float64.
        tokens: Tokens predicted.
        bytes: UTF-8 bytes of the text.
        words: Words, as split at white space.
    """

    log_probability: float
    tokens: int
    bytes: int
    words: int


@dataclass(slots=True)
class _Window:
    document: int
    ids: list[int]
    scored: int  # the last `scored` tokens of ids are new


def windows(ids: Sequence[int], prefix: Sequence[int], window: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Cuts a document into model inputs.

    Args:
        ids: The document's tokens.
        prefix: What stands before it; at least one token.
        window: Longest input, in tokens.
        stride: New tokens a window, after the first; at most ``window - 1``.

    Yields:
        An input, and how many tokens at its end are predicted for the first time.
    """
    whole = [*prefix, *ids]
    done = len(prefix)
    end = min(len(whole), window)
    while done < len(whole):
        yield whole[max(0, end - window) : end], end - done
        done = end
        end = min(len(whole), end + stride)


def context_length(model: PreTrainedModel) -> int | None:
    """Returns the longest input that the model was made for, or None where it has no bound (state-space models)."""
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(length := getattr(model.config, name, None), int):
            return length
    return None


@torch.no_grad()
def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Iterator[DocumentScore]:
    """Scores documents as a stream, in their order. The model must be in evaluation mode.

    Args:
        model: A causal language model, of any dtype.
        tokenizer: Its tokenizer.
        texts: Documents; an empty one scores 0 with no tokens.
        window: Longest input in tokens; None takes the model's own, at most 2,048.
        stride: New tokens a window; None takes half of it.
        batch_size: Windows at once; does not change the scores beyond rounding.

    Raises:
        UserError: Window or stride do not fit the model, or the tokenizer has more tokens than the model.
    """
    window, stride = resolve_window(model, window, stride)
    prefix = prefix_ids(tokenizer)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if window <= len(prefix):
        raise UserError(f"A window of {window} tokens leaves no room beside the prefix of {len(prefix)}.")
    for group in _groups(texts, 16 * batch_size):
        rows = encode(tokenizer, group)
        top = max((max(row) for row in rows if row), default=0)
        if top >= vocabulary:
            raise UserError(
                f"The tokenizer gives token {top}, but the model knows only {vocabulary}: it is another model's."
            )
        queue = [
            _Window(number, ids, scored)
            for number, row in enumerate(rows)
            for ids, scored in windows(row, prefix, window, stride)
        ]
        # Windows of like length share a batch, which spares padding; sums are taken in the document's own order.
        order = sorted(range(len(queue)), key=lambda i: -len(queue[i].ids))
        sums: list[list[tuple[int, float]]] = [[] for _ in group]
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            for index, value in zip(picked, _score_batch(model, [queue[i] for i in picked]), strict=True):
                sums[queue[index].document].append((index, value))
        for text, row, parts in zip(group, rows, sums, strict=True):
            total = sum(value for _, value in sorted(parts))
            yield DocumentScore(float(total), len(row), len(text.encode()), len(text.split()))


def resolve_window(model: PreTrainedModel, window: int | None, stride: int | None) -> tuple[int, int]:
    """Returns window and stride with their defaults filled in, checked against the model.

    Raises:
        UserError: They do not fit.
    """
    longest = context_length(model)
    if window is None:
        window = min(longest or 2048, 2048)
    if window < 2 or (longest is not None and window > longest):
        raise UserError(
            f"A window of {window} tokens does not fit the model, which takes 2 to {longest or 'any number'}."
        )
    if stride is None:
        stride = window // 2
    if not 1 <= stride < window:
        raise UserError(f"The stride must lie between 1 and {window - 1} (window - 1), not {stride}.")
    return window, stride


def _groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    # Bounded by characters too, so that long documents do not pile up in memory.
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) >= size or characters > 1 << 22:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _score_batch(model: PreTrainedModel, batch: Sequence[_Window]) -> list[float]:
    width = max(len(w.ids) for w in batch)
    device = model.device
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, w in enumerate(batch):
        ids[row, : len(w.ids)] = torch.tensor(w.ids)
        mask[row, : len(w.ids)] = 1
    # Padding stands on the right, where no token of a causal model sees it.
    kwargs = {} if bool(mask.all()) else {"attention_mask": mask.to(device)}
    logits = model(input_ids=ids.to(device), use_cache=False, **kwargs).logits
    # The rows and columns that predict a new token; only those are brought to float32.
    rows = torch.cat([torch.full((w.scored,), row) for row, w in enumerate(batch)])
    targets = torch.cat([torch.arange(len(w.ids) - w.scored, len(w.ids)) for w in batch])
    values = token_log_probabilities(logits, rows, targets - 1, ids[rows, targets])
    return [float(part.sum()) for part in values.split([w.scored for w in batch])]


def token_log_probabilities(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Returns log-probabilities of chosen tokens, a bounded number of logits at a time.

    Args:
        logits: (batch, length, vocabulary), any floating-point dtype.
        rows: (n,) int64, batch index of each prediction.
        positions: (n,) int64, position whose logits predict it.
        targets: (n,) int64, the token.

    Returns:
        (n,) float64 on the CPU. Each is a float32 log-softmax; sums over them are exact to float64.
    """
    rows, positions, targets = (t.to(logits.device) for t in (rows, positions, targets))
    step = max(1, _CHUNK // logits.shape[-1])
    parts = []
    for start in range(0, len(rows), step):
        at = slice(start, start + step)
        chunk = logits[rows[at], positions[at]].float()
        parts.append(chunk.gather(-1, targets[at, None])[:, 0] - chunk.logsumexp(-1))
    return torch.cat(parts).cpu().double()


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> float:
    """Returns the bits that the model needs per UTF-8 byte of all texts together; see :func:`score_documents`.

    Raises:
        UserError: The texts are empty.
    """
    nats, length = 0.0, 0
    for score in score_documents(model, tokenizer, texts, window=window, stride=stride, batch_size=batch_size):
        nats -= score.log_probability
        length += score.bytes
    if not length:
        raise UserError("The held-out text is empty, so there is nothing to evaluate on.")
    return nats / length / math.log(2)
