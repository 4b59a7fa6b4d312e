"""C(x) and C(x t) for sources x and all targets t: by the library, or by a compiled kernel with equal results."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from modelwright.curation.zip_fit.compressors import Compressor, make_compressor
from modelwright.errors import UserError, require

Engine = Literal["auto", "library", "compiled"]

#: Sources from which copying zlib's state after x (268 KB) is cheaper than compressing x again for every target.
_COPY_FROM_BYTES = 4096
#: Pairs from which compiling the kernel (once per machine) or loading it (every time) is worth it.
_KERNEL_FROM_PAIRS = 200_000


class PairSizes:
    """Compressed sizes of sources and of every source with every target behind it.

    Args:
        compressor: Compressor.
        targets: Targets.
        engine: ``library``: the compression library; ``compiled``: our own kernel, which parses each source once and
            counts bytes instead of writing them (zlib and gzip at levels 1 to 3, LZ4 at levels up to 1; needs numba;
            the library where an input is too long for it); ``auto``: whichever is faster for the amount of work.

    Raises:
        UserError: ``compiled`` is asked for and is not possible.
    """

    def __init__(self, compressor: Compressor, targets: Sequence[bytes], engine: Engine = "auto") -> None:
        self.compressor, self.targets, self.engine = compressor, list(targets), engine
        self._pairs_seen = 0
        self._kernel: Any = None
        if engine == "compiled":
            if not self._kernel_fits():
                raise UserError(
                    f"There is no compiled kernel for {compressor.name} {compressor.version} at level "
                    f"{compressor.level}: use engine 'library'."
                )
            require("numba", "speed", "the engine 'compiled'")
            self._load_kernel()

    def plan(self, sources: int) -> bool:
        """Says whether the next ``sources`` sources go to the kernel (then threads serve better than processes)."""
        self._pairs_seen += sources * len(self.targets)
        if (
            self.engine == "auto"
            and self._kernel is None
            and (self._pairs_seen >= _KERNEL_FROM_PAIRS or sys.modules.get("numba"))
            and self._kernel_fits()
            and importlib.util.find_spec("numba")
        ):
            try:
                self._load_kernel()
            except (ImportError, RuntimeError, OSError):
                # numba does not fit this Python or numpy, or finds no folder for what it compiles.
                self._kernel = False
        return bool(self._kernel)

    def __call__(self, sources: Sequence[bytes]) -> np.ndarray:
        """Returns sizes in bytes.

        Args:
            sources: Sources.

        Returns:
            int64, shape ``(len(sources), 1 + len(targets))``: C(x), then C(x t) for every target t.
        """
        if not self._kernel:
            return library_sizes(self.compressor, self.targets, sources)
        table = self._kernel(sources)
        own = np.array([self.compressor.size(x) for x in sources])
        known = table[:, 0] >= 0
        if not np.array_equal(table[known, 0], own[known]):
            # Another build of the library than the kernel was written after: never give its scores another meaning.
            warnings.warn(
                f"This build of {self.compressor.name} ({self.compressor.version}) compresses differently from the "
                f"compiled kernel: the library is used instead, which is slower.",
                RuntimeWarning,
                stacklevel=2,
            )
            self._kernel = False
            return library_sizes(self.compressor, self.targets, sources)
        for i in np.flatnonzero((table < 0).any(axis=1)).tolist():
            table[i] = library_sizes(self.compressor, self.targets, [sources[i]])[0]
        return table

    def _kernel_fits(self) -> bool:
        name, level = self.compressor.name, self.compressor.level
        if name in ("zlib", "gzip"):
            # zlib-ng and other forks name themselves in the version and compress differently.
            return level <= 3 and re.fullmatch(r"1\.[23][\d.]*", zlib.ZLIB_RUNTIME_VERSION) is not None
        return name == "lz4" and level <= 1

    def _load_kernel(self) -> None:
        name, level = self.compressor.name, self.compressor.level
        module = "lz4_kernel" if name == "lz4" else "deflate_kernel"
        kernel = importlib.import_module(f"modelwright.curation.zip_fit.{module}")
        parameter = max(1, 1 - level) if name == "lz4" else kernel.LEVELS[level]
        # A gzip stream is a zlib stream with 12 bytes more of header and trailer.
        added = 12 if name == "gzip" else 0
        targets = _flat(self.targets)

        def run(sources: Sequence[bytes]) -> np.ndarray:
            out = np.empty((len(sources), 1 + len(self.targets)), dtype=np.int32)
            kernel.sizes(*_flat(sources), *targets, parameter, out)
            return np.where(out < 0, -1, out.astype(np.int64) + added)

        self._kernel = run


def _flat(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=starts[1:])
    return np.frombuffer(b"".join(texts), dtype=np.uint8), starts


def library_sizes(compressor: Compressor, targets: Sequence[bytes], sources: Sequence[bytes]) -> np.ndarray:
    """Returns the same as :class:`PairSizes` by the compression library."""
    table = np.empty((len(sources), 1 + len(targets)), dtype=np.int64)
    for row, source in zip(table, sources):
        row[0] = compressor.size(source)
        if compressor.name in ("zlib", "gzip") and len(source) >= _COPY_FROM_BYTES:
            row[1:] = _continued(compressor, source, targets)
        else:
            row[1:] = [compressor.size(source + target) for target in targets]
    return table


def _continued(compressor: Compressor, source: bytes, targets: Sequence[bytes]) -> list[int]:
    """Feeds a long source once and continues with each target from a copy of the state: the same stream."""
    start = zlib.compressobj(compressor.level)
    done = len(start.compress(source)) + (12 if compressor.name == "gzip" else 0)
    found = []
    for target in targets:
        stream = start.copy()
        found.append(done + len(stream.compress(target)) + len(stream.flush()))
    return found


def sizes_in_process(name: str, level: int, targets: Sequence[bytes], sources: Sequence[bytes]) -> np.ndarray:
    """:func:`library_sizes` for a worker process, which is sent nothing but plain values."""
    return library_sizes(make_compressor(name, level), targets, sources)
