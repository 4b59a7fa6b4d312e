"""SemDeDup (Abbas et al., 2023) and D4 (Tirumala et al., 2023): duplicates and prototypes by embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from modelwright.curation.selector import SelectorMixin
from modelwright.curation.semdedup.embed import Pooling, embed_all, load_embedder
from modelwright.errors import UserError, require
from modelwright.options import Arg

__all__ = ["D4Selector", "SemDedupSelector", "duplicate_distance", "prototype_distance"]

_BLOCK = 1024


@dataclass(kw_only=True)
class SemDedupSelector(SelectorMixin):
    r"""Drops semantic near duplicates (SemDeDup, algorithm 1). It needs no target.

    Embeddings are clustered by k-means. In each cluster the documents are ordered from the centroid's farthest to its
    nearest, and a document's score is :math:`1-\\max` cosine to those before it: dropping the scores below
    :math:`\\epsilon` keeps, of each group of near duplicates, the one farthest from the centroid. So ``top`` chooses
    :math:`\\epsilon` by the number of documents, as the paper does. Memory: all embeddings, float32.
    """

    encoder: Annotated[
        str, Arg("Model that embeds: a folder or hub id (encoder, causal LM or sentence-transformers).")
    ] = ""
    epsilon: Annotated[float, Arg("Documents nearer than this (1 - cosine) to an earlier one are dropped.")] = 0.05
    clusters: Annotated[int | None, Arg("Clusters; by default the square root of the pool's size.")] = None
    pooling: Annotated[Pooling, Arg("Hidden states that embed a text: mean, last token, or auto.")] = "auto"
    max_tokens: Annotated[int, Arg("Tokens of each document that are embedded.")] = 512
    batch_size: Annotated[int, Arg("Documents per forward pass.")] = 32
    seed: Annotated[int, Arg("Seed of k-means.")] = 0

    needs_target: ClassVar[bool] = False
    whole_pool: ClassVar[bool] = True
    decides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 2:
            raise UserError(f"epsilon is 1 - cosine, so it must be between 0 and 2, not {self.epsilon}.")
        _check_common(self.clusters, self.pooling, self.max_tokens, self.batch_size)

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> SemDedupSelector:
        """Loads the encoder; the target is not used.

        Raises:
            UserError: There is no encoder, or it cannot be loaded.
        """
        _embedder(self)
        return self

    def score_pool(self, pool: Iterable[str], workers: int = 1) -> np.ndarray:
        """Returns 1 - cosine to the nearest earlier document, float64, one per document; NaN for those dropped."""
        vectors, positions, count = embed_all(_embedder(self), pool)
        scores = np.full(count, np.nan)
        if len(vectors):
            labels = cluster(vectors, self.clusters, self.seed)
            distances = duplicate_distance(vectors, labels)
            scores[positions] = np.where(distances >= self.epsilon, distances, np.nan)
        return scores

    def details(self) -> dict[str, Any]:
        """Returns the version of scikit-learn, whose k-means this uses."""
        return {"scikit-learn": require("sklearn", "curation", "SemDeDup").__version__}


@dataclass(kw_only=True)
class D4Selector(SelectorMixin):
    """Deduplicates, then prefers what is far from the prototypes (D4, section 3.4). It needs no target.

    SemDeDup keeps the fraction :math:`R_{dedup}`; the survivors are clustered anew, and a document's score is
    1 - cosine to its centroid (SSL prototypes, Sorscher et al., 2022), so that a limit such as ``top`` drops the most
    prototypical. Memory: all embeddings, float32.
    """

    encoder: Annotated[
        str, Arg("Model that embeds: a folder or hub id (encoder, causal LM or sentence-transformers).")
    ] = ""
    dedup_fraction: Annotated[float, Arg("Share of the pool that SemDeDup keeps (R_dedup).")] = 0.75
    clusters: Annotated[int | None, Arg("Clusters; by default the square root of the number of documents.")] = None
    pooling: Annotated[Pooling, Arg("Hidden states that embed a text: mean, last token, or auto.")] = "auto"
    max_tokens: Annotated[int, Arg("Tokens of each document that are embedded.")] = 512
    batch_size: Annotated[int, Arg("Documents per forward pass.")] = 32
    seed: Annotated[int, Arg("Seed of k-means.")] = 0

    needs_target: ClassVar[bool] = False
    whole_pool: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.dedup_fraction <= 1:
            raise UserError(f"dedup_fraction must be above 0 and at most 1, not {self.dedup_fraction}.")
        _check_common(self.clusters, self.pooling, self.max_tokens, self.batch_size)

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> D4Selector:
        """Loads the encoder; the target is not used.

        Raises:
            UserError: There is no encoder, or it cannot be loaded.
        """
        _embedder(self)
        return self

    def score_pool(self, pool: Iterable[str], workers: int = 1) -> np.ndarray:
        """Returns 1 - cosine to the centroid, float64, one per document; NaN for those dropped as duplicates."""
        vectors, positions, count = embed_all(_embedder(self), pool)
        scores = np.full(count, np.nan)
        if len(vectors):
            distances = duplicate_distance(vectors, cluster(vectors, self.clusters, self.seed))
            keep = max(1, round(self.dedup_fraction * len(vectors)))
            kept = np.sort(np.argsort(-distances, kind="stable")[:keep])
            labels = cluster(vectors[kept], self.clusters, self.seed)
            scores[positions[kept]] = prototype_distance(vectors[kept], labels)
        return scores

    def details(self) -> dict[str, Any]:
        """Returns the version of scikit-learn, whose k-means this uses."""
        return {"scikit-learn": require("sklearn", "curation", "D4").__version__}


def cluster(vectors: np.ndarray, clusters: int | None, seed: int) -> np.ndarray:
    """Clusters unit vectors by mini-batch k-means.

    Args:
        vectors: float32, shape ``(n, d)``, rows of length 1.
        clusters: Number of clusters; None takes the square root of n (D4, appendix A).
        seed: Seed.

    Returns:
        Cluster of each row, int64, shape ``(n,)``.
    """
    library = require("sklearn.cluster", "curation", "k-means clustering")
    wanted = clusters or max(1, round(len(vectors) ** 0.5))
    model = library.MiniBatchKMeans(min(wanted, len(vectors)), random_state=seed, n_init=3)
    return model.fit_predict(vectors).astype(np.int64)


def duplicate_distance(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns how far each row is from the nearest row before it in its cluster.

    In a cluster, rows are ordered from the farthest to the nearest to the centroid, ties by index.

    Args:
        vectors: float32, shape ``(n, d)``, rows of length 1.
        labels: Cluster of each row, shape ``(n,)``.

    Returns:
        1 - largest cosine, float64, shape ``(n,)``; 2 for the first of a cluster.
    """
    distances = np.full(len(vectors), 2.0)
    for members, nearness in _by_cluster(vectors, labels):
        ordered = members[np.argsort(nearness, kind="stable")]
        rows = vectors[ordered]
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            cosines = block @ rows[: start + len(block)].T
            # Row r of the block may look at the rows before it only.
            cosines[np.arange(cosines.shape[1])[None, :] >= start + np.arange(len(block))[:, None]] = -1
            distances[ordered[start : start + len(block)]] = 1 - np.clip(cosines.max(axis=1).astype(np.float64), -1, 1)
    return distances


