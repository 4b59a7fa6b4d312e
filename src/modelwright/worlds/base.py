"""What every world shares: draws that no Python version changes, and a result that knows its splits and fingerprint."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from modelwright.errors import UserError

Row = dict[str, Any]
T = TypeVar("T")


class Draw:
    """Random draws that are the same on every machine and Python version.

    Of :class:`random.Random` only ``random()`` after an integer seed is promised never to change, so everything here
    is made from that one method.
    """

    def __init__(self, seed: int, stream: str) -> None:
        """Seeds from ``seed`` and a stream name, so that one part of a world never shifts the draws of another."""
        digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
        self.uniform = random.Random(int.from_bytes(digest[:16], "big")).random

    def below(self, n: int) -> int:
        """Returns an integer in ``[0, n)``."""
        return int(self.uniform() * n)

    def between(self, low: int, high: int) -> int:
        """Returns an integer in ``[low, high]``."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        """Returns one of ``items``."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """Returns ``n`` of ``items`` from different places, in random order; made for ``n`` far below their number."""
        places: dict[int, None] = {}
        while len(places) < n:
            places.setdefault(self.below(len(items)))
        return [items[place] for place in places]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """Returns the items in random order (Fisher-Yates)."""
        mixed = list(items)
        for i in range(len(mixed) - 1, 0, -1):
            j = self.below(i + 1)
            mixed[i], mixed[j] = mixed[j], mixed[i]
        return mixed


@dataclass(frozen=True)
class World:
    """Base of every world's result: the fields that hold a list of rows are its splits.

    Attributes:
        parameters: What the world was made with, the seed included.
    """

    parameters: dict[str, Any]

    def splits(self) -> dict[str, list[Row]]:
        """Returns the rows by split name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, list)}

    @property
    def counts(self) -> dict[str, Any]:
        """Rows per split; for rows that have a ``kind``, also how many of each kind."""
        found: dict[str, Any] = {}
        for name, rows in self.splits().items():
            found[name] = {"rows": len(rows)}
            kinds = [row["kind"] for row in rows if "kind" in row]
            found[name].update({kind: kinds.count(kind) for kind in sorted(set(kinds))})
        return found

    @property
    def truth(self) -> dict[str, Any]:
        """What is known exactly about the world beyond its rows (JSON-able)."""
        return {}

    def fingerprint(self) -> str:
        """Returns the SHA-256 (hex) of all rows of all splits; of pictures, their pixels count."""
        digest = hashlib.sha256()
        for name, rows in self.splits().items():
            for row in rows:
                line = json.dumps([name, row], sort_keys=True, ensure_ascii=True, default=_pixels)
                digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def _pixels(value: Any) -> Any:
    """Stands for the bytes of a picture's file in a fingerprint: one zlib packs the same pixels unlike another."""
    from PIL import Image

    if not isinstance(value, bytes):
        raise TypeError(f"a row holds a {type(value).__name__}")
    picture = Image.open(io.BytesIO(value))
    return [picture.mode, *picture.size, hashlib.sha256(picture.tobytes()).hexdigest()]


def check_at_least(low: float, **values: float) -> None:
    """Checks parameters by name.

    Raises:
        UserError: A value is below ``low``.
    """
    for name, value in values.items():
        if not value >= low:
            raise UserError(f"{name} is {value}: give at least {low}.")


def check_share(**values: float) -> None:
    """Checks that each value, by name, is a share.

    Raises:
        UserError: A value is outside [0, 1].
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}: give a share between 0 and 1.")
