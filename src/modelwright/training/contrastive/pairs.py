"""Pairs of image and text, or text and text, in any number: memory-mapped, decoded one at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelwright.errors import UserError
from modelwright.progress import Progress, Silent
from modelwright.training.contrastive.images import BadImage, decode, image_identity, image_name
from modelwright.training.contrastive.pair_sources import Part, make_part, read_parts

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Bad:
    """A pair that cannot be used.

    Attributes:
        index: Its position among the pairs.
        name: File and line, and the image's name if it has one.
        reason: What is wrong with it, as it reads behind the name.
    """

    index: int
    name: str
    reason: str


class Pairs:
    """Pairs by position: ``pairs[i]`` is ``{"query": image or text, "key": text, "negatives": [text, …]}``.

    Images are decoded when a pair is asked for: RGB, upright, transparency on white. Everything else stays in
    memory-mapped tables, so that the object is small, also when it is sent to another process.

    Made by :func:`read_pairs` or :func:`pairs_of`.
    """

    def __init__(self, parts: Sequence[Part], rows: np.ndarray | None = None) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part.data) for part in self._parts)])
        self._rows = rows
        self._views = [part.data.select_columns(part.fields.columns) for part in self._parts]

    def __len__(self) -> int:
        return len(self._rows) if self._rows is not None else int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows([index])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    @property
    def kind(self) -> Literal["image-text", "text-text"]:
        """What the queries are."""
        return "image-text" if self._parts[0].fields.image else "text-text"

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that all sources have."""
        first = self._parts[0].data.column_names
        return [name for name in first if all(name in part.data.column_names for part in self._parts)]

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Returns pairs in the order asked for.

        Raises:
            UserError: A text is missing, or an image cannot be decoded; it names file and line.
            IndexError: There is no such pair.
        """
        found: list[dict[str, Any] | None] = [None] * len(indices)
        for number, part, local, positions in self._split(indices):
            for position, row, raw in zip(positions, local, self._raw(number, local)):
                try:
                    found[position] = _pair(raw, part)
                except _BadPair as error:
                    raise self._error(part, int(row), error) from error
        return [pair for pair in found if pair is not None]

    def identities(self, indices: Sequence[int] | np.ndarray | None = None) -> list[tuple[Any, str]]:
        """Returns what tells pairs' queries and keys from those of others, without decoding images.

        Args:
            indices: Which pairs; all by default.

        Returns:
            For each pair: the path of the image, a hash of its bytes, or the first text; and the key.
        """
        wanted = np.arange(len(self)) if indices is None else self._check(indices)
        found: list[Any] = [None] * len(wanted)
        for start in range(0, len(wanted), 256):
            for number, part, local, positions in self._split(wanted[start : start + 256]):
                for position, raw in zip(positions, self._raw(number, local)):
                    query = _get(raw, part.fields.query)
                    name = image_identity(query, part.base) if part.fields.image else query
                    found[start + int(position)] = (name, _get(raw, part.fields.key))
        return found

    def name(self, index: int) -> str:
        """Returns file and line of a pair, which may take a reading of the file up to it."""
        [(_, part, local, _)] = self._split([index])
        return part.where([int(local[0])])[0]

    def select(self, indices: Sequence[int] | np.ndarray) -> Pairs:
        """Returns some of the pairs, in the order given; nothing is copied but the positions.

        Raises:
            IndexError: There is no such pair.
        """
        rows = self._check(indices)
        return Pairs(self._parts, rows if self._rows is None else self._rows[rows])

    def fingerprint(self) -> str:
        """Returns a hash (hex) that changes when the sources, or which of their rows are used, change.

        Files are known by path, size and time of change, hub data sets and those in memory by the fingerprint of the
        ``datasets`` library. Image files that a source names by their path are not looked at.
        """
        seen: list[Any] = []
        for part in self._parts:
            states = [(f, f.stat()) for f in part.files]
            content = [[str(f.resolve()), s.st_size, s.st_mtime_ns] for f, s in states] or part.data._fingerprint
            seen.append([content, part.fields.query, part.fields.key, part.fields.negatives, str(part.base)])
        digest = hashlib.sha256(json.dumps(seen).encode())
        if self._rows is not None:
            digest.update(self._rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def column(self, name: str) -> np.ndarray:
        """Returns a column of numbers or truth values, such as cached reference embeddings, without decoding images.

        Returns:
            (pairs,), or (pairs, width) for a column of lists of equal length, in the column's own dtype.

        Raises:
            UserError: There is no such column, or it holds something else, missing values or lists of differing length.
        """
        for part in self._parts:
            if name not in part.data.column_names:
                raise UserError(f"{part.name} has no column '{name}' (columns: {', '.join(part.data.column_names)}).")
        whole = np.concatenate([_numbers(part, name) for part in self._parts])
        return whole if self._rows is None else whole[self._rows]

    def check_texts(self) -> list[Bad]:
        """Returns the pairs whose texts are missing, blank or no text, or whose negatives are too few or too many."""
        return self._named(self._bad_texts(set()))

    def check_images(self, progress: Progress | None = None, workers: int | None = None) -> list[Bad]:
        """Decodes every image once, and looks at every text.

        Args:
            progress: Told of each pair.
            workers: Threads (decoders do not hold the interpreter's lock); one per core by default.

        Returns:
            The pairs that cannot be used, in order: ``pairs.select(...)`` the others.
        """
        progress = progress or Silent()
        bad = {index: (index, part, row, reason) for index, part, row, reason in self._bad_texts(set())}
        progress.start("check", len(self))
        if self.kind == "text-text":
            progress.advance(len(self))
            return self._named([bad[i] for i in sorted(bad)])
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            # A few hundred at a time: encoded images are read here, and must not pile up.
            for start in range(0, len(self), 256):
                indices = np.arange(start, min(start + 256, len(self)))
                for number, part, local, positions in self._split(indices):
                    raws = self._raw(number, local)
                    for position, row, reason in zip(
                        positions, local, pool.map(_image_fault, raws, [part] * len(raws))
                    ):
                        if reason:
                            index = start + int(position)
                            bad.setdefault(index, (index, part, int(row), reason))
                progress.advance(len(indices))
        return self._named([bad[i] for i in sorted(bad)])

    def without_bad(self, progress: Progress | None = None, workers: int | None = None) -> tuple[Pairs, list[Bad]]:
        """Returns the pairs that :meth:`check_images` finds no fault with, and those that it does.

        Raises:
            UserError: None is left.
        """
        bad = self.check_images(progress, workers)
        if len(bad) == len(self):
            raise UserError(f"None of {len(self)} pairs can be used: {bad[0].name} {bad[0].reason}.")
        kept = np.ones(len(self), dtype=bool)
        kept[[b.index for b in bad]] = False
        return (self.select(np.flatnonzero(kept)) if bad else self), bad

    def _check(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise IndexError(f"there are {len(self)} pairs; asked for {int(rows.min())} to {int(rows.max())}")
        return np.where(rows < 0, rows + len(self), rows)

    def _split(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Part, np.ndarray, np.ndarray]]:
        """Yields for each part: its number, itself, the rows in it, and their positions among ``indices``."""
        rows = self._check(indices)
        if self._rows is not None:
            rows = self._rows[rows]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            positions = np.flatnonzero(numbers == number)
            yield int(number), self._parts[number], rows[positions] - self._starts[number], positions

    def _raw(self, number: int, local: np.ndarray) -> list[dict[str, Any]]:
        batch = self._views[number][local.tolist()]
        return [dict(zip(batch, values)) for values in zip(*batch.values())]

    def _bad_texts(self, counts: set[int]) -> Iterator[tuple[int, Part, int, str]]:
        """Yields position, part, row in it and reason; ``counts`` collects the numbers of negatives seen."""
        for start in range(0, len(self), _BATCH):
            indices = np.arange(start, min(start + _BATCH, len(self)))
            for number, part, local, positions in self._split(indices):
                columns = list(dict.fromkeys(f.split(".")[0] for f in (*part.fields.texts, *part.fields.negatives)))
                view = self._views[number].select_columns(columns)
                if (clean := _clean(view, local, part)) is not None and (not counts or counts == {clean}):
                    counts.add(clean)
                    continue
                batch = view[local.tolist()]
                for position, row, values in zip(positions, local, zip(*batch.values())):
                    raw = dict(zip(batch, values))
                    reason = next((r for f in part.fields.texts if (r := _text_fault(_get(raw, f), f))), None)
                    try:
                        negatives = _negatives(raw, part)
                    except _BadPair as error:
                        reason = reason or str(error)
                    else:
                        if not counts:
                            counts.add(len(negatives))
                        if len(negatives) not in counts:
                            expected = next(iter(counts))
                            reason = (
                                reason or f"has {len(negatives)} hard negative(s) where the first pair has {expected}"
                            )
                    if reason:
                        yield start + int(position), part, int(row), reason

    def _named(self, bad: Iterable[tuple[int, Part, int, str]]) -> list[Bad]:
        found = []
        for part, group in itertools.groupby(bad, key=lambda b: b[1]):
            members = list(group)
            names = part.where([row for _, _, row, _ in members])
            found += [Bad(index, name, reason) for (index, _, _, reason), name in zip(members, names)]
        return found

    def _error(self, part: Part, row: int, error: Exception) -> UserError:
        return UserError(f"{part.where([row])[0]} {error}: mend or remove the pair.")


class _BadPair(Exception):
    """What is wrong with a pair, as it reads behind its name."""


def read_pairs(
    sources: str | Path | Sequence[str | Path],
    *,
    query_field: str | None = None,
    key_field: str | None = None,
    negative_field: str | None = None,
    base: str | Path | None = None,
    bad_texts: Literal["refuse", "keep"] = "refuse",
) -> Pairs:
    """Opens pairs; the first time, a copy in the cache of the ``datasets`` library is made.

    Sources are JSONL, JSON, CSV, TSV and Parquet files (each also ``.gz`` or ``.zst``), WebDataset ``.tar`` files,
    folders of one of these (also with the images beside a ``metadata.jsonl``), folders that ``Dataset.save_to_disk``
    wrote, patterns, and hub ids (``org/name[:config][@split]``; the split is ``train`` unless given).

    Args:
        sources: One source, or several, read one after the other.
        query_field: Field of the image (a path, bytes, or an image of the ``datasets`` library) or of the first text.
            Found by its name otherwise: ``image``, ``jpg``, ``file_name`` …; ``query``, ``anchor``, ``question`` ….
        key_field: Field of the text that belongs to it. Found by its name otherwise: ``text``, ``caption``, ``txt`` …;
            ``positive``, ``answer`` …. ``json.caption`` is field ``caption`` of the object in field ``json``.
        negative_field: Field of hard negatives: a text, or a list of equally many in every row; or the stem of several
            fields ``stem_1``, ``stem_2`` …. Found by its name otherwise: ``negative``, ``negatives``, ``negative_1`` ….
        base: Folder that paths of images start from; by default that of the file in which they stand.
        bad_texts: Whether a missing or blank text is refused here, or kept for :meth:`Pairs.check_images` to report.

    Raises:
        UserError: A source does not exist, is damaged or empty, or lacks a field; texts are missing or blank; sources
            of images and of texts are mixed.
    """
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    if not listed:
        raise UserError("No source of pairs was given: name a file, folder, pattern or hub id.")
    return _whole(read_parts(listed, query_field, key_field, negative_field, base), bad_texts)


def pairs_of(
    data: Dataset,
    *,
    query_field: str | None = None,
    key_field: str | None = None,
    negative_field: str | None = None,
    base: str | Path | None = None,
    bad_texts: Literal["refuse", "keep"] = "refuse",
) -> Pairs:
    """Wraps a data set of the ``datasets`` library; arguments as for :func:`read_pairs`.

    Raises:
        UserError: See :func:`read_pairs`.
    """
    return _whole([make_part(data, (query_field, key_field, negative_field), base)], bad_texts)


def _whole(parts: list[Part], bad_texts: str) -> Pairs:
    first = parts[0]
    for part in parts[1:]:
        if part.fields.image != first.fields.image:
            with_images, without = (part, first) if part.fields.image else (first, part)
            raise UserError(
                f"{with_images.name} pairs images with texts, {without.name} texts with texts: train on one of them."
            )
    pairs = Pairs(parts)
    if bad_texts == "refuse":
        for _, part, row, reason in pairs._bad_texts(set()):
            raise UserError(f"{part.where([row])[0]} {reason}: mend or remove the pair.")
    return pairs


def _get(raw: dict[str, Any], field: str) -> Any:
    if field in raw:
        return raw[field]
    value: Any = raw
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text_fault(value: Any, field: str) -> str | None:
    if value is None:
        return f"has no text in the field '{field}'"
    if not isinstance(value, str):
        kind = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
        return f"has {kind.get(type(value), type(value).__name__)} in the field '{field}', not a text"
    if not value or value.isspace():
        return f"has a blank text in the field '{field}'"
    return None


def _negatives(raw: dict[str, Any], part: Part) -> list[str]:
    found: list[str] = []
    for field in part.fields.negatives:
        value = _get(raw, field)
        values = value if isinstance(value, list) else [value]
        for text in values:
            if fault := _text_fault(text, field):
                raise _BadPair(fault)
        found += values
    return found


def _pair(raw: dict[str, Any], part: Part) -> dict[str, Any]:
    for field in part.fields.texts:
        if fault := _text_fault(_get(raw, field), field):
            raise _BadPair(fault)
    query = _get(raw, part.fields.query)
    if part.fields.image:
        try:
            query = decode(query, part.base)
        except BadImage as error:
            raise _BadPair(_about(query, error)) from error
    return {"query": query, "key": _get(raw, part.fields.key), "negatives": _negatives(raw, part)}


def _image_fault(raw: dict[str, Any], part: Part) -> str | None:
    query = _get(raw, part.fields.query)
    try:
        decode(query, part.base)
    except BadImage as error:
        return _about(query, error)
    return None


def _clean(view: Dataset, local: np.ndarray, part: Part) -> int | None:
    """Returns how many negatives each of some rows has if all their texts are in order, else None; all at once."""
    import pyarrow
    from pyarrow import compute

    # Neighbours, as they nearly always are, are a slice of the memory map.
    rows: Any = slice(int(local[0]), int(local[-1]) + 1) if np.all(np.diff(local) == 1) else local.tolist()
    table = view.with_format("arrow")[rows]
    count = 0
    for field in (*part.fields.texts, *part.fields.negatives):
        if field not in table.column_names:
            return None
        column = table[field]
        each = 1
        if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            bounds = compute.min_max(compute.list_value_length(column)).as_py()
            if column.null_count or bounds["min"] != bounds["max"] or field in part.fields.texts:
                return None
            each, column = bounds["max"], compute.list_flatten(column)
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            return None
        blank = compute.equal(compute.utf8_trim_whitespace(column), "")
        if column.null_count or compute.any(blank, min_count=0).as_py():
            return None
        count += each * (field in part.fields.negatives)
    return count


def _about(source: Any, error: BadImage) -> str:
    name = image_name(source)
    return f"has an image{f' ({name})' if name else ''} that {error}"


def _numbers(part: Part, name: str) -> np.ndarray:
    import pyarrow

    table = part.data.select_columns([name]).with_format("arrow")[:]
    column = table.column(0)
    if column.null_count:
        raise UserError(f"{part.name}: {column.null_count} rows have no value in the column '{name}'.")
    width = None
    kind = column.type
    if isinstance(kind, pyarrow.ExtensionType):
        column, kind = column.cast(kind.storage_type), kind.storage_type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        import pyarrow.compute

        lengths = pyarrow.compute.min_max(pyarrow.compute.list_value_length(column)).as_py()
        if lengths["min"] != lengths["max"]:
            raise UserError(
                f"{part.name}: the column '{name}' has lists of {lengths['min']} to {lengths['max']} numbers: they "
                f"must be equally long."
            )
        width, column, kind = lengths["max"], pyarrow.compute.list_flatten(column), kind.value_type
        if column.null_count:
            raise UserError(f"{part.name}: lists in the column '{name}' have missing values.")
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)):
        raise UserError(f"{part.name}: the column '{name}' holds {kind}, not numbers.")
    values = column.to_numpy()
    return values if width is None else values.reshape(-1, width)
