"""From scores to a selection: top-K, threshold, budgets, duplicates and length buckets, on plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelwright.errors import UserError

_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How many documents are kept. Several limits together all hold; none keeps every document that has a score.

    Attributes:
        top: Most documents to keep.
        threshold: Keep only scores strictly above it (ZIP-FIT's "alignment > tau").
        token_budget: Documents are taken by rank while they fit: the first that would exceed the budget ends it.
        byte_budget: The same in UTF-8 bytes.
        length_buckets: Documents are ranked within this many groups of equal size by length, and the groups take
            turns, so that a score which favours short (or long) documents cannot fill the selection with them.
        dedup: Of documents that are equal but for case, white space and punctuation, only the best-ranked is kept.
    """

    top: int | None = None
    threshold: float | None = None
    token_budget: int | None = None
    byte_budget: int | None = None
    length_buckets: int = 1
    dedup: bool = False

    def __post_init__(self) -> None:
        for name in ("top", "token_budget", "byte_budget", "length_buckets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")
        if self.threshold is not None and np.isnan(self.threshold):
            raise UserError("threshold must be a number, not NaN.")

    @property
    def keeps_all(self) -> bool:
        """Whether no limit is set."""
        return self.top is None and self.threshold is None and self.token_budget is None and self.byte_budget is None


def choose(
    scores: np.ndarray,
    rule: Rule,
    *,
    lengths: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    hashes: np.ndarray | None = None,
    blocked: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the indices of the chosen documents, best first; ties in the order of the pool.

    Args:
        scores: float64, shape ``(n,)``; NaN is never chosen.
        rule: What to keep.
        lengths: UTF-8 bytes, shape ``(n,)``; for ``byte_budget`` and ``length_buckets``.
        tokens: Tokens, shape ``(n,)``; for ``token_budget``.
        hashes: Equal for duplicates, shape ``(n,)``; for ``dedup``.
        blocked: bool, shape ``(n,)``: documents that may not be chosen.

    Raises:
        UserError: ``top`` is larger than the pool, or nothing can be chosen.
    """
    if rule.top is not None and rule.top > len(scores):
        raise UserError(f"top is {rule.top:,}, but the pool has only {len(scores):,} documents: choose a smaller top.")
    eligible = ~np.isnan(scores)
    if not eligible.any():
        raise UserError("No document of the pool has a score (all are empty, or the method dropped all of them).")
    best = np.nanmax(scores)
    if blocked is not None:
        eligible &= ~blocked
        if not eligible.any():
            raise UserError("Every document of the pool that has a score shares text with the held-out documents.")
    if rule.threshold is not None:
        eligible &= scores > rule.threshold
        if not eligible.any():
            raise UserError(f"No document has a score above {rule.threshold:g}; the best of the pool has {best:.4g}.")
    order = np.flatnonzero(eligible)
    order = order[np.argsort(-scores[order], kind="stable")]
    if rule.dedup:
        assert hashes is not None
        order = order[np.sort(np.unique(hashes[order], return_index=True)[1])]
    if rule.length_buckets > 1:
        assert lengths is not None
        order = _take_turns(order, lengths, rule.length_buckets)
    if rule.top is not None:
        order = order[: rule.top]
    for budget, sizes, unit in ((rule.token_budget, tokens, "tokens"), (rule.byte_budget, lengths, "bytes")):
        if budget is None:
            continue
        assert sizes is not None
        first = order[0]
        order = order[: np.searchsorted(np.cumsum(sizes[order], dtype=np.int64), budget, side="right")]
        if len(order) == 0:
            raise UserError(
                f"The best document alone has {int(sizes[first]):,} {unit}, more than the budget of {budget:,}: give a "
                f"larger budget, or cut long documents first."
            )
    return order


def _take_turns(order: np.ndarray, lengths: np.ndarray, buckets: int) -> np.ndarray:
    """Interleaves length buckets, so that every beginning of the result has about as many documents of each."""
    edges = np.quantile(lengths[order], np.arange(1, buckets) / buckets)
    # Equal lengths share a bucket, so that a pool of one length is left as it is.
    bucket = np.searchsorted(edges, lengths[order], side="left")
    by_bucket = np.argsort(bucket, kind="stable")
    sizes = np.bincount(bucket, minlength=buckets)
    starts = np.cumsum(sizes) - sizes
    turn = np.empty(len(order), dtype=np.int64)
    turn[by_bucket] = np.arange(len(order)) - np.repeat(starts, sizes)
    # Within a turn the documents keep their order by score. Positions are fractions of the bucket, so that buckets
    # of uneven size (many equal lengths) run out together.
    position = (turn + 0.5) / sizes[bucket]
    return order[np.argsort(position, kind="stable")]


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Returns minimum, 5%, 25%, 50%, 75%, 95% and maximum of the finite values, or None without any."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    names = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    return dict(zip(names, np.quantile(values, list(names.values())).tolist()))


def length_correlation(scores: np.ndarray, lengths: np.ndarray) -> dict[str, float | None]:
    """Correlation of score with length over documents with a finite score.

    Args:
        scores: float64, shape ``(n,)``.
        lengths: Bytes, shape ``(n,)``.

    Returns:
        ``spearman`` (of ranks, ties averaged) and ``pearson``; None where one of the two is constant.
    """
    known = np.isfinite(scores)
    if not known.all():
        scores, lengths = scores[known], lengths[known]
    return {"spearman": _pearson(_ranks(scores), _ranks(lengths)), "pearson": _pearson(scores, lengths)}


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties averaged. float32 holds them exactly up to eight million, in half the memory."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))[: len(values)]
    del ordered
    counts = np.diff(starts, append=len(values))
    ranks = np.empty(len(values), dtype=np.float32)
    ranks[order] = np.repeat((starts + (counts + 1) / 2).astype(np.float32), counts)
    return ranks


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    mean_a, mean_b = a.mean(dtype=np.float64), b.mean(dtype=np.float64)
    products = np.zeros(3)
    # In blocks, so that no second copy of a large pool's columns is made.
    for start in range(0, len(a), _BLOCK):
        x, y = a[start : start + _BLOCK] - mean_a, b[start : start + _BLOCK] - mean_b
        products += x @ x, x @ y, y @ y
    return float(np.clip(products[1] / np.sqrt(products[0] * products[2]), -1, 1))
