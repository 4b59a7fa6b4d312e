"""DSIR: importance weights of documents from hashed n-gram counts."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np

from modelwright.curation.selector import SelectorMixin
from modelwright.errors import UserError
from modelwright.options import Arg
from modelwright.processes import in_processes

_TOKEN = re.compile(r"\w+|[^\w\s]+")
#: Added to every probability before the logarithm, as in the official code.
_FLOOR = 1e-8
#: N-grams whose buckets are kept; hashing is most of the work, and most n-grams are seen again soon.
_CACHE_ENTRIES = 1 << 19
_CACHES: dict[int, dict[str, int]] = {}
_BLOCK_DOCUMENTS = 512


def tokens(text: str) -> list[str]:
    r"""Returns the lower-case tokens: runs of word characters, and runs of what is neither word nor space."""
    return _TOKEN.findall(text.lower())


def bucket(ngram: str, num_buckets: int) -> int:
    """Returns the SHA-256 of an n-gram (tokens joined by a space) as an integer, modulo ``num_buckets``."""
    digest = hashlib.sha256(ngram.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % num_buckets


class Buckets:
    """The hash buckets of a text's unigrams and bigrams, with a bounded cache.

    Args:
        num_buckets: Number of buckets.
    """

    def __init__(self, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        self._cache = _CACHES.setdefault(num_buckets, {})

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """Returns the bucket of every unigram and every bigram: int64, shape ``(2 * len(words) - 1,)``, or ``(0,)``."""
        cache = self._cache
        if len(cache) > _CACHE_ENTRIES:
            cache.clear()
        ngrams = [*words, *map(" ".join, itertools.pairwise(words))]
        try:
            found = [cache[ngram] for ngram in ngrams]
        except KeyError:
            for ngram in ngrams:
                if ngram not in cache:
                    cache[ngram] = bucket(ngram, self.num_buckets)
            found = [cache[ngram] for ngram in ngrams]
        return np.array(found, dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent to another process without the cache: it has its own.
        return Buckets, (self.num_buckets,)


def log_ratio(target: np.ndarray, raw: np.ndarray, laplace: bool = False) -> np.ndarray:
    """Returns log(p + 1e-8) - log(q + 1e-8) for every bucket.

    Args:
        target: int64, n-gram counts of the target by bucket.
        raw: int64, n-gram counts of the pool by bucket.
        laplace: Add one to every count of the target.
    """
    target = target + 1 if laplace else target
    p, q = target / target.sum(), raw / raw.sum()
    return np.log(p + _FLOOR) - np.log(q + _FLOOR)


def gumbel(text: str, seed: int) -> float:
    """Returns standard Gumbel noise; it depends on the seed and the text alone, so batches and order do not matter."""
    data = seed.to_bytes(16, "big", signed=True) + text.encode("utf-8", "surrogatepass")
    uniform = (int.from_bytes(hashlib.sha256(data).digest()[:7], "big") + 0.5) / 2**56
    return -math.log(-math.log(uniform))


@dataclass(kw_only=True)
class DsirSelector(SelectorMixin):
    """Data Selection via Importance Resampling (Xie et al., 2023) on hashed unigrams and bigrams.

    A document's score is its log importance weight: the SUM over its n-grams of log p - log q, with p their share in
    the target and q in the pool; plus Gumbel noise, so that the best k are a sample without replacement with
    probabilities in proportion to the weights (``top_k=True``: without noise). Long documents have extreme weights.
    Equal documents get equal noise.
    """

    num_buckets: Annotated[int, Arg("Hash buckets for the n-grams.")] = 10_000
    min_tokens: Annotated[int, Arg("Drop documents with fewer tokens than this.")] = 100
    top_k: Annotated[bool, Arg("Rank by weight alone instead of sampling in proportion to it.")] = False
    laplace: Annotated[bool, Arg("Add one to every n-gram count of the target.")] = False
    seed: Annotated[int, Arg("Seed of the sampling.")] = 0

    needs_pool: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_buckets < 1:
            raise UserError(f"num_buckets must be at least 1, not {self.num_buckets}.")
        if self.min_tokens < 0:
            raise UserError(f"min_tokens must not be negative, but is {self.min_tokens}.")
        self._buckets = Buckets(self.num_buckets)
        self._log_ratio: np.ndarray | None = None

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> Self:
        """Counts the n-grams of target and pool.

        Args:
            target: Target examples.
            pool: Texts of the pool; read once, and not kept. Without it the target waits for `select`, which has it.

        Raises:
            UserError: The target or the pool is missing or has no tokens.
        """
        if pool is None:
            self.waiting_target = list(target)
            return self
        in_target, in_pool = self._count(target), self._count(pool)
        for counts, what in ((in_target, "target"), (in_pool, "pool")):
            if not counts.any():
                raise UserError(f"The {what} has no tokens: give at least one text that is not blank.")
        self._log_ratio = log_ratio(in_target, in_pool, self.laplace)
        self.waiting_target = None
        return self

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Returns log weights, with noise unless ``top_k``: float64, shape ``(len(texts),)``; NaN where dropped.

        Raises:
            UserError: ``fit`` was not called.
        """
        if self._log_ratio is None:
            raise UserError("DSIR has no target yet: call fit with target and pool first.")
        blocks = [texts[i : i + _BLOCK_DOCUMENTS] for i in range(0, len(texts), _BLOCK_DOCUMENTS)]
        found = in_processes(self._weights, ((block,) for block in blocks), min(workers, len(blocks)))
        return np.concatenate([np.empty(0), *found])

    def _count(self, texts: Iterable[str]) -> np.ndarray:
        counts = np.zeros(self.num_buckets, dtype=np.int64)
        for text in texts:
            counts += np.bincount(self._buckets(tokens(text)), minlength=self.num_buckets)
        return counts

    def _weights(self, texts: Sequence[str]) -> np.ndarray:
        ratio = self._log_ratio
        assert ratio is not None
        out = np.full(len(texts), np.nan)
        for i, text in enumerate(texts):
            words = tokens(text)
            if words and len(words) >= self.min_tokens:
                # Added up in the order of the buckets, so that equal counts have equal weights to the last bit.
                weight = float(ratio[np.sort(self._buckets(words))].sum())
                out[i] = weight if self.top_k else weight + gumbel(text, self.seed)
        return out
