"""Where results live: ``store/<key>/`` in the run's folder, done once its ``result.json`` is there."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from modelwright import provenance

#: A path in the store, as results keep it: relative to the run's folder, so that the folder can be moved.
_IN_STORE = re.compile(r"store/[0-9a-f]{16}(/|$)")
# Versions that do not decide what a step computes on a path that recipes use are left out.
_DECIDING = (
    "python",
    "zlib",
    "modelwright",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "scikit-learn",
)
# What atomic_path leaves when its process is killed: ".NAME.xxxxxxxx.partial".
_SCRATCH = re.compile(r"\..+\.[a-z0-9_]{8}\.partial")


@functools.cache
def code_identity() -> dict[str, str]:
    """Returns what identifies the code that steps run: versions, and a hash of this package's source.

    The hash is for those who change the source without changing its version. The parts that compute nothing
    (command line, recipes, report, claims) are left out of it.
    """
    package = Path(provenance.__file__).parent
    idle = ("cli", "recipes", "report", "verify")
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if relative.parts[0] not in idle and relative.name != "claim.py":
            digest.update(relative.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    versions = provenance.versions()
    return {**{name: versions[name] for name in _DECIDING if name in versions}, "source": digest.hexdigest()[:16]}


def key_of(verb: str, options: dict[str, Any]) -> str:
    """Returns the key of a step's result: 16 hexadecimal digits of a SHA-256.

    Args:
        verb: Its verb.
        options: Everything that decides the result, JSON-able: upstream results by their own keys, files by content.
    """
    identity = {"verb": verb, "options": options, "code": code_identity()}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The results of one run's folder.

    Args:
        run: The run's folder, absolute.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "store"

    def step(self, key: str) -> Path:
        """Returns a result's folder."""
        return self.folder / key

    def record(self, key: str, outputs: Collection[str]) -> dict[str, Any] | None:
        """Returns the ``result.json`` of a finished step, or None. A missing output makes it unfinished."""
        folder = self.step(key)
        try:
            record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if all((folder / name).exists() for name in outputs) else None

    def relative(self, value: Any) -> Any:
        """Returns nested values in which paths of this store are relative to the run's folder."""
        return _map_text(
            value, lambda text: text.removeprefix(f"{self.run}/") if text.startswith(f"{self.folder}/") else text
        )

    def absolute(self, value: Any) -> Any:
        """Undoes :meth:`relative`."""
        return _map_text(value, lambda text: f"{self.run}/{text}" if _IN_STORE.match(text) else text)

    def prune(self, keep: Collection[str]) -> int:
        """Removes results that are not in ``keep``; returns how many."""
        unused = [p for p in self.folder.glob("*") if p.is_dir() and p.name not in keep]
        for path in unused:
            shutil.rmtree(path, ignore_errors=True)
            (self.folder / f"{path.name}.error.txt").unlink(missing_ok=True)
        return len(unused)


def remove_scratch(folder: Path) -> None:
    """Removes what killed processes left of files that they were writing."""
    for path in folder.glob(".*.partial"):
        if _SCRATCH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _map_text(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
