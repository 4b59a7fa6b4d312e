"""Compressed sizes C(s) under named compressors, each as its Python package gives them."""

from __future__ import annotations

import functools
import gzip
import importlib.metadata
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from modelwright.errors import UserError, did_you_mean, require

CompressorName = Literal["zlib", "gzip", "lz4", "zstd", "brotli", "lzma"]
NAMES: tuple[str, ...] = get_args(CompressorName)

#: Lowest and highest level. Negative LZ4 and zstd levels trade size for speed and are allowed.
_LEVELS = {"zlib": (1, 9), "gzip": (1, 9), "lz4": (-100, 16), "zstd": (-100, 22), "brotli": (0, 11), "lzma": (0, 9)}
_FASTEST = {"zlib": 1, "gzip": 1, "lz4": 0, "zstd": 1, "brotli": 0, "lzma": 0}


@dataclass(frozen=True)
class Compressor:
    """A compressor at a level.

    Attributes:
        name: One of :data:`NAMES`.
        level: Its level.
        size: Bytes of the compressed stream, header and trailer included: the C of the paper.
        empty: ``size(b"")``: what header and trailer cost.
        version: Version of the library that compresses; other builds may give other sizes.
    """

    name: str
    level: int
    size: Callable[[bytes], int]
    empty: int
    version: str


def check_level(name: str, level: int | Literal["fastest"] | None = None) -> int:
    """Returns the level to use; None and ``"fastest"`` stand for the lightest level that compresses.

    Raises:
        UserError: An unknown compressor, or a level it does not have or that does not compress.
    """
    if name not in NAMES:
        raise UserError(f"There is no compressor '{name}': {did_you_mean(name, NAMES)}")
    if level is None or level == "fastest":
        return _FASTEST[name]
    if isinstance(level, bool) or not isinstance(level, int):
        raise UserError(f"The compression level must be a whole number or 'fastest', not {level!r}.")
    if name in ("zlib", "gzip") and level == 0:
        raise UserError(
            f"Level 0 of {name} stores without compressing, so that scores would depend on lengths alone and the "
            f"shortest documents would win: use level 1, the fastest that compresses."
        )
    low, high = _LEVELS[name]
    if not low <= level <= high:
        raise UserError(f"{name} has no level {level}: give one from {low} to {high}.")
    return level


def make_compressor(name: str, level: int | Literal["fastest"] | None = None) -> Compressor:
    """Returns a compressor.

    Args:
        name: One of :data:`NAMES`. ``gzip`` is written with a zero time stamp; ``lz4`` is the frame format.
        level: Its level; None or ``"fastest"``: the lightest that compresses (1 for zlib, gzip and zstd, else 0).

    Raises:
        UserError: An unknown compressor or level, or a package that is not installed.
    """
    level = check_level(name, level)
    size, version = _MAKERS[name](level)
    return Compressor(name, level, size, size(b""), version)


def _zlib(level: int) -> tuple[Callable[[bytes], int], str]:
    return lambda data: len(zlib.compress(data, level)), zlib.ZLIB_RUNTIME_VERSION


def _gzip(level: int) -> tuple[Callable[[bytes], int], str]:
    return lambda data: len(gzip.compress(data, level, mtime=0)), zlib.ZLIB_RUNTIME_VERSION


def _lz4(level: int) -> tuple[Callable[[bytes], int], str]:
    frame: Any = require("lz4.frame", "compressors", "the compressor 'lz4'")
    compress = frame.compress
    return lambda data: len(compress(data, compression_level=level)), _version("lz4")


def _zstd(level: int) -> tuple[Callable[[bytes], int], str]:
    package = require("zstandard", "compressors", "the compressor 'zstd'")
    # A compressor is reused: its tables cost more than compressing a short text. The stream is the same.
    compress = package.ZstdCompressor(level=level).compress
    return lambda data: len(compress(data)), _version("zstandard")


def _brotli(level: int) -> tuple[Callable[[bytes], int], str]:
    compress = require("brotli", "compressors", "the compressor 'brotli'").compress
    return lambda data: len(compress(data, quality=level)), _version("brotli")


def _lzma(level: int) -> tuple[Callable[[bytes], int], str]:
    return lambda data: len(lzma.compress(data, preset=level)), "of Python's lzma"


@functools.cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)


_MAKERS: dict[str, Callable[[int], tuple[Callable[[bytes], int], str]]] = {
    "zlib": _zlib,
    "gzip": _gzip,
    "lz4": _lz4,
    "zstd": _zstd,
    "brotli": _brotli,
    "lzma": _lzma,
}
