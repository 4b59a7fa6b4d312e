"""Real text that is on every machine that runs Python: the standard library's own prose and code.

Three kinds: the language reference (``pydoc_data.topics``), docstrings, and code without docstrings. The target is the
reference, so the task is to find it among docstrings (prose about the same things) and code.

Left out: ``encodings``, ``lib2to3``, ``pydoc_data`` and other generated or table-like modules (they compress to almost
nothing and no one would train on them); tests, ``idlelib``, ``turtledemo`` and ``ensurepip`` (applications and fixtures
that many installations lack); ``site-packages`` (not the standard library); ``_sysconfigdata*`` (holds the builder's
paths).

The documents are those of the running Python, so they change with its version, by nature: compare ``fingerprint()``
before comparing results across machines. Given the same files, a seed gives the same bytes.
"""

from __future__ import annotations

import ast
import importlib
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.errors import UserError
from modelwright.worlds.base import Draw, Row, World, check_at_least, check_share

# fmt: off
_SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idlelib", "turtledemo", "ensurepip", "lib2to3", "encodings", "pydoc_data", "site-packages",
    "dist-packages", "lib-dynload", "__pycache__", "__phello__",
})
# fmt: on
_SKIPPED_FILES = re.compile(r"_sysconfigdata|html/entities\.py$|stringprep\.py$")

#: Lines with at least this many characters are text of their own; two topics with one in common overlap.
LONG_LINE = 40


@dataclass(frozen=True)
class StdlibWorld(World):
    """Chunks of the standard library. Rows: ``text``, ``kind`` (reference, docstring, code), ``name`` (topic or file).

    Attributes:
        pool: Chunks of all three kinds, shuffled.
        target: Reference chunks of topics that are nowhere else.
        heldout: Reference chunks of other topics that are nowhere else.
    """

    pool: list[Row]
    target: list[Row]
    heldout: list[Row]

    @property
    def truth(self) -> dict[str, Any]:
        """``target_kind``, the topics of each split, and the version of Python whose library it is."""
        topics = {
            name: sorted({row["name"] for row in rows if row["kind"] == "reference"})
            for name, rows in self.splits().items()
        }
        return {"target_kind": "reference", "topics": topics, "python": platform.python_version()}


def stdlib_text(
    seed: int = 0,
    *,
    pool_chunks: int = 3000,
    target_chunks: int = 40,
    heldout_chunks: int = 60,
    docstring_share: float = 0.25,
    min_bytes: int = 600,
    max_bytes: int = 1100,
    root: str | Path | None = None,
) -> StdlibWorld:
    """Makes the world.

    Target, held-out and the pool's reference chunks have no topic in common, and no line of 40 or more characters:
    where topics repeat each other's text (``compound`` contains ``if``, ``while``, ...) the smallest topic keeps it.
    No topic is more than a third of the target or of the held-out set (or 5 chunks); larger ones are in the pool.
    All other reference chunks go to the pool; docstrings and code fill it up. No chunk occurs twice.

    Args:
        seed: Decides which topics go where, which files are read, where chunks end, and the pool's order.
        pool_chunks: Size of the pool.
        target_chunks: Size of the target.
        heldout_chunks: Size of the held-out set.
        docstring_share: Share of docstrings among the pool's chunks that are not reference.
        min_bytes: Least UTF-8 size of a chunk.
        max_bytes: Greatest UTF-8 size of a chunk; sizes are spread alike for all kinds.
        root: Folder of the library; the running Python's when not given.

    Raises:
        UserError: A parameter is out of range, or the library has less text than asked for.
    """
    parameters = locals().copy()
    del parameters["root"]  # this machine's
    check_at_least(1, pool_chunks=pool_chunks, target_chunks=target_chunks, min_bytes=min_bytes)
    check_at_least(0, heldout_chunks=heldout_chunks)
    check_share(docstring_share=docstring_share)
    if max_bytes < min_bytes + 80:
        raise UserError(f"max_bytes is {max_bytes}: give at least min_bytes + 80, so that a line fits between them.")
    size = (min_bytes, max_bytes)
    target, heldout, reference = _split_reference(seed, target_chunks, heldout_chunks, size)
    draw = Draw(seed, "pool")
    pool = draw.shuffled(reference)[:pool_chunks]
    rest = pool_chunks - len(pool)
    docstrings = round(rest * docstring_share)
    wanted = {"docstring": docstrings, "code": rest - docstrings}
    # No sentence of the evaluation may stand in a docstring either.
    taboo = {line for row in (*target, *heldout) for line in _long_lines(row["text"])}
    pool += _from_files(Path(root or sysconfig.get_path("stdlib")), seed, wanted, size, taboo)
    return StdlibWorld(parameters, draw.shuffled(pool), target, heldout)


def chunks(text: str, draw: Draw, min_bytes: int, max_bytes: int) -> Iterator[str]:
    """Cuts a text at line ends into pieces of ``min_bytes`` to ``max_bytes`` UTF-8 bytes.

    A piece ends with the first line that brings it to its goal, which is uniform from ``min_bytes`` to 80 bytes (a
    line) below ``max_bytes``. The end of the text that is too short for a piece, and a piece that a long line carries
    over ``max_bytes``, are left out. Pieces begin and end with a line that is not blank.
    """
    piece: list[str] = []
    size, goal = -1, draw.between(min_bytes, max_bytes - 80)  # -1: the last line's end does not count
    for line in text.splitlines():
        blank = not line.strip()
        if blank and not piece:
            continue
        piece.append(line)
        size += len(line.encode()) + 1
        if not blank and size >= goal:
            if size <= max_bytes:
                yield "\n".join(piece)
            piece, size, goal = [], -1, draw.between(min_bytes, max_bytes - 80)


