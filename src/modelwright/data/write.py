"""Writing rows by suffix: JSONL, JSON, CSV or Parquet; whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from modelwright.data.sources import RECORD_SUFFIXES, file_format
from modelwright.errors import UserError
from modelwright.files import atomic_path

_BATCH = 1024


def check_format(path: str | Path) -> str:
    """Returns the format that a path's suffix names: call it before any work is done.

    Raises:
        UserError: The suffix names no format that can be written.
    """
    path = Path(path)
    kind = file_format(path)
    compressed = path.suffix.lower() in (".gz", ".zst")
    if kind in (None, "text") or (compressed and kind == "parquet"):
        raise UserError(
            f"{path} cannot be written by its suffix: use one of {', '.join(RECORD_SUFFIXES)} (.gz or .zst may "
            f"follow, except after .parquet)."
        )
    return str(kind)


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], force: bool = False) -> int:
    """Writes rows one after another, with flat memory; the file appears whole or not at all.

    Rows may differ in their fields. CSV and Parquet get the union of the columns; a value that a row lacks is empty.
    JSON has no NaN, so it becomes null; dates become ISO text, bytes base64.

    Args:
        path: Its suffix names the format: ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` (each also ``.gz``, ``.zst``) or
            ``.parquet``.
        rows: The rows.
        force: Whether an existing file may be replaced.

    Returns:
        How many rows were written.

    Raises:
        UserError: The suffix is unknown, the file exists, the disk is full, or a column mixes types (Parquet).
    """
    kind = check_format(path)
    with atomic_path(path, force) as partial:
        if kind == "parquet":
            return _write_parquet(partial, rows)
        with _open_text(partial) as stream:
            if kind == "jsonl":
                return _write_lines(stream, rows)
            if kind == "json":
                return _write_array(stream, rows)
            return _write_csv(stream, rows, "\t" if kind == "tsv" else ",", partial.parent)


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    with contextlib.ExitStack() as stack:
        if path.suffix.lower() == ".gz":
            raw = stack.enter_context(path.open("wb"))
            # No name and no time in the header: the same rows give the same bytes.
            binary: Any = stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0))
        elif path.suffix.lower() == ".zst":
            import pyarrow

            binary = stack.enter_context(pyarrow.output_stream(str(path), compression="zstd"))
        else:
            binary = stack.enter_context(path.open("wb"))
        stream = stack.enter_context(io.TextIOWrapper(binary, encoding="utf-8", newline="\n", errors="strict"))
        yield stream


def to_json(row: Any) -> str:
    """Returns a row as one line of standard JSON: NaN becomes null; a lone surrogate is written as its escape."""
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        line = json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=_plain)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(_without_nan(row), ensure_ascii=True, allow_nan=False, default=_plain)
    return line


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return _without_nan(value.item())
    if isinstance(value, np.ndarray):
        return _without_nan(value.tolist())
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, decimal.Decimal | Path | datetime.timedelta):
        return str(value)
    raise UserError(f"A row holds a value of type {type(value).__name__}, which cannot be written: drop that column.")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value


def _write_lines(stream: IO[str], rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for row in rows:
        stream.write(to_json(row) + "\n")
        count += 1
    return count


def _write_array(stream: IO[str], rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for row in rows:
        stream.write(("[\n" if count == 0 else ",\n") + to_json(row))
        count += 1
    stream.write("\n]\n" if count else "[]\n")
    return count


def _write_csv(stream: IO[str], rows: Iterable[Mapping[str, Any]], delimiter: str, folder: Path) -> int:
    # The header needs the columns of all rows, so they are kept in a temporary file meanwhile.
    columns: dict[str, None] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as spool:

        def noted() -> Iterator[Mapping[str, Any]]:
            for row in rows:
                columns.update(dict.fromkeys(row))
                yield row

        count = _write_lines(spool, noted())
        spool.seek(0)
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        for line in spool:
            row = json.loads(line)
            cells = (row.get(c) for c in columns)
            writer.writerow(to_json(c) if isinstance(c, dict | list) else c for c in cells)
    return count


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Two passes, because the schema is known only when all rows were seen: Arrow batches, then one Parquet file."""
    import pyarrow
    from pyarrow import ipc, parquet

    spool = path.with_name("batches.arrow")
    schema, count = pyarrow.schema([]), 0
    try:
        with spool.open("wb") as sink:
            batches = iter(rows)
            while batch := list(itertools.islice(batches, _BATCH)):
                table = _table(batch)
                schema = pyarrow.unify_schemas([schema, table.schema], promote_options="permissive")
                with ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                count += len(batch)
        with spool.open("rb") as source, parquet.ParquetWriter(path, schema) as output:
            empty, done = schema.empty_table(), 0
            while done < count:
                with ipc.open_stream(source) as reader:
                    table = reader.read_all()
                done += len(table)
                full = pyarrow.concat_tables([empty, table], promote_options="permissive")
                output.write_table(full.select(schema.names).cast(schema))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(
            f"The rows do not fit one Parquet schema ({str(error).splitlines()[0]}): write .jsonl instead."
        ) from error
    finally:
        spool.unlink(missing_ok=True)
    return count


def _table(rows: list[Mapping[str, Any]]) -> Any:
    import pyarrow

    # Not Table.from_pylist: it takes the columns of the first row only.
    columns = dict.fromkeys(key for row in rows for key in row)
    arrays = {}
    for column in columns:
        try:
            arrays[column] = pyarrow.array([row.get(column) for row in rows])
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            raise UserError(
                f"The column '{column}' does not fit one Parquet type ({str(error).splitlines()[0]}): write .jsonl "
                f"instead."
            ) from error
    return pyarrow.table(arrays)
