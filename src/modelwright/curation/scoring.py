"""Scoring a pool of any size, so that a killed run goes on where it was.

Per document a record of 12 to 33 bytes is kept: score, length and, where the rule needs them, tokens, hash and group.
It is appended to a file beside the output after every batch; memory holds one batch of documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from modelwright import __version__
from modelwright.curation.overlap import HeldOut, duplicate_hash
from modelwright.curation.selector import Selector
from modelwright.data import Record, Records
from modelwright.errors import UserError, did_you_mean
from modelwright.progress import Progress

BATCH_DOCUMENTS = 2048
_BATCH_BYTES = 16 << 20

TokenCounter = Callable[[Sequence[str]], list[int]]


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is kept of every document beside score and length.

    Attributes:
        tokens: Counts tokens.
        hashes: Whether duplicates must be known.
        group_field: Field that names a document's group.
        heldout: Documents that share an n-gram with these are blocked.
    """

    tokens: TokenCounter | None = None
    hashes: bool = False
    group_field: str | None = None
    heldout: HeldOut | None = None

    @property
    def dtype(self) -> np.dtype:
        """The record of one document."""
        fields = [("score", "<f8"), ("length", "<u4")]
        fields += [("tokens", "<u4")] if self.tokens else []
        fields += [("hash", "<u8")] if self.hashes else []
        fields += [("group", "<i4")] if self.group_field else []
        fields += [("blocked", "?")] if self.heldout else []
        return np.dtype(fields)


