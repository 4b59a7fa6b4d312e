"""One reader per file format. Each streams ``(row, where)`` and turns every fault into one sentence."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from modelwright.errors import UserError, did_you_mean

Errors = Literal["strict", "replace"]
Rows = Generator[tuple[dict[str, Any], str], None, None]

_BLOCK = 1 << 16
_REPLACE_HINT = "repair the file, or read it with encoding_errors='replace' (--encoding-errors replace)"


@contextlib.contextmanager
def open_bytes(path: Path, name: str) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressing by suffix; a truncated or corrupt file is a :class:`UserError`."""
    corrupt = f"{name} is truncated or is not {{}} data: make the file anew."
    suffix = path.suffix.lower()
    kind = {".gz": "gzip", ".zst": "zstd"}.get(suffix, "")
    try:
        with contextlib.ExitStack() as stack:
            if suffix == ".gz":
                stream: Any = stack.enter_context(gzip.open(path, "rb"))
            elif suffix == ".zst":
                import pyarrow

                # pyarrow, because it notices a truncated file where the zstandard package returns what there is.
                raw = stack.enter_context(pyarrow.input_stream(str(path), compression="zstd"))
                stream = stack.enter_context(io.BufferedReader(raw, 1 << 20))
            else:
                stream = stack.enter_context(path.open("rb"))
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(corrupt.format(kind)) from error
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist any more.") from error
    except PermissionError as error:
        raise UserError(f"{name} cannot be read: permission denied.") from error
    except OSError as error:
        if kind == "zstd" and error.errno is None:
            raise UserError(corrupt.format(kind)) from error
        raise


def read_jsonl(stream: BinaryIO, name: str, errors: Errors) -> Rows:
    """One JSON object per line; empty lines are skipped."""
    for number, raw in enumerate(stream, 1):
        where = f"{name}:{number}"
        line = _decode(raw, errors, where)
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where} is not valid JSON ({error.msg} at column {error.colno}): mend or remove the line."
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} cannot be read as JSON ({error}): mend or remove the line.") from error
        yield _object(row, where), where


def _decode(raw: bytes, errors: Errors, where: str) -> str:
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not valid UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line): "
            f"{_REPLACE_HINT}."
        ) from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
        raise UserError(
            f"{where} holds {names.get(type(row), 'null')}, not a JSON object: each record must be an object of fields."
        )
    return row


def read_json(stream: BinaryIO, name: str, errors: Errors) -> Rows:
    """An array of objects, or objects one after another, of any size: only one object is held at a time."""
    buffer = _JsonBuffer(stream, name, errors)
    array = buffer.next_character() == "["
    if array:
        buffer.skip(1)
    first = True
    while (character := buffer.next_character()) and not (array and character == "]"):
        if array and not first:
            if character != ",":
                raise UserError(f"{name}:{buffer.line} lacks a ',' between two objects: mend the file.")
            buffer.skip(1)
            character = buffer.next_character()
        if character != "{":
            found = repr(character) if character else "the end of the file"
            raise UserError(f"{name}:{buffer.line} has {found} where an object should begin: expected JSON objects.")
        where = f"{name}:{buffer.line}"
        yield buffer.next_object(where), where
        first = False
    if array:
        if not character:
            raise UserError(f"{name}:{buffer.line} ends without the closing ']': the file is truncated.")
        buffer.skip(1)
        if buffer.next_character():
            raise UserError(f"{name}:{buffer.line} goes on after the closing ']': expected one array of objects.")


