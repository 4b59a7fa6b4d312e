"""Selecting from files: the same as in memory, resumable, and never half-written."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import filelock
import numpy as np
import pytest
from datasets import Dataset
from pyarrow import parquet

import forked
from modelwright.curation import scoring, stream
from modelwright.curation.choose import Rule
from modelwright.curation.overlap import HeldOut
from modelwright.curation.selector import SelectorMixin
from modelwright.curation.stream import Outputs, select_records
from modelwright.data import Records, write_rows
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer


@dataclass(kw_only=True)
class Digits(SelectorMixin):
    """Scores a document by the number it begins with, so that a test can see what was scored when."""

    scale: float = 1.0
    calls: list[int] = field(default_factory=list, init=False)
    fail_at: int | None = field(default=None, init=False)
    fault: BaseException = field(default_factory=KeyboardInterrupt, init=False)

    needs_target: ClassVar[bool] = False

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        if self.fail_at is not None and len(self.calls) == self.fail_at:
            raise self.fault
        self.calls.append(len(texts))
        return np.array([self.scale * float((t.split() or ["nan"])[0]) for t in texts])


@dataclass(kw_only=True)
class Whole(Digits):
    whole_pool: ClassVar[bool] = True

    def score_pool(self, pool: Iterable[str], workers: int = 1) -> np.ndarray:
        return Digits.score(self, list(pool))


def rows(count: int = 100) -> list[dict[str, Any]]:
    numbers = np.random.default_rng(0).permutation(count) % 37
    return [
        {"text": f"{n} words of document {i}" + " and more" * (i % 5), "id": i, "kind": "even" if i % 2 == 0 else "odd"}
        for i, n in enumerate(numbers)
    ]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BATCH_DOCUMENTS", 10)


@pytest.fixture
def pool(tmp_path: Path) -> Records:
    write_rows(tmp_path / "pool.jsonl", rows())
    return Records(tmp_path / "pool.jsonl")


def run(
    pool: Records, selector: SelectorMixin | None = None, /, name: str = "chosen.jsonl", **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = pool.sources[0].path.parent
    rule = Rule(**{k: options.pop(k) for k in list(options) if k in Rule.__dataclass_fields__})
    outputs = Outputs(
        chosen=folder / name, **{k: options.pop(k) for k in list(options) if k in Outputs.__dataclass_fields__}
    )
    result = select_records(selector or Digits(), pool, [], rule, outputs, **options)
    json.dumps(result, allow_nan=False)
    return result, [r.row for r in Records(outputs.chosen)]


def files(pool: Records) -> set[str]:
    return {p.name for p in pool.sources[0].path.parent.iterdir()}


@pytest.mark.parametrize(
    "rule",
    [
        {"top": 7},
        {"top": 100},
        {"threshold": 30.0},
        {"byte_budget": 500},
        {"top": 9, "threshold": 20.0, "byte_budget": 300, "length_buckets": 3, "dedup": True},
    ],
)
def test_files_give_the_selection_of_a_dataset(pool: Records, rule: dict) -> None:
    result, chosen = run(pool, **rule)
    in_memory = dict(rule)
    if "top" in rule:
        in_memory["k"] = in_memory.pop("top")
    selector = Digits()
    expected = selector.select(Dataset.from_list(rows()), **in_memory)
    assert chosen == expected.to_list()
    for name, value in asdict(selector.report).items():
        assert result[name] == value, name
    assert files(pool) == {"pool.jsonl", "chosen.jsonl"}


def test_token_budget(pool: Records) -> None:
    tokenizer = byte_tokenizer()
    result, chosen = run(pool, token_budget=1000, tokenizer=tokenizer)
    sizes = [len(tokenizer(r["text"], add_special_tokens=False)["input_ids"]) for r in chosen]
    ranked = sorted(rows(), key=lambda r: (-int(r["text"].split()[0]), r["id"]))
    assert [r["id"] for r in chosen] == [r["id"] for r in ranked[: len(chosen)]]
    after = len(tokenizer(ranked[len(chosen)]["text"], add_special_tokens=False)["input_ids"])
    assert result["tokens"] == sum(sizes) <= 1000 < sum(sizes) + after
    # With another rule, only the chosen ones are counted.
    assert run(pool, top=len(chosen), tokenizer=tokenizer, name="b.jsonl")[0]["tokens"] == sum(sizes)
    with pytest.raises(UserError, match=r"needs a tokenizer.*--byte-budget"):
        run(pool, token_budget=1000, name="c.jsonl")


def test_pool_order_and_formats(pool: Records) -> None:
    _, ranked = run(pool, top=9)
    _, ordered = run(pool, top=9, order="pool", name="ordered.parquet")
    assert [r["id"] for r in ordered] == sorted(r["id"] for r in ranked)
    assert sorted(ordered, key=lambda r: r["rank"]) == ranked


def test_all_scores_can_be_written(pool: Records) -> None:
    folder = pool.sources[0].path.parent
    _, chosen = run(pool, top=5, scores=folder / "scores.parquet", group_field="kind")
    table = parquet.read_table(folder / "scores.parquet").to_pylist()
    assert [r["score"] for r in table] == [float(r["text"].split()[0]) for r in rows()]
    assert [r["bytes"] for r in table] == [len(r["text"]) for r in rows()]
    assert [r["group"] for r in table] == [r["kind"] for r in rows()]
    assert {r["rank"]: r["index"] for r in table if r["rank"]} == {r["rank"]: r["id"] for r in chosen}


def test_composition_precision_and_recall(pool: Records) -> None:
    result, chosen = run(pool, top=20, group_field="kind", target_groups=["even"])
    even = sum(r["kind"] == "even" for r in chosen)
    assert result["groups"] == {"even": even, "odd": 20 - even}
    assert result["pool_groups"] == {"even": 50, "odd": 50}
    assert result["precision"] == even / 20
    assert result["recall"] == even / 50
    with pytest.raises(UserError, match="No document is of the group 'eve'.*did you mean 'even'"):
        run(pool, top=20, group_field="kind", target_groups=["eve"], name="b.jsonl")
    with pytest.raises(UserError, match="has the field 'kin'.*did you mean 'kind'"):
        run(pool, top=20, group_field="kin", name="b.jsonl")
    assert files(pool) == {"pool.jsonl", "chosen.jsonl"}


def test_contamination_is_reported_and_can_be_dropped(pool: Records) -> None:
    documents = rows()
    best = sorted(documents, key=lambda r: (-int(r["text"].split()[0]), r["id"]))
    heldout = HeldOut(n=5).add(["nothing in common with the pool", f"see: {best[1]['text']}"])
    result, chosen = run(pool, top=3, heldout=heldout)
    assert [r["id"] for r in chosen] == [r["id"] for r in best[:3]]
    # Others share "words of document" and a number: only the copy shares five words in a row.
    assert result["contamination"]["contaminated_documents"] == 1
    assert result["contamination"]["heldout_found_in_selection"] == 1
    assert result["contamination"]["examples"][0]["rank"] == 2
    assert result["contamination"]["dropped"] == 0
    result, chosen = run(pool, top=3, heldout=heldout, drop_contaminated=True, name="b.jsonl")
    assert [r["id"] for r in chosen] == [best[0]["id"], best[2]["id"], best[3]["id"]]
    assert result["contamination"]["contaminated_documents"] == 0
    assert result["contamination"]["dropped"] == 1
    with pytest.raises(UserError, match="needs held-out documents"):
        run(pool, top=3, drop_contaminated=True, name="c.jsonl")


def test_examples_are_the_first_and_the_last(pool: Records) -> None:
    result, chosen = run(pool, top=20)
    assert [e["rank"] for e in result["examples"]] == [1, 2, 3, 4, 5, 18, 19, 20]
    assert [e["text"] for e in result["examples"][:2]] == [chosen[0]["text"], chosen[1]["text"]]
    assert result["examples"][0]["where"].endswith(f"pool.jsonl:{chosen[0]['id'] + 1}")


def test_blank_documents_are_never_chosen_and_are_counted(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "pool.jsonl", [{"text": "3 a"}, {"text": " \n"}, {"text": ""}, {"text": "nan"}, {"text": "1 b"}]
    )
    messages: list[str] = []

    class Listening(stream.Silent):
        def message(self, text: str) -> None:
            messages.append(text)

    result, chosen = run(Records(tmp_path / "pool.jsonl"), top=5, progress=Listening())
    assert [r["text"] for r in chosen] == ["3 a", "1 b"]
    assert result["unscored"] == 3
    assert "3 of 5 documents have no score" in messages[0]
    assert "Only 2 documents qualify, fewer than the 5 asked for" in messages[1]


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_an_interrupted_run_goes_on_where_it_was(pool: Records, stop: int) -> None:
    _, expected = run(pool, top=30, name="whole.jsonl", group_field="kind")
    broken = Digits()
    broken.fail_at = stop
    with pytest.raises(KeyboardInterrupt):
        run(pool, broken, top=30, group_field="kind")
    assert files(pool) == {"pool.jsonl", "whole.jsonl", "chosen.jsonl.scoring"}
    again = Digits()
    result, chosen = run(pool, again, top=30, group_field="kind")
    assert chosen == expected
    assert sum(again.calls) == 100 - 10 * stop
    assert sum(result["pool_groups"].values()) == 100
    assert files(pool) == {"pool.jsonl", "whole.jsonl", "chosen.jsonl"}


def test_a_record_that_was_cut_short_is_scored_again(pool: Records) -> None:
    _, expected = run(pool, top=30, name="whole.jsonl", group_field="kind")
    broken = Digits()
    broken.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(pool, broken, top=30, group_field="kind")
    folder = pool.sources[0].path.parent / "chosen.jsonl.scoring"
    with (folder / "scores.bin").open("r+b") as data:
        data.truncate((folder / "scores.bin").stat().st_size - 7)
    with (folder / "groups.jsonl").open("a", encoding="utf-8") as groups:
        groups.write('"unfini')
    again = Digits()
    _, chosen = run(pool, again, top=30, group_field="kind")
    assert chosen == expected
    assert sum(again.calls) == 51


@pytest.mark.parametrize("change", ["options", "pool", "columns"])
def test_scores_of_another_run_are_not_taken_up(pool: Records, change: str) -> None:
    broken = Digits()
    broken.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(pool, broken, top=10)
    again = Digits(scale=-1.0) if change == "options" else Digits()
    if change == "pool":
        write_rows(pool.sources[0].path, rows(60), force=True)
    run(pool, again, top=10, dedup=change == "columns")
    assert sum(again.calls) == (60 if change == "pool" else 100)


def test_another_limit_goes_on_with_the_same_scores(pool: Records) -> None:
    broken = Digits()
    broken.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(pool, broken, top=10)
    again = Digits()
    run(pool, again, top=20)
    assert sum(again.calls) == 50


def test_an_interruption_while_writing_loses_no_scores(pool: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "write_rows", stop)
        run(pool, top=5)
    assert files(pool) == {"pool.jsonl", "chosen.jsonl.scoring"}
    again = Digits()
    run(pool, again, top=5)
    assert again.calls == []


def test_whole_pool_scores_are_kept_too(pool: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = run(pool, Digits(), top=5, name="expected.jsonl")

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "choose", stop)
        run(pool, Whole(), top=5)
    again = Whole()
    _, chosen = run(pool, again, top=5)
    assert chosen == expected
    assert again.calls == []


def test_a_full_disk_while_scoring_keeps_what_was_scored(pool: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    original = Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "scores.bin" and mode == "ab" and self.stat().st_size > 400:
            return Full()
        return original(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(UserError, match=r"no space left on device.*continues after 40 documents"):
            run(pool, top=5)
    again = Digits()
    run(pool, again, top=5)
    assert sum(again.calls) == 60


def test_a_full_disk_while_writing_leaves_no_output(pool: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("modelwright.data.write._write_lines", full)
        with pytest.raises(UserError, match="could not be written: the disk is full"):
            run(pool, top=5)
    assert files(pool) == {"pool.jsonl", "chosen.jsonl.scoring"}
    again = Digits()
    run(pool, again, top=5)
    assert again.calls == []


def test_mistakes_leave_nothing_behind(pool: Records, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="top is 1,000, but the pool has only 100"):
        run(pool, top=1000)
    with pytest.raises(UserError, match="not said how much to keep"):
        run(pool)
    (tmp_path / "pool.jsonl").open("a").write("{broken\n")
    with pytest.raises(UserError, match=r"pool.jsonl:101 is not valid JSON"):
        run(pool, top=5)
    assert files(pool) == {"pool.jsonl"}


def test_much_work_is_not_thrown_away_for_a_mistake(pool: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_WORTH_KEEPING", 0.0)
    with pytest.raises(UserError, match="top is 1,000"):
        run(pool, top=1000)
    again = Digits()
    run(pool, again, top=10)
    assert again.calls == []


def test_outputs_are_never_overwritten_without_force(pool: Records) -> None:
    run(pool, top=5)
    selector = Digits()
    with pytest.raises(UserError, match=r"chosen.jsonl exists already"):
        run(pool, selector, top=6)
    assert selector.calls == []  # refused before any work
    assert len(run(pool, top=6, force=True)[1]) == 6
    with pytest.raises(UserError, match="both pool and output"):
        run(pool, top=6, name="pool.jsonl", force=True)
    with pytest.raises(UserError, match="cannot be written by its suffix"):
        run(pool, top=6, name="chosen.xyz")


def test_two_runs_at_once_are_refused(pool: Records) -> None:
    with (
        filelock.FileLock(pool.sources[0].path.parent / "chosen.jsonl.lock"),
        pytest.raises(UserError, match=r"Another run is writing .*chosen.jsonl"),
    ):
        run(pool, top=5)


def test_a_pool_that_changes_meanwhile_is_noticed(pool: Records) -> None:
    class Changing(Records):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            if self.passes == 2:
                changed = [{**r, "text": r["text"] + "!"} for r in rows()]
                write_rows(self.sources[0].path, changed, force=True)
            return super().__iter__()

    with pytest.raises(UserError, match="changed while the pool was being read"):
        run(Changing(pool.sources[0].path), top=5)
    assert files(pool) == {"pool.jsonl"}


def test_standard_input_can_be_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "".join(json.dumps(r) + "\n" for r in rows())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    outputs = Outputs(chosen=tmp_path / "chosen.jsonl")
    select_records(Digits(), Records("-"), [], Rule(top=5), outputs)
    write_rows(tmp_path / "pool.jsonl", rows())
    assert [r.row for r in Records(outputs.chosen)] == run(Records(tmp_path / "pool.jsonl"), top=5, name="b.jsonl")[1]


def test_a_selector_that_gives_too_few_scores_is_a_bug(pool: Records) -> None:
    class Broken(Digits):
        def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
            return np.zeros(3)

    with pytest.raises(ValueError, match=r"shape \(3,\) for 10 documents"):
        run(pool, Broken(), top=5)


def test_memory_does_not_hold_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "BATCH_DOCUMENTS", 256)
    write_rows(tmp_path / "pool.jsonl", ({"text": f"{i % 97} " + "x" * 2000} for i in range(10_000)))
    pool = Records(tmp_path / "pool.jsonl")
    tracemalloc.start()
    run(pool, top=10, group_field=None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # the pool is 20 MB


class Dying(Digits):
    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        if len(self.calls) == self.fail_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(texts, workers)


def test_kill_9_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "pool.jsonl", rows())
    monkeypatch.setattr(scoring, "BATCH_DOCUMENTS", 10)

    def start(rank: int, fail_at: int, name: str) -> None:
        selector = Dying()
        selector.fail_at = fail_at
        select_records(selector, Records(tmp_path / "pool.jsonl"), [], Rule(top=9), Outputs(chosen=tmp_path / name))
        (tmp_path / "scored").write_text(str(sum(selector.calls)))

    assert forked.run(start, 1, 99, "whole.jsonl") == [0]
    assert (tmp_path / "scored").read_text() == "100"
    assert forked.run(start, 1, 6, "chosen.jsonl") == [-signal.SIGKILL]
    assert not (tmp_path / "chosen.jsonl").exists()
    assert forked.run(start, 1, 99, "chosen.jsonl") == [0]
    assert (tmp_path / "scored").read_text() == "40"
    (tmp_path / "scored").unlink()
    assert (tmp_path / "chosen.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"pool.jsonl", "whole.jsonl", "chosen.jsonl"}
