"""ZIP-FIT's score as the paper defines it: short, slow, and the specification of everything else here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from modelwright.curation.zip_fit.compressors import make_compressor
from modelwright.errors import UserError

#: A compressor by name, or a function from bytes to a size.
AnyCompressor = str | Callable[[bytes], int]


def as_bytes(text: str | bytes) -> bytes:
    """Encodes as UTF-8; lone surrogates, which UTF-8 has no place for, become three bytes each ("surrogatepass")."""
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def ncd_of_sizes(source: np.ndarray | int, target: np.ndarray | int, both: np.ndarray | int) -> np.ndarray:
    """Normalized compression distance from compressed sizes (paper, Section 3; broadcasts).

    Args:
        source: C(x), bytes.
        target: C(x'), bytes.
        both: C(x x'), bytes.

    Returns:
        float64, (C(x x') - min(C(x), C(x'))) / max(C(x), C(x')).
    """
    return (np.asarray(both) - np.minimum(source, target)) / np.maximum(source, target)


def ncd(
    a: bytes | str,
    b: bytes | str,
    compressor: AnyCompressor = "zlib",
    level: int | Literal["fastest"] | None = None,
) -> float:
    """Normalized compression distance of two texts: about 0 for equal ones, about 1 for unrelated ones.

    It is not quite symmetric (C(ab) is not C(ba)), can exceed 1 by a few percent, and ``ncd(x, x)`` is above 0; beyond
    the compressor's window (32 KiB for zlib) it is about 1 even for equal texts.

    Args:
        a: First text; ZIP-FIT puts the source here.
        b: Second text; ZIP-FIT puts the target here.
        compressor: Name, or a function from bytes to a size.
        level: Level; None or ``"fastest"``: the lightest that compresses.

    Raises:
        UserError: An unknown compressor or level, or two empty texts under a compressor without a header.
    """
    size = make_compressor(compressor, level).size if isinstance(compressor, str) else compressor
    a, b = as_bytes(a), as_bytes(b)
    sizes = size(a), size(b)
    if max(sizes) <= 0:
        raise UserError(
            "The distance of two texts that compress to nothing is not defined: give texts that are not empty."
        )
    return float(ncd_of_sizes(*sizes, size(a + b)))


def alignment(
    source: bytes | str,
    targets: Sequence[bytes | str],
    compressor: AnyCompressor = "zlib",
    level: int | Literal["fastest"] | None = None,
) -> float:
    """ZIP-FIT's score of a source document: 1 - the mean NCD to the targets, source first (paper, Algorithm 1).

    Raises:
        UserError: No targets, an empty source or target, an unknown compressor or level.
    """
    if not targets or not source or not all(targets):
        raise UserError("Alignment needs a source and at least one target, none of them empty.")
    size = make_compressor(compressor, level).size if isinstance(compressor, str) else compressor
    return 1.0 - float(np.mean([ncd(source, target, size) for target in targets]))
