"""How many types of a vocabulary are rare, and how that grows with its size (the paper's Figure 2b)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelwright.errors import UserError
from modelwright.models.tokenizers import train_bpe
from modelwright.probing.fair_lm.bins import check_counts
from modelwright.probing.fair_lm.counts import count_tokens
from modelwright.progress import Progress, Silent


@dataclass(frozen=True)
class RareTypes:
    """The types that the bulk of a corpus does without.

    Attributes:
        vocab_size: All types, those that never occur too.
        seen: Types that occur.
        covering: The fewest types whose occurrences make up ``coverage`` of all: the most frequent ones.
        share_of_seen: Share of the types that occur that are not among them.
        share_of_vocabulary: Share of all types that are not among them.
        coverage: Share of the occurrences.
    """

    vocab_size: int
    seen: int
    covering: int
    share_of_seen: float
    share_of_vocabulary: float
    coverage: float


def rare_types(counts: Any, coverage: float = 0.95) -> RareTypes:
    """Returns the share of types below the frequency that covers most occurrences.

    The paper does not say whether types that never occur are among them, so there are both shares.

    Args:
        counts: (V,) occurrences.
        coverage: Share of occurrences that the frequent types make up.

    Raises:
        UserError: Coverage outside (0, 1], or counts that are all zero.
    """
    if not 0 < coverage <= 1:
        raise UserError(f"The coverage must lie between 0 and 1, not {coverage}.")
    found = -np.sort(-check_counts(counts))
    total = int(found.sum())
    if not total:
        raise UserError("The counts are all zero.")
    seen = int((found > 0).sum())
    # A hair less than the exact share, which is not a float: the 95 of 100 must be enough for 0.95.
    covering = min(seen, int(np.searchsorted(np.cumsum(found), coverage * total * (1 - 1e-12))) + 1)
    return RareTypes(len(found), seen, covering, 1 - covering / seen, 1 - covering / len(found), coverage)


def by_vocabulary_size(
    texts: Iterable[str], sizes: Sequence[int], coverage: float = 0.95, progress: Progress | None = None
) -> list[RareTypes]:
    """Trains a byte-level BPE of each size on the texts, and counts them with it.

    Args:
        texts: Documents; read twice for each size.
        sizes: Vocabularies to try.
        coverage: See :func:`rare_types`.
        progress: Counts sizes.

    Raises:
        UserError: A size below the 259 that bytes and special tokens take, or no text.
    """
    progress = progress or Silent()
    progress.start("vocabularies", len(sizes))
    found = []
    for size in sizes:
        tokenizer = train_bpe(texts, size)
        found.append(rare_types(count_tokens(texts, tokenizer), coverage))
        progress.advance(note=f"{size:,} types")
    return found
