"""What a step reads from outside the recipe: files by their content, everything else by its name."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from pathlib import Path

from modelwright.errors import UserError
from modelwright.files import content_hash, write_json

# A name that ends so is meant to be a file, and not a model or data set on the hub.
_SUFFIXES = {
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".zst", ".py", ".yaml", ".yml",
    ".safetensors", ".toml", ".html",
}  # fmt: skip


class Inputs:
    """Content hashes of files and folders, remembered by size and time of change.

    Args:
        memory: File that keeps the hashes between runs.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._changed = False
        try:
            self._known: dict[str, list[str]] = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def identity(self, given: str) -> list[str]:
        """Returns what stands for an input in a step's key.

        Args:
            given: A path, a glob, or the name of something on the hub.

        Raises:
            UserError: It is meant to be a file and does not exist; the message does not name the place in the recipe.
        """
        if given == "-":
            raise UserError("standard input cannot be read in a recipe: give a file.")
        path = Path(given).expanduser()
        if path.exists():
            return [path.name, self._hash(path)]
        if glob.has_magic(given):
            matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not matches:
                raise UserError(f"no file matches {given}.")
            return [part for match in matches for part in (Path(match).name, self._hash(Path(match)))]
        explicit = path.is_absolute() or given.startswith((".", "~")) or given.endswith("/")
        if explicit or path.suffix.lower() in _SUFFIXES:
            raise UserError(f"{given} does not exist.")
        return [given]

    def save(self) -> None:
        """Keeps the hashes for the next run."""
        if self._changed:
            write_json(self._memory, self._known)

    def _hash(self, path: Path) -> str:
        key, (signature, newest) = str(path.resolve()), _signature(path)
        if self._known.get(key, ["", ""])[0] == signature:
            return self._known[key][1]
        found = content_hash(path)
        # A file that was written just now may change again without a change of size and time.
        if time.time_ns() - newest > 2_000_000_000:
            self._known[key] = [signature, found]
            self._changed = True
        return found


def _signature(path: Path) -> tuple[str, int]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest, newest = hashlib.sha256(), 0
    for file in files:
        stat = file.stat()
        newest = max(newest, stat.st_mtime_ns)
        digest.update(os.fsencode(file) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest(), newest
