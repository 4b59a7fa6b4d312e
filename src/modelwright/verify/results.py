"""Where results of claims are kept, and how they are read. Standard library only: `modelwright list` reads them.

One file per method and scale, ``results/claims/METHOD.SCALE.json``: the document that
:func:`modelwright.verify.runner.run_claim` returns. The project's own results are committed, and shipped in the
package, so that a reader of `modelwright list` sees what was measured without running anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 1
#: Scales whose results count as evidence; a miniature only shows that the experiment runs.
EVIDENCE = ("cpu", "gpu")


def shipped_folder() -> Path | None:
    """Returns the folder with the project's own results: ``_results`` in an installed package, or a checkout's."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent.parent
    if (package / "_results").is_dir():
        return package / "_results"
    return checkout / "results" if (checkout / "pyproject.toml").is_file() else None


def file_name(method: str, scale: str) -> str:
    """Returns the name of a result's file, such as ``zip-fit.cpu.json``."""
    return f"{method}.{scale}.json"


def claims(folder: Path | None = None) -> list[dict[str, Any]]:
    """Returns every readable claim result below ``folder/claims``, sorted by file name.

    Args:
        folder: A results folder; None takes the project's own.
    """
    folder = folder or shipped_folder()
    found = []
    for path in sorted((folder / "claims").glob("*.json")) if folder else []:
        document = _read(path)
        if document is not None:
            found.append(document)
    return found


def latest(method: str, folder: Path | None = None) -> dict[str, Any] | None:
    """Returns the newest result of a method's claim at a scale that counts as evidence, or None.

    Args:
        method: Name of the method's card.
        folder: A results folder; None takes the project's own.

    Returns:
        The result document, with at least ``verdict``, ``scale``, ``seeds`` and ``date``. On equal dates the larger
        scale wins.
    """
    folder = folder or shipped_folder()
    found = [_read(folder / "claims" / file_name(method, scale)) for scale in EVIDENCE] if folder else []
    dated = [(d["date"], EVIDENCE.index(d["scale"]), d) for d in found if d is not None]
    return max(dated, key=lambda entry: entry[:2])[2] if dated else None


def _read(path: Path) -> dict[str, Any] | None:
    # A file that cannot be read is no evidence; `modelwright list` must not fail over it.
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return None
    return document if {"method", "scale", "verdict", "date", "seeds"} <= document.keys() else None
