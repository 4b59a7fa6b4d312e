"""Two datatrove tasks give the selection of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from modelwright.curation.choose import Rule
from modelwright.curation.datatrove_step import KeepBest, ScoreFilter
from modelwright.curation.random_sample import RandomSelector
from modelwright.curation.semdedup import SemDedupSelector
from modelwright.curation.stream import Outputs, select_records
from modelwright.curation.tfidf import TfidfSelector
from modelwright.data import Records, write_rows
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer

WORDS = [f"word{i}" for i in range(30)]
TARGET = ["word1 word2 word3", "word2 word4"]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    # Few words, so that many scores tie; the file names do not sort as the numbers do.
    for file in (2, 10, 1):
        rows = [
            {"text": " ".join(generator.choice(WORDS, size=generator.integers(1, 4))), "id": f"{file}-{i}"}
            for i in range(120)
        ]
        write_rows(tmp_path / "pool" / f"part{file}.jsonl", rows)
    return tmp_path / "pool"


def by_tasks(pool: Path, selector: Any, tasks: int, workers: int = 1, **limits: Any) -> list[dict[str, Any]]:
    folder = pool.parent / f"tasks{tasks}"
    # `threshold` is a matter of scoring; the other limits hold for each task and again for all.
    merge = {k: v for k, v in limits.items() if k != "threshold"}
    scoring = LocalPipelineExecutor(
        [
            JsonlReader(str(pool)),
            ScoreFilter(selector, batch_size=50, **limits),
            JsonlWriter(str(folder / "scored"), compression=None),
        ],
        tasks=tasks,
        workers=workers,
        logging_dir=str(folder / "logs1"),
    )
    LocalPipelineExecutor(
        [
            JsonlReader(str(folder / "scored")),
            KeepBest(**merge),
            JsonlWriter(str(folder / "chosen"), compression=None),
        ],
        depends=scoring,
        logging_dir=str(folder / "logs2"),
    ).run()
    lines = (folder / "chosen" / "00000.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def by_one_process(pool: Path, selector: Any, **limits: Any) -> list[dict[str, Any]]:
    tokenizer = limits.pop("tokenizer", None)
    outputs = Outputs(chosen=pool.parent / "chosen.jsonl")
    select_records(selector, Records(pool), TARGET, Rule(**limits), outputs, tokenizer=tokenizer)
    return [r.row for r in Records(outputs.chosen)]


@pytest.mark.parametrize("limits", [{"top": 40}, {"byte_budget": 700}, {"token_budget": 500}, {"threshold": 0.3}])
def test_two_tasks_give_the_selection_of_one_process(pool: Path, limits: dict[str, Any]) -> None:
    if "token_budget" in limits:
        byte_tokenizer().save_pretrained(pool.parent / "tokenizer")
        limits = limits | {"tokenizer": str(pool.parent / "tokenizer")}
    selector = TfidfSelector().fit(TARGET, Records(pool).texts())
    expected = by_one_process(pool, TfidfSelector(), **limits)
    assert len(expected) > 10
    for tasks in (1, 2, 3):
        found = by_tasks(pool, selector, tasks, **limits)
        assert [d["id"] for d in found] == [r["id"] for r in expected]
        assert [d["metadata"]["selected_rank"] for d in found] == list(range(1, len(found) + 1))
        assert [d["metadata"]["score"] for d in found] == [r["score"] for r in expected]


def test_two_processes(pool: Path) -> None:
    selector = RandomSelector(seed=4)
    expected = by_one_process(pool, RandomSelector(seed=4), top=40)
    assert [d["id"] for d in by_tasks(pool, selector, 2, workers=2, top=40)] == [r["id"] for r in expected]


def test_pruning_while_reading_keeps_what_is_chosen() -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 50, 20_000).astype(float)
    sizes = generator.integers(1, 9, 20_000)
    documents = [
        Document("x" * size, str(i), metadata={"score": score, "position_in_file": i})
        for i, (score, size) in enumerate(zip(scores, sizes))
    ]
    order = np.argsort(-scores, kind="stable")
    fits = np.searchsorted(np.cumsum(sizes[order]), 3000, side="right")
    assert [int(d.id) for d in KeepBest(byte_budget=3000).run(documents)] == order[:fits].tolist()
    assert [int(d.id) for d in KeepBest(top=100).run(documents)] == order[:100].tolist()


def test_a_document_that_does_not_fit_ends_the_selection_in_any_number_of_tasks() -> None:
    # The second best is in another task than the third, and is too long: nothing after it may be taken.
    first = [
        Document("aa", "1", metadata={"score": 3.0, "file_path": "a"}),
        Document("b", "3", metadata={"score": 1.0}),
    ]
    second = [Document("c" * 100, "2", metadata={"score": 2.0, "file_path": "b"})]
    kept = KeepBest(byte_budget=10)
    passed = kept._candidates(first) + kept._candidates(second)
    assert [d.id for d in kept.run(passed)] == ["1"]


def test_documents_without_a_score_are_dropped() -> None:
    documents = [Document("one two", "1"), Document(" ", "2"), Document("three", "3")]
    kept = list(ScoreFilter(RandomSelector()).run(documents))
    assert [d.id for d in kept] == ["1", "3"]
    assert all(0 <= d.metadata["score"] < 1 for d in kept)


def test_what_cannot_be_done_in_tasks_is_refused() -> None:
    with pytest.raises(UserError, match="needs the whole pool at once"):
        ScoreFilter(SemDedupSelector(encoder="x"))
    with pytest.raises(UserError, match="needs a tokenizer"):
        KeepBest(token_budget=10)
    assert list(KeepBest(top=3).run([])) == []
