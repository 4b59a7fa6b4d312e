"""TF-IDF similarity to the target: the cheap, honest rival of every selection by likeness."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np

from modelwright.curation.selector import SelectorMixin
from modelwright.errors import UserError, require
from modelwright.options import Arg

__all__ = ["TfidfSelector"]

_BATCH = 1024


@dataclass(kw_only=True)
class TfidfSelector(SelectorMixin):
    r"""Scores a document by its TF-IDF cosine with the target examples (Salton and Buckley, 1988).

    Words of two or more characters are hashed, so the memory does not grow with the pool. A word's weight is its
    count times :math:`\ln\frac{1+N}{1+n_w}+1`, with :math:`n_w` of the pool's :math:`N` documents holding it; vectors
    have length 1.
    """

    similarity: Annotated[
        Literal["mean", "max"], Arg("Cosine with the mean of the target's vectors, or the largest with any of them.")
    ] = "mean"
    ngrams: Annotated[int, Arg("Longest word n-gram that is a feature.")] = 1
    features: Annotated[int, Arg("Size of the hash table of words.")] = 2**18

    needs_pool: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.similarity not in ("mean", "max"):
            raise UserError(f"similarity must be 'mean' or 'max', not {self.similarity!r}.")
        for name in ("ngrams", "features"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> Self:
        """Learns the words' weights from the pool and the vectors of the target.

        Args:
            target: Examples of what is wanted.
            pool: Re-iterable texts; without it the fit waits for :meth:`select`.

        Raises:
            UserError: The target is empty or holds no word, or scikit-learn is not installed.
        """
        if not target:
            raise UserError("The target is empty: give at least one example.")
        if pool is None:
            self.waiting_target = list(target)
            return self
        documents, holding = 0, np.zeros(self.features, dtype=np.int64)
        stream = iter(pool)
        while batch := list(itertools.islice(stream, _BATCH)):
            documents += len(batch)
            holding += np.bincount(self._counts(batch).indices, minlength=self.features)
        self._idf = np.log((1 + documents) / (1 + holding)) + 1
        vectors = self._vectors(target)
        if vectors.nnz == 0:
            raise UserError("The target examples hold no words of two or more characters, which TF-IDF needs.")
        if self.similarity == "mean":
            mean = np.asarray(vectors.mean(axis=0)).ravel()
            self._target: Any = mean / np.linalg.norm(mean)
        else:
            self._target = vectors.T.tocsr()
        self.waiting_target = None
        return self

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Returns cosines in [0, 1], float64, shape ``(len(texts),)``; a text without words gets 0.

        Raises:
            UserError: :meth:`fit` was not called with a pool.
        """
        if not hasattr(self, "_idf"):
            raise UserError("tfidf is not fitted: call fit(target, pool) first.")
        if len(texts) == 0:
            return np.empty(0)
        vectors = self._vectors(texts)
        if self.similarity == "mean":
            return np.asarray(vectors @ self._target, dtype=np.float64).ravel()
        return np.asarray((vectors @ self._target).max(axis=1).todense(), dtype=np.float64).ravel()

    def details(self) -> dict[str, Any]:
        """Returns scikit-learn's version, whose tokenisation this uses."""
        return {"scikit-learn": require("sklearn", "curation", "TF-IDF").__version__}

    def _counts(self, texts: Sequence[str]) -> Any:
        sklearn = require("sklearn.feature_extraction.text", "curation", "TF-IDF")
        # alternate_sign would let colliding words cancel, and counts go below zero.
        hasher = sklearn.HashingVectorizer(
            n_features=self.features, ngram_range=(1, self.ngrams), alternate_sign=False, norm=None
        )
        return hasher.transform(texts)

    def _vectors(self, texts: Sequence[str]) -> Any:
        counts = self._counts(texts)
        counts.data *= self._idf[counts.indices]
        from sklearn.preprocessing import normalize

        return normalize(counts, copy=False)