def prototype_distance(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns 1 - cosine of each row to its cluster's centroid, float64, shape ``(n,)``; arguments as above."""
    distances = np.empty(len(vectors))
    for members, nearness in _by_cluster(vectors, labels):
        distances[members] = 1 - nearness
    return distances


def _by_cluster(vectors: np.ndarray, labels: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Gives each cluster's members (ascending) and their cosine to its centroid, to six digits.

    Rounding makes equal documents tie, so that the order among them is that of the pool.
    """
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        centroid = vectors[members].mean(axis=0, dtype=np.float64)
        norm = np.linalg.norm(centroid)
        yield members, np.round(vectors[members] @ (centroid / norm if norm else centroid), 6)


def _check_common(clusters: int | None, pooling: str, max_tokens: int, batch_size: int) -> None:
    if pooling not in ("auto", "mean", "last"):
        raise UserError(f"pooling must be auto, mean or last, not {pooling!r}.")
    for name, value in (("clusters", clusters), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")


def _embedder(selector: Any) -> Callable[[Sequence[str]], np.ndarray]:
    """Loads the selector's encoder once."""
    if not selector.encoder:
        raise UserError("An encoder is needed: give the folder or hub id of one (encoder, --encoder).")
    if "_embed" not in selector.__dict__:
        selector._embed = load_embedder(selector.encoder, selector.pooling, selector.max_tokens, selector.batch_size)
    return selector._embed
