"""The two controls of every selection: a random sample, and everything."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from modelwright.curation.selector import SelectorMixin
from modelwright.options import Arg

__all__ = ["AllSelector", "RandomSelector"]


@dataclass(kw_only=True)
class RandomSelector(SelectorMixin):
    """Ranks documents at random: what a method must beat at the same budget.

    The number that ranks a document is a hash of the seed and the text, so the sample is the same in one process, in
    many, and after a restart. Documents with equal texts get equal numbers: use ``dedup`` to keep one of them.
    """

    seed: Annotated[int, Arg("Another seed is another sample.")] = 0

    needs_target: ClassVar[bool] = False

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Returns numbers that are uniform on [0, 1), float64, shape ``(len(texts),)``."""
        key = str(self.seed).encode()[:64]
        hashes = (hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for t in texts)
        # 53 bits are what a float64 holds exactly.
        return np.array([(int.from_bytes(h, "little") >> 11) / 2**53 for h in hashes], dtype=np.float64)


@dataclass(kw_only=True)
class AllSelector(SelectorMixin):
    """Keeps every document in the pool's order; with a limit, the first ones."""

    needs_target: ClassVar[bool] = False
    decides: ClassVar[bool] = True

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Returns the same score for every document: zeros, float64, shape ``(len(texts),)``."""
        return np.zeros(len(texts))