def reference_passages(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """Gives every long line to one topic only: the smallest that has it.

    Returns:
        For each topic, in order of size, the passages that remain when the lines of smaller topics are taken out.
    """
    owner: dict[str, str] = {}
    passages: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        parts: list[list[str]] = [[]]
        for line in topics[name].splitlines():
            key = line.strip()
            if len(key) >= LONG_LINE and owner.setdefault(key, name) != name:
                if parts[-1]:
                    parts.append([])
            else:
                parts[-1].append(line)
        passages[name] = ["\n".join(part) for part in parts]
    return passages


def _long_lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE)


def _split_reference(
    seed: int, target_chunks: int, heldout_chunks: int, size: tuple[int, int]
) -> tuple[list[Row], list[Row], list[Row]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UserError(
            "This Python comes without pydoc_data, the language reference that stdlib_text is made of: install your "
            "system's full Python standard library, or use the world 'domains'."
        ) from error
    by_topic: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for name, passages in reference_passages(topics).items():
        draw = Draw(seed, f"reference/{name}")
        texts = [text for passage in passages for text in chunks(passage, draw, *size)]
        by_topic[name] = [_row(text, "reference", name) for text in texts if text not in seen]
        seen.update(texts)
    order = Draw(seed, "topics").shuffled(sorted(by_topic))
    splits: list[list[Row]] = []
    for split, wanted in (("target", target_chunks), ("heldout", heldout_chunks)):
        # A topic that would be most of a split says little about the kind as a whole.
        largest = max(5, -(-wanted // 3))
        rows: list[Row] = []
        for name in [name for name in order if len(by_topic[name]) <= largest]:
            if len(rows) >= wanted:
                break
            rows += by_topic[name]
            order.remove(name)
        if len(rows) < wanted:
            raise UserError(
                f"The language reference has {sum(map(len, by_topic.values()))} chunks in {len(by_topic)} topics, too "
                f"few for {target_chunks} target and {heldout_chunks} held-out chunks of different topics: ask for "
                "fewer, or for smaller ones."
            )
        # What the last topic has too much is left out: it belongs to this split alone.
        splits.append(Draw(seed, split).shuffled(rows[:wanted]))
    return splits[0], splits[1], [row for name in order for row in by_topic[name]]


def _from_files(
    root: Path, seed: int, wanted: Mapping[str, int], size: tuple[int, int], taboo: Iterable[str]
) -> list[Row]:
    """Reads files in random order until there are enough chunks of each kind."""
    files = Draw(seed, "files").shuffled(library_files(root))
    found: dict[str, list[Row]] = {kind: [] for kind in wanted}
    taboo, seen = frozenset(taboo), set[str]()
    for name in files:
        missing = [kind for kind in wanted if len(found[kind]) < wanted[kind]]
        if not missing:
            break
        texts = dict(zip(("docstring", "code"), split_source((root / name).read_bytes())))
        for kind in missing:
            for text in chunks(texts[kind], Draw(seed, f"{kind}/{name}"), *size):
                if text not in seen and taboo.isdisjoint(_long_lines(text)):
                    seen.add(text)
                    found[kind].append(_row(text, kind, name))
    for kind, rows in found.items():
        if len(rows) < wanted[kind]:
            raise UserError(
                f"The standard library has {len(rows)} {kind} chunks of {size[0]}-{size[1]} bytes, fewer than the "
                f"{wanted[kind]} asked for: make pool_chunks smaller, or change docstring_share."
            )
    return [row for kind, rows in found.items() for row in rows[: wanted[kind]]]


def library_files(root: Path) -> list[str]:
    """Returns the names, relative to ``root``, of the modules that are used, sorted."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        inside = Path(folder).relative_to(root)
        names += [(inside / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(name for name in names if not _SKIPPED_FILES.search(name))


def split_source(source: bytes) -> tuple[str, str]:
    """Splits a module into its docstrings (each dedented, a blank line between them) and its code without them.

    Both are empty when the source is not UTF-8 or does not parse: a library may hold files for another Python.
    """
    try:
        text = source.decode("utf-8-sig").replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return "", ""
    # ast counts lines at "\n" only; str.splitlines would also cut at form feeds, which old modules have.
    lines = text.split("\n")
    docstrings = []
    blocks: list[list[ast.stmt]] = [tree.body]
    documented: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while blocks:
        for node in blocks.pop():
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                documented.append(node)
            for block in ("body", "orelse", "finalbody"):
                if inner := getattr(node, block, None):
                    blocks.append(inner)
            blocks += [handler.body for handler in getattr(node, "handlers", ())]
    for owner in sorted(documented, key=lambda node: getattr(node, "lineno", 0)):
        if docstring := ast.get_docstring(owner):
            docstrings.append(docstring)
            first = owner.body[0]
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    code = "\n".join(lines)
    return "\n\n".join(docstrings), re.sub(r"\n\s*\n\s*\n", "\n\n", code)


def _row(text: str, kind: str, name: str) -> Row:
    return {"text": text, "kind": kind, "name": name}
