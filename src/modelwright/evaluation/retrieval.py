"""Retrieval by embeddings: does the right key come first for a query, and the right query for a key?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelwright import provenance
from modelwright.errors import UserError
from modelwright.models.loading import describe
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from modelwright.training.contrastive.encoders import PairEncoder
    from modelwright.training.contrastive.pairs import Pairs

#: Rows and columns of the tiles in which scores are computed.
BLOCK = 2048


@torch.no_grad()
def retrieval_metrics(
    queries: Tensor,
    keys: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    labels: Tensor | None = None,
    block_size: int = BLOCK,
    groups: Tensor | None = None,
) -> dict[str, float]:
    """Ranks all keys for each query and all queries for each key by their dot product.

    The rank of a query is 1 + the number of wrong keys whose score is at least that of the best right key: a tie counts
    against the model, so that one which gives everything the same embedding is last, not first. The same the other way
    round; keys that belong to no query are wrong answers, but are asked for none.

    Scores are computed in tiles; memory grows with m + n, never with m * n.

    Args:
        queries: (m, d), floating point; half precision is brought to float32. Rows should have length 1 if cosines are
            meant.
        keys: (n, d).
        ks: The k of recall@k: the share of ranks that are k or less.
        labels: (m,) the right key of each query, by default key i of query i; or (p, 2) pairs of a query and a right
            key of it, where a query has several. Every query must have one.
        block_size: Rows and columns of a tile; the result depends on it by no more than the rounding of dot products.
        groups: (n,) int, only with one label a query: keys of one number are right together, such as captions with the
            same text.

    Returns:
        For ``query_to_key`` and ``key_to_query`` each: ``…_recall@k``, ``…_mrr`` (mean of 1 / rank) and
        ``…_median_rank``; and ``mean_recall@k`` of both directions.

    Raises:
        UserError: Shapes do not fit, a label is out of range, values are not finite, or there is nothing to rank.
    """
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise UserError(
            f"Queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be matrices of the same width."
        )
    if not len(queries) or not len(keys):
        raise UserError("There are no queries or no keys to rank.")
    if not (queries.is_floating_point() and keys.is_floating_point()):
        raise UserError(f"Embeddings must be floating point, not {queries.dtype} and {keys.dtype}.")
    if block_size < 1 or not ks or min(ks) < 1:
        raise UserError(f"The block size and every k must be at least 1, not {block_size} and {list(ks)}.")
    kind = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    queries, keys = queries.to(kind), keys.to(device=queries.device, dtype=kind)
    if not (torch.isfinite(queries).all() and torch.isfinite(keys).all()):
        raise UserError("Embeddings hold values that are not finite, so they cannot be ranked.")
    right = _right(len(queries), len(keys), labels, groups, queries.device)
    found: dict[str, float] = {}
    for name, ranks in zip(("query_to_key", "key_to_query"), _ranks(queries, keys, right, block_size)):
        for k in ks:
            found[f"{name}_recall@{k}"] = (ranks <= k).double().mean().item()
        found[f"{name}_mrr"] = ranks.double().reciprocal().mean().item()
        found[f"{name}_median_rank"] = _median(ranks)
    for k in ks:
        found[f"mean_recall@{k}"] = (found[f"query_to_key_recall@{k}"] + found[f"key_to_query_recall@{k}"]) / 2
    return found


def paired_metrics(
    queries: Tensor, keys: Tensor, identities: Sequence[tuple[Any, str]], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Measures retrieval among pairs, some of which share an image or a text.

    Queries that are the same are one query, keys with the same text are one key; whatever belongs together in some pair
    is right. So five captions of one image are five right answers to it, and a caption that stands beside two images is
    right for both. Without this a model would be blamed for duplicates in the data.

    Args:
        queries: (m, d), row i of pair i.
        keys: (m, d).
        identities: (m,) what tells queries and keys apart: ``Pairs.identities``.
        ks: See :func:`retrieval_metrics`.

    Returns:
        See :func:`retrieval_metrics`; and the numbers of different ``queries`` and ``keys``, and of ``pairs``.

    Raises:
        UserError: See :func:`retrieval_metrics`; or the numbers of rows differ.
    """
    if not len(queries) == len(keys) == len(identities):
        raise UserError(f"{len(queries)} queries, {len(keys)} keys and {len(identities)} identities are not pairs.")
    query_rows, query_numbers = _distinct([query for query, _ in identities])
    key_rows, key_numbers = _distinct([key for _, key in identities])
    labels = torch.tensor(sorted(set(zip(query_numbers, key_numbers)))).reshape(-1, 2)
    found = retrieval_metrics(queries[query_rows], keys[key_rows], ks, labels)
    return {**found, "queries": len(query_rows), "keys": len(key_rows), "pairs": len(identities)}


