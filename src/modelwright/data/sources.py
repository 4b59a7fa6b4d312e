"""What a source may be: a file, a folder, a pattern, a hub id or standard input; and which files that means."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelwright.errors import UserError

Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "text"]

RECORD_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
#: One file, one document.
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".log", ".py", ".pyi", ".js", ".jsx",
    ".ts", ".tsx", ".java", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".rs", ".rb", ".php", ".swift", ".kt",
    ".scala", ".hs", ".ml", ".lean", ".v", ".r", ".jl", ".lua", ".pl", ".sh", ".sql", ".yaml", ".yml", ".toml", ".ini",
    ".css",
})  # fmt: skip
COMPRESSIONS = (".gz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[^@]+)?")


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read, or one hub data set, or standard input.

    Attributes:
        name: As it is named in messages.
        kind: How it is reached.
        path: The file, for ``file``.
        format: How it is read, for ``file``.
    """

    name: str
    kind: Literal["file", "hub", "stdin"]
    path: Path | None = None
    format: Format | None = None


def file_format(path: Path) -> Format | None:
    """Returns how a file is read, by its suffix (before ``.gz`` or ``.zst``), or None for an unknown one."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
    return RECORD_SUFFIXES.get(suffix) or ("text" if suffix in TEXT_SUFFIXES else None)


def resolve(sources: Sequence[str | Path]) -> list[Source]:
    """Returns the files that the sources mean, in the order given, each folder and pattern sorted by name.

    Raises:
        UserError: A source does not exist, matches nothing, or is of an unknown kind.
    """
    if not sources:
        raise UserError("No source was given: name a file, folder, pattern, hub id, or '-' for standard input.")
    found: list[Source] = []
    for source in sources:
        found += _resolve_one(str(source))
    names = [s.name for s in found if s.kind == "stdin"]
    if len(names) > 1:
        raise UserError("Standard input ('-') was given twice: it can be read for one source only.")
    return found


def _resolve_one(source: str) -> list[Source]:
    if source == "-":
        return [Source("standard input", "stdin")]
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return [_file(path)]
    if any(c in source for c in "*?["):
        # glob, because Path.glob takes no absolute pattern.
        if matches := sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207
            files = [Path(m) for m in matches if not Path(m).is_dir()]
            return [_file(f) for f in files] or [s for m in matches for s in _folder(Path(m))]
        if not _HUB_ID.fullmatch(source):
            raise UserError(f"No file matches the pattern {source}: check it (quote it, so that the shell leaves it).")
    # 'data/pool.jsonl' is a file that is missing, and so is anything below a folder that exists.
    looks_local = file_format(path) is not None or path.parent.is_dir() or source.startswith((".", "/", "~"))
    if _HUB_ID.fullmatch(source) and not looks_local:
        return [Source(source, "hub")]
    raise UserError(f"{source} does not exist: check the path.")


def _file(path: Path) -> Source:
    kind = file_format(path)
    if kind is None:
        known = ", ".join([*RECORD_SUFFIXES, ".txt", ".md", ".py"])
        raise UserError(
            f"{path} has an unknown suffix '{path.suffix}': rename it to say what it holds (known: {known} and other "
            f"text, each also with .gz or .zst)."
        )
    return Source(str(path), "file", path, kind)


def _folder(folder: Path) -> list[Source]:
    """All readable files below a folder; hidden ones and ``__pycache__`` are left out."""

    def hidden(file: Path) -> bool:
        return any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)

    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not hidden(f) and file_format(f)]
    if not files:
        raise UserError(f"The folder {folder} holds no file of a known kind (JSONL, JSON, CSV, Parquet, text).")
    records = [f for f in files if file_format(f) != "text"]
    texts = [f for f in files if file_format(f) == "text"]
    if records and texts:
        # Guessing here would silently read a README as a document, or a table of settings as the pool.
        raise UserError(
            f"The folder {folder} holds both records ({records[0].name}, …) and plain text ({texts[0].name}, …): "
            f"say which by a pattern, such as '{folder}/**/*{records[0].suffix}'."
        )
    return [_file(f) for f in files]
