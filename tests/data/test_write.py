"""Writing: whole or not at all, tolerant of rows that differ, honest about what cannot be written."""

from __future__ import annotations

import csv
import datetime
import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modelwright.data import Records, write, write_rows
from modelwright.errors import UserError

UNEVEN = [{"text": "a", "x": 1}, {"text": "b", "y": [1.5]}, {"text": "c", "x": 2.5, "z": {"k": "v"}}]


def test_rows_of_differing_keys_become_one_parquet_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_BATCH", 1)  # every row brings a schema of its own
    write_rows(tmp_path / "a.parquet", UNEVEN)
    assert [r.row for r in Records(tmp_path / "a.parquet")] == [
        {"text": "a", "x": 1.0, "y": None, "z": None},
        {"text": "b", "x": None, "y": [1.5], "z": None},
        {"text": "c", "x": 2.5, "y": None, "z": {"k": "v"}},
    ]


def test_rows_of_differing_keys_become_one_csv_header(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", UNEVEN)
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["text", "x", "y", "z"],
            ["a", "1", "", ""],
            ["b", "", "[1.5]", ""],
            ["c", "2.5", "", '{"k": "v"}'],
        ]


@pytest.mark.parametrize("batch", [1, 1000])
def test_mixed_types_in_a_column_are_refused_by_parquet_and_kept_by_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(write, "_BATCH", batch)
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": "one"}]
    with pytest.raises(UserError, match="one Parquet (schema|type).*write .jsonl instead"):
        write_rows(tmp_path / "a.parquet", rows)
    assert list(tmp_path.iterdir()) == []
    write_rows(tmp_path / "a.jsonl", rows)
    assert [r.row for r in Records(tmp_path / "a.jsonl")] == rows


def test_json_lines_are_standard_json(tmp_path: Path) -> None:
    rows = [
        {"nan": float("nan"), "inner": [float("inf"), 1.0], "numpy": np.float64(0.5), "array": np.arange(2)},
        {"date": datetime.date(2024, 1, 2), "bytes": b"ab", "count": np.int64(3)},
        {"lone": "\ud800", "é": "é"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"nan": None, "inner": [None, 1.0], "numpy": 0.5, "array": [0, 1]},
        {"date": "2024-01-02", "bytes": "YWI=", "count": 3},
        {"lone": "\ud800", "é": "é"},
    ]
    with pytest.raises(UserError, match="type object, which cannot be written"):
        write_rows(tmp_path / "b.jsonl", [{"x": object()}])


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".jsonl", ".parquet", ".csv"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for seconds, folder in enumerate(("one", "two")):
        monkeypatch.setattr("time.time", lambda seconds=seconds: 1e9 + 10 * seconds)
        write_rows(tmp_path / folder / f"x{suffix}", UNEVEN)
        contents.append((tmp_path / folder / f"x{suffix}").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("name", ["a.txt", "a.xyz", "a", "a.parquet.gz"])
def test_an_unknown_output_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be written by its suffix: use one of .jsonl"):
        write_rows(tmp_path / name, UNEVEN)


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", UNEVEN)
    with pytest.raises(UserError, match="exists already"):
        write_rows(tmp_path / "a.jsonl", UNEVEN)
    assert write_rows(tmp_path / "a.jsonl", UNEVEN[:1], force=True) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".json"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, suffix: str, fault: BaseException) -> None:
    def rows() -> Iterator[dict]:
        yield from UNEVEN
        raise fault

    expected = UserError if isinstance(fault, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="the disk is full" if expected is UserError else None):
        write_rows(tmp_path / f"a{suffix}", rows())
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_an_empty_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.json"):
        assert write_rows(tmp_path / name, []) == 0
        assert (tmp_path / name).exists()
