"""Choosing rows of a ``datasets.Dataset``, and the numbers that describe any selection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright.curation.choose import Rule, choose, length_correlation, quantiles
from modelwright.curation.overlap import duplicate_hash
from modelwright.curation.scoring import TokenCounter, score_texts, utf8_length
from modelwright.curation.selector import Selector
from modelwright.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import datasets


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionReport:
    """What was chosen, in numbers.

    Attributes:
        pool_documents: Documents read.
        documents: Documents chosen.
        unscored: Documents without a score (blank, or dropped by the method), which are never chosen.
        pool_bytes: UTF-8 bytes of the pool's texts.
        bytes: UTF-8 bytes of the chosen texts.
        tokens: Tokens of the chosen texts, without special tokens; None without a tokenizer.
        lowest_score: Score of the last document chosen.
        score_quantiles: Quantiles of the scores, for ``pool`` and ``chosen``.
        length_correlation: ``spearman`` and ``pearson`` correlation of score with length in bytes over the pool.
        bytes_per_document: Mean length, for ``pool`` and ``chosen``: the two differ when the score favours a length.
    """

    pool_documents: int
    documents: int
    unscored: int
    pool_bytes: int
    bytes: int
    tokens: int | None
    lowest_score: float | None
    score_quantiles: dict[str, dict[str, float] | None]
    length_correlation: dict[str, float | None]
    bytes_per_document: dict[str, float]


def make_report(
    scores: np.ndarray, lengths: np.ndarray, chosen: np.ndarray, tokens: int | None = None
) -> SelectionReport:
    """Sums up a selection.

    Args:
        scores: float64, shape ``(n,)``.
        lengths: UTF-8 bytes, shape ``(n,)``.
        chosen: Indices, in rank order.
        tokens: Tokens of the chosen documents.
    """
    lowest = float(scores[chosen].min())
    return SelectionReport(
        pool_documents=len(scores),
        documents=len(chosen),
        unscored=int(np.isnan(scores).sum()),
        pool_bytes=int(lengths.sum(dtype=np.int64)),
        bytes=int(lengths[chosen].sum(dtype=np.int64)),
        tokens=tokens,
        lowest_score=lowest if math.isfinite(lowest) else None,
        score_quantiles={"pool": quantiles(scores), "chosen": quantiles(scores[chosen])},
        length_correlation=length_correlation(scores, lengths),
        bytes_per_document={"pool": float(lengths.mean()), "chosen": float(lengths[chosen].mean())},
    )


def check_rule(selector: Selector, rule: Rule) -> None:
    """Refuses to keep everything, unless the method itself decides what to drop.

    Raises:
        UserError: The rule has no limit.
    """
    if rule.keeps_all and not selector.decides:
        raise UserError(
            "It is not said how much to keep: give one of top (k), token_budget, byte_budget or threshold "
            "(--top, --token-budget, --byte-budget, --threshold)."
        )


def token_counter(tokenizer: Any) -> TokenCounter:
    """Returns a function that counts tokens without special tokens.

    Args:
        tokenizer: A Hugging Face tokenizer, or the path or hub id of one.
    """
    if isinstance(tokenizer, str | Path):
        from modelwright.models.loading import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)

    def count(texts: Sequence[str]) -> list[int]:
        # verbose=False: documents longer than the model's context are meant to be counted, not warned of.
        return [len(i) for i in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    return count


def select(
    dataset: datasets.Dataset,
    scores: np.ndarray | Sequence[float],
    k: int | None = None,
    threshold: float | None = None,
    token_budget: int | None = None,
    tokenizer: Any = None,
    dedup: bool = False,
    *,
    byte_budget: int | None = None,
    length_buckets: int = 1,
    text_column: str = "text",
    score_name: str = "score",
) -> datasets.Dataset:
    """Keeps the best rows of a dataset, given one score per row.

    Args:
        dataset: The pool.
        scores: Shape ``(len(dataset),)``, higher = better; NaN is never chosen. Ties keep the dataset's order.
        k: Most rows to keep.
        threshold: Keep only scores strictly above it.
        token_budget: Take rows by rank while they fit; needs ``tokenizer``.
        tokenizer: Hugging Face tokenizer, or a path or hub id.
        dedup: Keep only the best of rows whose texts have the same words.
        byte_budget: The same as ``token_budget`` in UTF-8 bytes.
        length_buckets: See :class:`~modelwright.curation.choose.Rule`.
        text_column: Column that holds the text.
        score_name: Column for the score.

    Returns:
        The chosen rows in rank order, with the columns ``score_name`` (float64) and ``rank`` (int64, 1 = best).

    Raises:
        UserError: A bad argument, no or too few rows, or a text column that is missing or holds no text.
    """
    return _select(
        dataset,
        np.asarray(scores, dtype=np.float64),
        _rule(k, threshold, token_budget, byte_budget, length_buckets, dedup),
        tokenizer,
        text_column,
        score_name,
    )[0]


def select_with(
    selector: Selector,
    dataset: datasets.Dataset,
    *,
    k: int | None = None,
    threshold: float | None = None,
    token_budget: int | None = None,
    byte_budget: int | None = None,
    tokenizer: Any = None,
    dedup: bool = False,
    length_buckets: int = 1,
    text_column: str = "text",
    workers: int = 1,
) -> tuple[datasets.Dataset, SelectionReport]:
    """Scores a dataset with a fitted selector and keeps the best rows; arguments as for :func:`select`.

    Returns:
        The chosen rows, and numbers about them.
    """
    rule = _rule(k, threshold, token_budget, byte_budget, length_buckets, dedup)
    check_rule(selector, rule)
    texts = _Column(dataset, text_column)
    waiting = getattr(selector, "waiting_target", None)
    if selector.needs_pool and waiting is not None:
        selector.fit(waiting, texts)
    if selector.whole_pool:
        scores = np.array(selector.score_pool(texts, workers), dtype=np.float64)
        scores[[not text or text.isspace() for text in texts]] = np.nan
    else:
        scores = np.concatenate(
            [np.empty(0), *(score_texts(selector, batch, workers) for batch in texts.batches())], dtype=np.float64
        )
    return _select(dataset, scores, rule, tokenizer, text_column, selector.score_name)


def _rule(
    k: int | None,
    threshold: float | None,
    token_budget: int | None,
    byte_budget: int | None,
    length_buckets: int,
    dedup: bool,
) -> Rule:
    if k is not None and k < 1:
        raise UserError(f"k must be at least 1, not {k}.")
    return Rule(
        top=k,
        threshold=threshold,
        token_budget=token_budget,
        byte_budget=byte_budget,
        length_buckets=length_buckets,
        dedup=dedup,
    )


def _select(
    dataset: datasets.Dataset, scores: np.ndarray, rule: Rule, tokenizer: Any, text_column: str, score_name: str
) -> tuple[datasets.Dataset, SelectionReport]:
    texts = _Column(dataset, text_column)
    if scores.shape != (len(dataset),):
        raise UserError(f"scores has the shape {scores.shape}, but the dataset has {len(dataset)} rows: give one each.")
    if rule.token_budget is not None and tokenizer is None:
        raise UserError("token_budget needs a tokenizer: give one, or use byte_budget.")
    lengths = np.fromiter((utf8_length(t) for t in texts), dtype=np.int64, count=len(dataset))
    tokens = None
    if rule.token_budget is not None:
        count = token_counter(tokenizer)
        tokens = np.array([n for batch in texts.batches() for n in count(batch)], dtype=np.int64)
    hashes = np.array([duplicate_hash(t) for t in texts], dtype=np.uint64) if rule.dedup else None
    chosen = choose(scores, rule, lengths=lengths, tokens=tokens, hashes=hashes)
    replaced = [c for c in (score_name, "rank") if c in dataset.column_names]
    result = dataset.remove_columns(replaced).select(chosen)
    result = result.add_column(score_name, scores[chosen].tolist()).add_column("rank", list(range(1, len(chosen) + 1)))
    report = make_report(scores, lengths, chosen, None if tokens is None else int(tokens[chosen].sum()))
    return result, report


class _Column(Iterable[str]):
    """The text column of a dataset, a batch at a time, checked."""

    def __init__(self, dataset: datasets.Dataset, column: str) -> None:
        import datasets as hf

        if not isinstance(dataset, hf.Dataset):
            what = f"a {type(dataset).__name__}"
            raise UserError(f"select needs a datasets.Dataset, not {what}: choose a split, or write it to a file.")
        if column not in dataset.column_names:
            raise UserError(
                f"The dataset has no column '{column}' (text_column): {did_you_mean(column, dataset.column_names)}"
            )
        self.dataset, self.column = dataset.select_columns([column]).with_format(None), column

    def batches(self) -> Iterator[list[str]]:
        row = 0
        for batch in self.dataset.iter(batch_size=1024):
            for text in batch[self.column]:
                if not isinstance(text, str):
                    kind = "null" if text is None else f"of type {type(text).__name__}"
                    raise UserError(f"Row {row} of the dataset: the column '{self.column}' is {kind}, not text.")
                row += 1
            yield batch[self.column]

    def __iter__(self) -> Iterator[str]:
        return (text for batch in self.batches() for text in batch)