def evaluate_retrieval(
    encoder: PairEncoder,
    pairs: Pairs,
    batch_size: int = 64,
    progress: Progress | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    workers: int = 0,
) -> dict[str, float]:
    """Embeds pairs without gradient, a mini-batch at a time, and measures retrieval in both directions.

    Hard negatives are left out. More pairs are harder, so compare only numbers of the same pairs.

    Args:
        encoder: Put in evaluation mode for the time, and back.
        pairs: Held-out pairs.
        batch_size: Pairs in the encoder at once.
        progress: Told of each pair.
        ks: See :func:`retrieval_metrics`.
        workers: Processes that decode and tokenise ahead.

    Returns:
        See :func:`paired_metrics`.

    Raises:
        UserError: The encoder does not fit the pairs, a pair cannot be read, or embeddings are not finite.
    """
    from modelwright.training.contrastive.batches import prepared

    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    if encoder.kind != pairs.kind:
        raise UserError(f"The model embeds {encoder.kind} pairs, but the data are {pairs.kind} pairs.")
    progress = progress or Silent()
    progress.start("evaluate", len(pairs))
    indices = [list(range(i, min(i + batch_size, len(pairs)))) for i in range(0, len(pairs), batch_size)]
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            batches = prepared(pairs, encoder.collator, indices, workers=workers)
            for rows, batch in zip(indices, batches, strict=True):
                moved = {name: t.to(encoder.device) for name, t in batch.items() if not name.startswith("negative_")}
                encoded = encoder(moved)
                queries.append(encoded.queries)
                keys.append(encoded.keys)
                progress.advance(len(rows))
    finally:
        encoder.train(was_training)
    return paired_metrics(torch.cat(queries), torch.cat(keys), pairs.identities(), ks)


def as_results(
    encoder: PairEncoder, found: dict[str, float], *, task: str, ks: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """Lays out the result of :func:`evaluate_retrieval` as lm-eval does."""
    metrics = {f"{name},none": value for name, value in found.items() if name not in ("queries", "keys", "pairs")}
    return {
        "results": {task: {"alias": task, **metrics}},
        "configs": {
            task: {
                "task": task,
                "output_type": "retrieval",
                "metadata": {"kind": encoder.kind, "ks": list(ks), "max_tokens": encoder.collator.max_tokens},
            }
        },
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {name.split(",")[0]: "median_rank" not in name for name in metrics}},
        "n-samples": {task: {"original": found["pairs"], "effective": found["pairs"]}},
        "config": {
            "model": "hf",
            "model_args": {"name": encoder.model.config.name_or_path, **describe(encoder.model)},
            "batch_size": batch_size,
            "device": str(encoder.device),
        },
        "counts": {name: found[name] for name in ("pairs", "queries", "keys")},
        "software": provenance.versions(),
    }


def _distinct(names: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Returns the rows where a name stands for the first time, and the number of each row's name."""
    rows: list[int] = []
    numbers: dict[Any, int] = {}
    for row, name in enumerate(names):
        if name not in numbers:
            numbers[name] = len(rows)
            rows.append(row)
    return rows, [numbers[name] for name in names]


class _Right:
    """Which keys are right for which queries: equal numbers, or a list of pairs; asked tile by tile."""

    def __init__(self, query_numbers: Tensor, key_numbers: Tensor, pairs: Tensor | None) -> None:
        self.query_numbers, self.key_numbers = query_numbers, key_numbers
        self.pairs = None if pairs is None else pairs[pairs[:, 0].argsort()]

    def tile(self, rows: slice, columns: slice) -> Tensor | None:
        """Returns a mask (rows, columns), or None if nothing in it is right."""
        if self.pairs is None:
            ours, theirs = self.query_numbers[rows], self.key_numbers[columns]
            return ours[:, None] == theirs[None, :] if torch.isin(ours, theirs).any() else None
        first, last = torch.searchsorted(self.pairs[:, 0].contiguous(), self.pairs.new_tensor([rows.start, rows.stop]))
        here = self.pairs[first:last]
        here = here[(here[:, 1] >= columns.start) & (here[:, 1] < columns.stop)]
        if not len(here):
            return None
        mask = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device=here.device)
        mask[here[:, 0] - rows.start, here[:, 1] - columns.start] = True
        return mask


