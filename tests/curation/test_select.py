"""Selecting from a datasets.Dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from modelwright.curation.select import select
from modelwright.curation.selector import SelectorMixin
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer

POOL = Dataset.from_dict({"text": ["aa", "b", "A A", "cccc", ""], "id": [10, 11, 12, 13, 14]})


@dataclass(kw_only=True)
class Length(SelectorMixin):
    score_name: ClassVar[str] = "alignment"

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        return np.array([len(t) for t in texts], dtype=float)


@dataclass(kw_only=True)
class Pooled(SelectorMixin):
    needs_pool: ClassVar[bool] = True

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> Pooled:
        self.waiting_target = list(target) if pool is None else None
        self.seen = None if pool is None else [list(pool), list(pool)]
        return self

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        assert self.seen == [POOL["text"], POOL["text"]]
        return np.arange(len(texts), dtype=float)


def test_rows_come_in_rank_order_with_score_and_rank() -> None:
    chosen = select(POOL, [0.5, 0.9, 0.5, np.nan, 0.1], k=3)
    assert chosen["id"] == [11, 10, 12]
    assert chosen["score"] == [0.9, 0.5, 0.5]
    assert chosen["rank"] == [1, 2, 3]
    assert chosen.column_names == ["text", "id", "score", "rank"]
    assert POOL.column_names == ["text", "id"]  # the input is never modified
    assert chosen.features["score"].dtype == "float64"
    assert chosen.features["rank"].dtype == "int64"


def test_dedup_and_budgets() -> None:
    scores = [0.5, 0.4, 0.9, 0.1, 0.0]
    assert select(POOL, scores, k=2)["id"] == [12, 10]
    assert select(POOL, scores, threshold=0.1)["id"] == [12, 10, 11]
    assert select(POOL, scores, byte_budget=6)["id"] == [12, 10, 11]
    assert select(POOL, scores, k=5, dedup=True)["id"] == [12, 10, 11, 13, 14]
    same = Dataset.from_dict({"text": ["one two", "One, two!", "three"]})
    assert select(same, [0.1, 0.2, 0.0], k=3, dedup=True)["text"] == ["One, two!", "three"]
    tokenizer = byte_tokenizer()
    chosen = select(POOL, scores, token_budget=5, tokenizer=tokenizer)
    assert chosen["id"] == [12, 10]
    assert sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in chosen["text"]) == 5


def test_a_second_selection_replaces_score_and_rank() -> None:
    twice = select(select(POOL, [1, 2, 3, 4, 5], k=3), [1, 2, 3], k=2)
    assert twice["rank"] == [1, 2]
    assert twice["score"] == [3.0, 2.0]


def test_the_selector_adds_its_own_column_and_a_report() -> None:
    selector = Length()
    chosen = selector.select(POOL, k=2)
    assert chosen["text"] == ["cccc", "A A"]
    assert chosen["alignment"] == [4.0, 3.0]
    assert selector.report.documents == 2
    assert selector.report.pool_documents == 5
    assert selector.report.unscored == 1  # the blank one, whatever the method says
    assert selector.report.bytes == 7
    assert selector.report.length_correlation == {"spearman": pytest.approx(1), "pearson": pytest.approx(1)}
    assert selector.report.score_quantiles["chosen"]["min"] == 3.0
    assert selector.report.bytes_per_document == {"pool": 2.0, "chosen": 3.5}


def test_a_fit_that_waits_for_its_pool_gets_it() -> None:
    assert Pooled().fit(["x"]).select(POOL, k=1)["id"] == [13]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 6}, "top is 6, but the pool has only 5"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"k": -3}, "k must be at least 1, not -3"),
        ({"token_budget": 5}, "token_budget needs a tokenizer"),
        ({"k": 1, "text_column": "txt"}, "no column 'txt' .*did you mean 'text'"),
        ({"k": 1, "text_column": "id"}, "Row 0 of the dataset: the column 'id' is of type int, not text"),
        ({}, "not said how much to keep"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Length().select(POOL, **arguments)


def test_bad_datasets() -> None:
    with pytest.raises(UserError, match=r"shape \(2,\), but the dataset has 5 rows"):
        select(POOL, [1, 2], k=1)
    with pytest.raises(UserError, match="not a DatasetDict: choose a split"):
        Length().select(DatasetDict({"train": POOL}), k=1)
    with pytest.raises(UserError, match="Row 1 of the dataset: the column 'text' is null"):
        select(Dataset.from_dict({"text": ["a", None]}), [1, 2], k=1)