class ScoreLog:
    """The records of the documents scored so far, in a folder; only a run with the same key goes on with it.

    Attributes:
        count: Documents recorded.
        groups: Names of the groups by their number.
    """

    def __init__(self, folder: Path, key: str, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._data, self._groups, self._key = folder / "scores.bin", folder / "groups.jsonl", folder / "key"
        if folder.exists() and not (self._key.is_file() and self._key.read_text(encoding="utf-8") == key):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._data.touch()
        self._groups.touch()
        self._key.write_text(key, encoding="utf-8")
        # A run that was killed while it wrote may have left a part of a record or of a line.
        self.count = self._data.stat().st_size // dtype.itemsize
        with self._data.open("r+b") as stream:
            stream.truncate(self.count * dtype.itemsize)
        lines = self._groups.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self._groups.write_text("".join(whole), encoding="utf-8")
        self.groups: list[str] = [json.loads(line) for line in whole]
        self._numbers = {name: number for number, name in enumerate(self.groups)}

    def group_number(self, name: str) -> int:
        """Returns a group's number; a new one is written down before any record that uses it."""
        if name not in self._numbers:
            with self._groups.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(name) + "\n")
            self._numbers[name] = len(self.groups)
            self.groups.append(name)
        return self._numbers[name]

    def append(self, records: np.ndarray) -> None:
        """Adds a batch of records."""
        try:
            with self._data.open("ab") as stream:
                stream.write(records.tobytes())
        except OSError as error:
            raise UserError(
                f"The scores could not be kept in {self.folder}: {(error.strerror or str(error)).lower()}. Free some "
                f"space and give the same command again: it continues after {self.count:,} documents."
            ) from error
        self.count += len(records)

    def load(self) -> np.ndarray:
        """Returns all records, shape ``(count,)``."""
        return np.fromfile(self._data, dtype=self.dtype)

    def pool_scores(self, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns scores that were computed for the whole pool at once, from the folder if they are there."""
        path = self.folder / "pool_scores.npy"
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, compute())
            partial.replace(path)
        return np.load(path, allow_pickle=False)

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def run_key(selector: Selector, target: Sequence[str], records: Records, columns: Columns, more: Any = None) -> str:
    """Returns a hash (hex) of all that decides the records, so that none of another run is taken up."""
    digest = hashlib.sha256()
    for text in target:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    method = type(selector)
    parts = {
        "version": __version__,
        "method": f"{method.__module__}.{method.__qualname__}",
        "options": {f.name: repr(getattr(selector, f.name)) for f in dataclasses.fields(cast(Any, selector)) if f.init},
        "details": selector.details(),
        "pool": records.fingerprint(),
        "target": digest.hexdigest(),
        "columns": [str(columns.dtype), columns.group_field],
        "more": more,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def batches(items: Iterable[Record]) -> Iterator[list[Record]]:
    """Cuts records into batches that are bounded in documents and in bytes."""
    batch: list[Record] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text)
        if len(batch) == BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def utf8_length(text: str) -> int:
    """Returns the length in UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def score_texts(selector: Selector, texts: Sequence[str], workers: int = 1) -> np.ndarray:
    """Scores texts; blank ones get NaN whatever the method says.

    Returns:
        float64, shape ``(len(texts),)``.
    """
    return _checked(selector, selector.score(texts, workers), texts)


def _checked(selector: Selector, scores: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    scores = np.array(scores, dtype=np.float64)
    if scores.shape != (len(texts),):
        raise ValueError(f"{type(selector).__name__} gave scores of shape {scores.shape} for {len(texts)} documents")
    scores[[not text or text.isspace() for text in texts]] = np.nan
    return scores


class Watched(Iterable[str]):
    """The pool's texts for a method that reads them itself; each pass advances the progress."""

    def __init__(self, records: Records, progress: Progress, label: str) -> None:
        self.records, self.progress, self.label = records, progress, label
        self.count: int | None = None

    def __iter__(self) -> Iterator[str]:
        self.progress.start(self.label, self.count)
        seen = 0
        for batch in batches(self.records):
            yield from (record.text for record in batch)
            seen += len(batch)
            self.progress.advance(len(batch))
        self.count = seen


def score_records(
    selector: Selector,
    records: Records,
    columns: Columns,
    log: ScoreLog,
    progress: Progress,
    workers: int = 1,
    total: int | None = None,
) -> np.ndarray:
    """Scores every record that the log does not have yet.

    Args:
        selector: A fitted method.
        records: The pool.
        columns: What else to keep.
        log: Where the records go, and come from if an earlier run was cut short.
        progress: Told of every batch.
        workers: Passed to the method.
        total: Documents in the pool, if known.

    Returns:
        Structured array of ``columns.dtype``, one per document of the pool.

    Raises:
        UserError: The data are faulty, or no document has the group field.
    """
    whole = None
    if selector.whole_pool:
        texts = Watched(records, progress, "reading the pool")
        whole = log.pool_scores(lambda: selector.score_pool(texts, workers))
        total = len(whole)
    if log.count:
        progress.message(f"Continuing an earlier run: {log.count:,} documents are scored already.")
    progress.start("scoring", total)
    fields: dict[str, None] = {}
    for batch in batches(records):
        if batch[-1].index < log.count:
            progress.advance(len(batch))
            continue
        skipped = max(0, log.count - batch[0].index)
        batch = batch[skipped:]
        texts_now = [record.text for record in batch]
        table = np.zeros(len(batch), dtype=columns.dtype)
        if whole is None:
            table["score"] = score_texts(selector, texts_now, workers)
        else:
            table["score"] = _checked(selector, whole[batch[0].index : batch[-1].index + 1], texts_now)
        table["length"] = [utf8_length(text) for text in texts_now]
        if columns.tokens:
            table["tokens"] = columns.tokens(texts_now)
        if columns.hashes:
            table["hash"] = [duplicate_hash(text) for text in texts_now]
        if columns.group_field:
            fields.update(dict.fromkeys(batch[0].row))
            table["group"] = [log.group_number(str(r.row.get(columns.group_field, "(none)"))) for r in batch]
        if columns.heldout:
            table["blocked"] = [bool(columns.heldout.shared(text)) for text in texts_now]
        log.append(table)
        progress.advance(skipped + len(batch))
    if columns.group_field and log.groups == ["(none)"]:
        raise UserError(
            f"No document of {records.name} has the field '{columns.group_field}' (--group-field): "
            f"{did_you_mean(columns.group_field, fields)}"
        )
    table = log.load()
    if whole is not None and len(whole) != len(table):
        raise ValueError(f"{type(selector).__name__} gave {len(whole)} scores for {len(table)} documents")
    return table