def _right(m: int, n: int, labels: Tensor | None, groups: Tensor | None, device: torch.device) -> _Right:
    if labels is None:
        if n < m:
            raise UserError(f"There are {m} queries and {n} keys: without labels, key i belongs to query i.")
        labels = torch.arange(m)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim not in (1, 2):
        raise UserError(f"Labels must be integers, (m,) or (p, 2), not {labels.dtype} {tuple(labels.shape)}.")
    labels = labels.to(device=device, dtype=torch.int64)
    keys = labels if labels.ndim == 1 else labels[:, -1]
    if (labels.ndim == 1 and len(labels) != m) or (labels.ndim == 2 and labels.shape[1] != 2):
        raise UserError(f"Labels {tuple(labels.shape)} do not fit {m} queries: expected ({m},) or (p, 2).")
    if len(keys) and (keys.min() < 0 or keys.max() >= n):
        raise UserError(f"Labels go from {int(keys.min())} to {int(keys.max())}, but there are {n} keys.")
    if labels.ndim == 2:
        if groups is not None:
            raise UserError("Groups and several labels a query exclude each other.")
        counts = torch.zeros(m, dtype=torch.int64, device=device)
        if labels[:, 0].numel() and (labels[:, 0].min() < 0 or labels[:, 0].max() >= m):
            raise UserError(f"Labels name queries beyond the {m} that there are.")
        counts[labels[:, 0]] = 1
        if not counts.all():
            raise UserError(f"Query {int(counts.argmin())} has no right key.")
        return _Right(labels, labels, labels)
    if groups is None:
        groups = torch.arange(n)
    if groups.shape != (n,) or groups.is_floating_point():
        raise UserError(f"Groups must be {n} integers, one for each key, not {groups.dtype} {tuple(groups.shape)}.")
    groups = groups.to(device)
    return _Right(groups[labels], groups, None)


def _ranks(queries: Tensor, keys: Tensor, right: _Right, block: int) -> tuple[Tensor, Tensor]:
    """Ranks of all queries, and of the keys that belong to one; int64."""
    m, n = len(queries), len(keys)
    low = torch.finfo(queries.dtype).min
    best_key, best_query = queries.new_full((m,), low), queries.new_full((n,), low)
    asked = torch.zeros(n, dtype=torch.bool, device=queries.device)
    tiles = [
        (slice(i, min(i + block, m)), slice(j, min(j + block, n)))
        for i in range(0, m, block)
        for j in range(0, n, block)
    ]
    # Scores of a tile are computed twice in the same way, so that a score compares equal to itself.
    for rows, columns in tiles:
        if (mask := right.tile(rows, columns)) is not None:
            scores = (queries[rows] @ keys[columns].T).masked_fill_(~mask, low)
            best_key[rows] = torch.maximum(best_key[rows], scores.amax(1))
            best_query[columns] = torch.maximum(best_query[columns], scores.amax(0))
            asked[columns] |= mask.any(0)
    before_key = torch.ones(m, dtype=torch.int64, device=queries.device)
    before_query = torch.ones(n, dtype=torch.int64, device=queries.device)
    for rows, columns in tiles:
        scores = queries[rows] @ keys[columns].T
        ahead_of_key, ahead_of_query = scores >= best_key[rows, None], scores >= best_query[None, columns]
        if (mask := right.tile(rows, columns)) is not None:
            ahead_of_key &= ~mask
            ahead_of_query &= ~mask
        before_key[rows] += ahead_of_key.sum(1)
        before_query[columns] += ahead_of_query.sum(0)
    return before_key, before_query[asked]


def _median(ranks: Tensor) -> float:
    ordered = ranks.sort().values
    middle = len(ordered) // 2
    return (ordered[middle].item() + ordered[~middle].item()) / 2
