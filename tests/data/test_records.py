"""Every format reads alike, and every fault is one sentence that says where."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.data import Records, formats, read_texts, write_rows
from modelwright.errors import UserError

ROWS = [{"text": "first é", "kind": "a"}, {"text": 'sec,"ond\nline', "kind": "b"}, {"text": "third", "kind": "a"}]


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".csv", ".csv.zst", ".tsv", ".parquet"]
)
def test_what_is_written_is_read_back_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pool{suffix}"
    assert write_rows(path, ROWS) == 3
    records = Records(path)
    for _ in range(2):  # re-iterable
        read = list(records)
        assert [r.row for r in read] == ROWS
        assert [r.text for r in read] == [r["text"] for r in ROWS]
        assert [r.index for r in read] == [0, 1, 2]
        assert all(str(path) in r.where for r in read)


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", ROWS[:1])
    write_rows(tmp_path / "a.parquet", ROWS[1:])
    read = list(Records([tmp_path / "b.jsonl", tmp_path / "a.parquet"]))
    assert [r.row for r in read] == ROWS
    assert [r.index for r in read] == [0, 1, 2]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("# title\n\nbody\n", encoding="utf-8")
    (record,) = Records(tmp_path / "one.md", text_field="content")
    assert record.text == "# title\n\nbody\n"
    assert record.row == {"content": record.text, "file": str(tmp_path / "one.md")}


def test_a_folder_is_read_recursively_and_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/y.txt", ".hidden.py", ".git/x.py", "__pycache__/x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read_texts(tmp_path) == ["a/y.txt", "a/z.py", "b.py"]
    assert read_texts(str(tmp_path / "**/*.py")) == ["a/z.py", "b.py"]


def test_a_folder_of_records_and_texts_is_not_guessed_at(tmp_path: Path) -> None:
    write_rows(tmp_path / "pool.jsonl", ROWS)
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"both records \(pool.jsonl, …\) and plain text \(README.md, …\).*\*\*/\*.jsonl"
    ):
        Records(tmp_path)


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "pool[1].jsonl", ROWS)
    assert len(list(Records(tmp_path / "pool[1].jsonl"))) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("missing", "missing does not exist"),
        ("*.jsonl", r"No file matches the pattern .*\*.jsonl"),
        ("data.xyz", r"unknown suffix '.xyz'.*known: .jsonl"),
        ("empty_folder", "holds no file of a known kind"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "data.xyz").write_text("x", encoding="utf-8")
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match=message):
        Records(tmp_path / source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a.jsonl:2 is not valid JSON \(Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a.jsonl:2 holds a list, not a JSON object"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"txt": "y", "n": 1}\n',
            r"a.jsonl:3 has no field 'text' \(fields: txt, n\).*'txt'",
        ),
        ("a.jsonl", b'{"text": null}\n', r"a.jsonl:1: the field 'text' is null, not text"),
        ("a.jsonl", b'{"text": 7}\n', r"a.jsonl:1: the field 'text' is of type int, not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a.jsonl:2 is not valid UTF-8 \(byte 0xff at byte 11"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: the text holds a lone surrogate \(\\ud800\)"),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a.jsonl:1 cannot be read as JSON"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}\n", r"a.jsonl:1 cannot be read as JSON"),
        ("a.jsonl", b"", "holds no documents"),
        ("a.jsonl", b"\n\n", "holds no documents"),
        ("a.json", b"", "holds no documents"),
        ("a.json", b"[]", "holds no documents"),
        ("a.json", b"[", r"a.json:1 ends without the closing '\]'"),
        ("a.json", b'[{"text": "x"},\n', r"a.json:2 has the end of the file where an object should begin"),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]', r"a.json:2 lacks a ','"),
        ("a.json", b'[{"text": "x"}] []', r"a.json:1 goes on after"),
        ("a.json", b'[{"text": "x"},\n{"text": "y', r"a.json:2 is not valid JSON \(Unterminated string"),
        ("a.json", b'[{"text": "x"},\n"y"]', r"a.json:2 has '\"' where an object should begin"),
        ("a.json", b'[{"text": "x"},\n\n{"text": "\xff"}]', r"a.json:3 is not valid UTF-8"),
        ("a.csv", b"", "holds no documents"),
        ("a.csv", b"text,kind\n", "holds no documents"),
        ("a.csv", b"text,kind\nx,a\ny,b,c\n", r"a.csv:3 has 3 fields where the header has 2"),
        ("a.csv", b'text,kind\n"x,a\n', r"a.csv:2 is not valid CSV \(unexpected end of data\)"),
        ("a.csv", b"text,text\nx,a\n", r"a.csv:1 has two columns called 'text'"),
        ("a.csv", b"text,kind\nx,a\n\xe9,b\n", r"a.csv:3 is not valid UTF-8"),
        ("a.csv", b"title,kind\nx,a\n", r"a.csv:2 has no field 'text' \(fields: title, kind\)"),
        ("a.txt", b"one\ntwo\xff", r"a.txt:2 is not valid UTF-8 \(byte 0xff at byte 8 of the file\)"),
        ("a.parquet", b"PAR1 not really", "a.parquet is truncated or is not Parquet data"),
        ("a.parquet", b"", "a.parquet is truncated or is not Parquet data"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz is truncated or is not gzip data"),
        ("a.jsonl.zst", b"not zstd" * 9, "a.jsonl.zst is truncated or is not zstd data"),
    ],
)
def test_each_fault_is_one_sentence_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(Records(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_truncated_file_is_refused_and_never_read_as_a_shorter_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pool{suffix}"
    write_rows(path, ({"text": f"document {i} {hash(str(i))}"} for i in range(5000)))
    whole = path.read_bytes()
    for keep in (len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="truncated"):
            list(Records(path))


def test_a_corrupt_parquet_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    write_rows(path, ({"text": f"document {i}"} for i in range(5000)))
    raw = bytearray(path.read_bytes())
    raw[10:2000] = bytes(1990)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"pool\.parquet is truncated or is not Parquet"):
        list(Records(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "x\xffy"}\n'),
        ("a.jsonl", b'{"text": "x\\ud800y"}\n'),
        ("a.json", b'[{"text": "x\xffy"}]\n'),
        ("a.csv", b"text\nx\xffy\n"),
        ("a.txt", b"x\xffy"),
    ],
)
def test_undecodable_bytes_can_be_replaced(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (record,) = Records(tmp_path / name, encoding_errors="replace")
    assert record.text == record.row["text"] == "x\ufffdy"


def test_undecodable_parquet_text_is_refused_or_replaced(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    bad = pyarrow.array([b"fine", b"x\xffy", None], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="rows 1 to 3 hold text that is not valid UTF-8"):
        list(Records(tmp_path / "a.parquet"))
    read = iter(Records(tmp_path / "a.parquet", encoding_errors="replace"))
    assert [next(read).row for _ in range(2)] == [{"text": "fine", "n": 1}, {"text": "x\ufffdy", "n": 2}]
    with pytest.raises(UserError, match="row 3: the field 'text' is null"):
        next(read)


def test_parquet_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [{"text": "x", "kind": "a", "big": "y" * 99}])
    assert [r.row for r in Records(tmp_path / "a.parquet", columns=["kind"])] == [{"text": "x", "kind": "a"}]
    with pytest.raises(UserError, match=r"no column 'kin' \(columns: text, kind, big\): did you mean 'kind'"):
        list(Records(tmp_path / "a.parquet", columns=["kin"]))


def test_byte_order_marks_are_not_text(tmp_path: Path) -> None:
    for name, content in {
        "a.jsonl": '{"text": "x"}',
        "a.json": '[{"text": "x"}]',
        "a.csv": "text\nx\n",
        "a.txt": "x",
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_texts(tmp_path / name) == ["x"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_a_document_of_50_mb(tmp_path: Path, suffix: str) -> None:
    text = "word\n" * 10_000_000
    path = tmp_path / f"big{suffix}"
    if suffix == ".txt":
        path.write_text(text, encoding="utf-8")
    else:
        write_rows(path, [{"text": text}])
    (record,) = Records(path)
    assert record.text == text


def test_reading_takes_flat_memory(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".json", ".csv"):
        path = tmp_path / f"pool{suffix}"
        write_rows(path, ({"text": f"{i} " + "x" * 1000} for i in range(20_000)))
        tracemalloc.start()
        assert sum(len(r.text) > 0 for r in Records(path)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000, suffix


@given(
    st.lists(st.dictionaries(st.sampled_from(["text", "b", "c"]), st.text() | st.integers() | st.none(), min_size=1)),
    st.sampled_from(["[%s]", "[\n%s\n]\n", " [ %s ] "]),
    st.integers(1, 7),
)
def test_json_of_any_shape_is_read_in_blocks_of_any_size(rows: list[dict], frame: str, block: int) -> None:
    content = (frame % " ,\n".join(json.dumps(r) for r in rows)).encode()
    lines = "\n".join(json.dumps(r, indent=1) for r in rows).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_BLOCK", block)
        for data in (content, lines):
            assert [row for row, _ in formats.read_json(io.BytesIO(data), "x", "strict")] == rows


def test_hub_ids_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def fake(path: str, name: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        calls.append((path, name, split, streaming))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", fake)
    records = Records("some-org/pile.v2:small@train[:10%]", columns=[])
    assert [r.row for r in records] == [{"text": r["text"]} for r in ROWS]
    assert next(iter(records)).where == "some-org/pile.v2:small@train[:10%]: row 1"
    assert [r.row for r in Records("some-org/pile")] == ROWS
    assert calls[0] == ("some-org/pile.v2", "small", "train[:10%]", True)
    assert calls[-1] == ("some-org/pile", None, "train", True)


def test_a_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"some-org/pile is no file here.*\(no route to host\): check the name"):
        list(Records("some-org/pile"))


@pytest.mark.parametrize("dump", ["lines", "array"])
def test_standard_input_can_be_read_twice(monkeypatch: pytest.MonkeyPatch, dump: str) -> None:
    content = json.dumps(ROWS) if dump == "array" else "".join(json.dumps(r) + "\n" for r in ROWS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    records = Records("-")
    first, second = iter(records), iter(records)
    for pair in zip(first, second, strict=True):  # two passes at once do not disturb each other
        assert pair[0] == pair[1]
    assert [r.row for r in records] == ROWS
    spool = records._spool
    assert spool is not None
    assert spool.exists()
    del records, first, second
    assert not spool.exists()
    with pytest.raises(UserError, match="given twice"):
        Records(["-", "-"])


def test_the_fingerprint_changes_with_the_data_and_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, ROWS)
    same = Records(path).fingerprint()
    assert Records(path).fingerprint() == same
    assert Records(path, "kind").fingerprint() != same
    assert Records(path, encoding_errors="replace").fingerprint() != same
    write_rows(path, ROWS[:2], force=True)
    assert Records(path).fingerprint() != same


def test_unreadable_bytes_after_a_gzip_header_are_refused(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b'{"text": "abc"}\n' * 1000, mtime=0))
    whole[15:25] = b"\x00" * 10
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    with pytest.raises(UserError, match="truncated or is not gzip data"):
        list(Records(tmp_path / "a.jsonl.gz"))