class _JsonBuffer:
    """A window on decoded text. Each refill doubles it, so that a document of any size costs linear time."""

    def __init__(self, stream: BinaryIO, name: str, errors: Errors) -> None:
        self.stream, self.name = stream, name
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
        self.text, self.at, self.line = "", 0, 1

    def more(self) -> bool:
        raw = self.stream.read(max(_BLOCK, len(self.text) - self.at))
        rest = self.text[self.at :]
        try:
            added = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object[: error.start].count(b"\n")
            raise UserError(f"{self.name}:{line} is not valid UTF-8: {_REPLACE_HINT}.") from error
        self.text, self.at = rest + added, 0
        return bool(raw)

    def next_object(self, where: str) -> dict[str, Any]:
        """Decodes the object that begins here."""
        while True:
            try:
                row, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # A fault near the end of what was read so far may only mean that more must be read.
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 12
                if cut_off and self.more():
                    continue
                line = self.line + self.text.count("\n", self.at, error.pos)
                raise UserError(
                    f"{self.name}:{line} is not valid JSON ({error.msg}): mend the file (it may be truncated)."
                ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} cannot be read as JSON ({error}): mend the file.") from error
            self.skip(end - self.at)
            return row

    def skip(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def next_character(self) -> str:
        """Skips white space; returns the character there, or an empty string at the end."""
        while True:
            blank = re.compile(r"\s*").match(self.text, self.at)
            self.skip(blank.end() - self.at if blank else 0)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more() and self.at >= len(self.text):
                return ""


def read_csv(stream: BinaryIO, name: str, errors: Errors, delimiter: str = ",") -> Rows:
    """Comma-separated values with a header line; fields may hold line breaks."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB refuses ordinary documents

    def lines() -> Iterator[str]:
        for number, raw in enumerate(stream, 1):
            line = _decode(raw, errors, f"{name}:{number}")
            yield line.removeprefix("\ufeff") if number == 1 else line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header):
            twice = next(h for h in header if header.count(h) > 1)
            raise UserError(f"{name}:1 has two columns called '{twice}': rename one.")
        while True:
            where = f"{name}:{reader.line_num + 1}"
            values = next(reader, None)
            if values is None:
                return
            if not values:
                continue
            if len(values) != len(header):
                raise UserError(
                    f"{where} has {len(values)} fields where the header has {len(header)}: mend the line "
                    f"(a field that holds a delimiter or a line break must be in quotation marks)."
                )
            yield dict(zip(header, values)), where
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num} is not valid CSV ({error}): mend the file.") from error


def read_text(stream: BinaryIO, name: str, errors: Errors, field: str) -> Rows:
    """The whole file as one document, in ``field``."""
    raw = stream.read()
    try:
        text = raw.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}:{line} is not valid UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the file): "
            f"{_REPLACE_HINT}."
        ) from error
    yield {field: text.removeprefix("\ufeff"), "file": name}, name


def read_parquet(path: Path, name: str, errors: Errors, columns: Sequence[str] | None) -> Rows:
    """Rows of a Parquet file, a batch at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if columns is not None and (missing := set(columns) - set(file.schema_arrow.names)):
                known = file.schema_arrow.names
                raise UserError(
                    f"{name} has no column '{min(missing)}' (columns: {', '.join(known)}): "
                    f"{did_you_mean(min(missing), known)}"
                )
            number = 0
            # Small batches: a row may be a document of many megabytes.
            for batch in file.iter_batches(batch_size=256, columns=list(columns) if columns else None):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError as error:
                    if errors == "strict":
                        raise UserError(
                            f"{name}: rows {number + 1} to {number + len(batch)} hold text that is not valid UTF-8: "
                            f"{_REPLACE_HINT}."
                        ) from error
                    rows = _replaced(batch)
                for row in rows:
                    number += 1
                    yield row, f"{name}: row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{name} is truncated or is not Parquet data ({str(error).splitlines()[0]}): make the file anew."
        ) from error


def _replaced(batch: Any) -> list[dict[str, Any]]:
    import pyarrow

    columns = {}
    for field_name, column in zip(batch.schema.names, batch.columns):
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            raw = column.cast(pyarrow.large_binary()).to_pylist()
            columns[field_name] = [None if r is None else r.decode("utf-8", "replace") for r in raw]
        else:
            columns[field_name] = column.to_pylist()
    return [dict(zip(columns, values)) for values in zip(*columns.values())]
