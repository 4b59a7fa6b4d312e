"""How often a corpus trains each relative position; section 2 of the paper. Cheap, and useful without STRING too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Long = Literal["split", "truncate", "pack"]


def position_frequency(lengths: Iterable[int], max_length: int, long: Long = "split") -> np.ndarray:
    """Counts how often relative position i occurs in training, f(i) = Σ over sequences s of max(|s| - i, 0).

    Args:
        lengths: Tokens of each document.
        max_length: Tokens of a training sequence, L.
        long: What training does with documents longer than that: ``split`` cuts them into sequences, the last one
            shorter, ``truncate`` drops the rest. ``pack`` joins all documents and cuts the whole, as if attention
            crossed their borders. The paper does not say; its figures are of packed data without such crossing.

    Returns:
        (max_length,) int64; position 0 is a token with itself.

    Raises:
        UserError: A length is negative, or ``max_length`` is below 1.
    """
    if max_length < 1:
        raise UserError(f"max_length is {max_length}: give at least 1.")
    if long not in ("split", "truncate", "pack"):
        raise UserError(f"long is {long!r}: use split, truncate or pack.")
    sizes = np.fromiter(lengths, dtype=np.int64)
    if len(sizes) and sizes.min() < 0:
        raise UserError(f"A length is {sizes.min()}: lengths are counts of tokens.")
    if long == "pack":
        sizes = np.array([sizes.sum()], dtype=np.int64)
    counts = np.bincount(np.minimum(sizes, max_length) if long == "truncate" else sizes % max_length)
    counts = np.concatenate([counts, np.zeros(max_length + 1 - len(counts), dtype=np.int64)])
    if long != "truncate":
        counts[max_length] += int((sizes // max_length).sum())
    # Sequences of at least j tokens, for j = 1 …, and f(i) is their sum over j > i.
    at_least = np.cumsum(counts[::-1])[::-1][1:]
    return np.cumsum(at_least[::-1])[::-1].astype(np.int64)


def frequency_of_data(
    sources: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    text_field: str = "text",
    long: Long = "split",
    batch_size: int = 256,
) -> np.ndarray:
    """Counts the positions of documents in files, folders or hub data sets; see :func:`position_frequency`.

    Raises:
        UserError: A source is missing or faulty.
    """
    from itertools import islice

    from modelwright.data.records import Records

    def lengths() -> Iterable[int]:
        texts = iter(Records(sources, text_field).texts())
        while batch := list(islice(texts, batch_size)):
            yield from map(len, tokenizer(batch, verbose=False)["input_ids"])

    return position_frequency(lengths(), max_length, long)


def share_at_least(frequency: np.ndarray, position: int) -> float:
    """Returns the share of all relative positions that are at least ``position``; 0.0 if there are none at all."""
    total = frequency.sum()
    return float(frequency[position:].sum() / total) if total else 0.0
