"""Reading a user's records, whatever the file format, one at a time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelwright.data import formats
from modelwright.data.sources import Source, resolve
from modelwright.errors import UserError, did_you_mean

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """One document.

    Attributes:
        text: Its text; always encodable as UTF-8.
        row: All its fields, the text included.
        where: Where it was read, such as ``pool.jsonl:17``.
        index: Its position among all records, from 0.
    """

    text: str
    row: dict[str, Any]
    where: str
    index: int


class Records(Iterable[Record]):
    """The records of one or more sources, read anew at each iteration, with flat memory.

    Sources are files (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``; ``.txt``, ``.md``, ``.py`` and other
    text as one document per file; each also ``.gz`` or ``.zst``), folders (recursively, sorted), patterns, hub ids
    (``org/name[:config][@split]``, streamed; the split is ``train`` unless given) and ``-`` for standard input, which
    is kept in a temporary file so that it can be read again.

    Args:
        sources: One source, or several, read one after the other.
        text_field: Field that holds the text.
        encoding_errors: ``strict`` refuses bytes that are not UTF-8 and lone surrogates; ``replace`` puts U+FFFD.
        columns: Columns to read of Parquet files and hub data sets beside the text field; all by default.
        field_option: Name of the option that a user changes when the text field is missing, for the message; None
            where its name is fixed.

    Raises:
        UserError: A source does not exist or is of no known kind. Iterating raises it for every fault in the data,
            and if there is no record at all, with file and line.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        text_field: str = "text",
        encoding_errors: Literal["strict", "replace"] = "strict",
        columns: Sequence[str] | None = None,
        field_option: str | None = "text_field",
    ) -> None:
        if encoding_errors not in ("strict", "replace"):
            raise UserError(f"encoding_errors must be 'strict' or 'replace', not {encoding_errors!r}.")
        self.text_field = text_field
        self.encoding_errors: formats.Errors = encoding_errors
        self.columns = None if columns is None else list(dict.fromkeys([text_field, *columns]))
        self.field_option = field_option
        self.sources = resolve([sources] if isinstance(sources, str | Path) else list(sources))
        self._spool: Path | None = None

    @property
    def name(self) -> str:
        """The sources in words, for messages."""
        shown = ", ".join(s.name for s in self.sources[:3])
        return shown if len(self.sources) <= 3 else f"{shown} and {len(self.sources) - 3} more"

    def __iter__(self) -> Iterator[Record]:
        index = 0
        for source in self.sources:
            with contextlib.closing(self._rows(source)) as rows:
                for row, where in rows:
                    yield Record(self._text(row, where), row, where, index)
                    index += 1
        if index == 0:
            raise UserError(f"{self.name} holds no documents: give a source with at least one.")

    def texts(self) -> Iterable[str]:
        """Returns the texts alone, re-iterable like the records."""
        return _Texts(self)

    def fingerprint(self) -> str:
        """Returns a hash (hex) that changes when the files, or how they are read, change.

        Files are known by path, size and time of change; a hub data set by its id; standard input by its bytes.
        """
        seen: list[Any] = [self.text_field, self.encoding_errors, self.columns]
        for source in self.sources:
            if source.path is not None:
                state = source.path.stat()
                seen.append([str(source.path.resolve()), state.st_size, state.st_mtime_ns])
            elif source.kind == "stdin":
                with self._standard_input() as stream:
                    seen.append(hashlib.file_digest(stream, "sha256").hexdigest())
            else:
                seen.append(source.name)
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def _rows(self, source: Source) -> formats.Rows:
        if source.kind == "hub":
            yield from _hub_rows(source.name, self.columns)
        elif source.kind == "stdin":
            with self._standard_input() as stream:
                array = stream.read(256).lstrip().startswith(b"[")
                stream.seek(0)
                read = formats.read_json if array else formats.read_jsonl
                yield from read(stream, source.name, self.encoding_errors)
        else:
            yield from self._file_rows(source)

    def _file_rows(self, source: Source) -> formats.Rows:
        assert source.path is not None
        errors = self.encoding_errors
        if source.format == "parquet":
            yield from formats.read_parquet(source.path, source.name, errors, self.columns)
            return
        with formats.open_bytes(source.path, source.name) as stream:
            if source.format == "jsonl":
                yield from formats.read_jsonl(stream, source.name, errors)
            elif source.format == "json":
                yield from formats.read_json(stream, source.name, errors)
            elif source.format == "text":
                yield from formats.read_text(stream, source.name, errors, self.text_field)
            else:
                yield from formats.read_csv(stream, source.name, errors, "\t" if source.format == "tsv" else ",")

    @contextlib.contextmanager
    def _standard_input(self) -> Iterator[io.BufferedReader]:
        if self._spool is None:
            handle, path = tempfile.mkstemp(prefix="modelwright-stdin-")
            weakref.finalize(self, Path(path).unlink, missing_ok=True)
            with open(handle, "wb") as spool:  # noqa: PTH123
                shutil.copyfileobj(sys.stdin.buffer, spool, 1 << 20)
            self._spool = Path(path)
        with self._spool.open("rb") as stream:
            yield stream

    def _text(self, row: dict[str, Any], where: str) -> str:
        try:
            text = row[self.text_field]
        except KeyError:
            known = [str(k) for k in row]
            near = did_you_mean(self.text_field, known)
            option = self.field_option
            remedy = f"Name it with {option} (--{option.replace('_', '-')})." if option else "Each row needs it."
            raise UserError(
                f"{where} has no field '{self.text_field}' (fields: {', '.join(known) or 'none'})"
                f"{f'; {near}' if near.startswith('did') else ':'} {remedy}"
            ) from None
        if not isinstance(text, str):
            kind = "null" if text is None else f"of type {type(text).__name__}"
            raise UserError(f"{where}: the field '{self.text_field}' is {kind}, not text: mend or remove the record.")
        if not text.isascii() and (lone := _SURROGATE.search(text)):
            if self.encoding_errors == "strict":
                raise UserError(
                    f"{where}: the text holds a lone surrogate (\\u{ord(lone[0]):04x}), which is not valid Unicode: "
                    f"mend it, or read with encoding_errors='replace' (--encoding-errors replace)."
                )
            text = row[self.text_field] = _SURROGATE.sub("\ufffd", text)
        return text


class _Texts(Iterable[str]):
    def __init__(self, records: Records) -> None:
        self.records = records

    def __iter__(self) -> Iterator[str]:
        return (record.text for record in self.records)


def read_texts(sources: str | Path | Sequence[str | Path], text_field: str = "text", **options: Any) -> list[str]:
    """Reads all texts of small sources, such as target examples, into memory; arguments as for :class:`Records`."""
    return list(Records(sources, text_field, **options).texts())


def _hub_rows(name: str, columns: Sequence[str] | None) -> formats.Rows:
    identifier, _, split = name.partition("@")
    identifier, _, config = identifier.partition(":")
    import datasets

    try:
        data = datasets.load_dataset(identifier, config or None, split=split or "train", streaming=True)
        if columns is not None:
            data = data.select_columns(list(columns))
        for number, row in enumerate(data, 1):
            yield row, f"{name}: row {number}"
    except UserError:
        raise
    except Exception as error:
        # datasets, huggingface_hub and the network raise errors of many families; all mean the same to a user.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no file here, and reading it as a hub data set failed ({first_line}): check the name, the "
            f"configuration (org/name:config), the split (org/name@split) and the network."
        ) from error
