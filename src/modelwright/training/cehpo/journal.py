"""The scores of a search, written as they come, so that a search that was killed goes on instead of beginning anew."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.errors import UserError


class Journal:
    """A JSON-lines file: the search it belongs to, then one line for each evaluation. Draws are the same every time, so
    the lines of an earlier run answer the first evaluations of this one.

    Args:
        path: The file; None keeps nothing.
        search: What the evaluations depend on.

    Raises:
        UserError: The file is there and belongs to another search, or is not a journal.
    """

    def __init__(self, path: str | Path | None, search: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._lines: list[dict[str, Any]] = []
        head = json.loads(json.dumps({"search": search}, default=repr))
        if self.path is None:
            return
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder: name a file for the journal.")
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # the last line of a killed run may be cut
            try:
                if not whole and not _line(head).startswith(content.decode("utf-8")):
                    raise ValueError("neither a line nor the beginning of one")
                lines = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
                found = lines[0] if lines else head
                self._lines = lines[1:]
            except (ValueError, UnicodeDecodeError) as error:
                raise UserError(f"{self.path} is not the journal of a search: name another file.") from error
            if found != head:
                raise UserError(
                    f"{self.path} is the journal of a search with another space, seed or population, or about "
                    f"something else: repeat that search, remove the file, or name another."
                )
            if lines:
                os.truncate(self.path, len(whole))  # not written anew: a kill in the middle would lose what is kept
                return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append(head, "w")

    def replay(self, settings: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
        """Returns the scores (and failures) of as many of the settings, from the first, as earlier lines answer."""
        answered: list[tuple[float, str]] = []
        for setting in settings:
            if not self._lines:
                break
            line = self._lines.pop(0)
            if line.get("setting") != json.loads(json.dumps(setting, default=repr)):
                raise UserError(f"{self.path} holds other settings than this search draws: remove it, or name another.")
            score = line.get("score")
            answered.append((-math.inf if score is None else float(score), line.get("failure", "")))
        return answered

    def write(self, setting: Mapping[str, Any], score: float, failure: str) -> None:
        """Adds an evaluation."""
        line: dict[str, Any] = {"setting": setting, "score": score if math.isfinite(score) else None}
        if failure:
            line["failure"] = failure
        self._append(line)

    def _append(self, line: Mapping[str, Any], mode: str = "a") -> None:
        if self.path is not None:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(_line(line))


def _line(content: Mapping[str, Any]) -> str:
    """Returns a line of ASCII: so it has no other ends of lines within, and no half of a character."""
    return json.dumps(content, default=repr) + "\n"
