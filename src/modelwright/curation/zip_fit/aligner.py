"""ZIP-FIT's alignment of many documents with a set of targets."""

from __future__ import annotations

import itertools
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from modelwright.curation.zip_fit.compressors import make_compressor
from modelwright.curation.zip_fit.ncd import as_bytes, ncd_of_sizes
from modelwright.curation.zip_fit.pair_sizes import Engine, PairSizes, sizes_in_process
from modelwright.errors import UserError
from modelwright.processes import in_processes

_BLOCK_DOCUMENTS = 128
_BLOCK_BYTES = 1 << 20
_WINDOW = 32768


class CompressionAligner:
    """Scores documents by how well they compress together with target examples (paper, Section 3).

    ``alignment(x) = 1 - mean_j NCD(x, t_j)``, with the source x first and nothing between. Scores equal those of
    :func:`~modelwright.curation.zip_fit.ncd.alignment` exactly, whatever the engine and the number of workers.

    Args:
        targets: Target examples, none empty. Lone surrogates are encoded with "surrogatepass".
        compressor: ``zlib``, ``gzip``, ``lz4``, ``zstd``, ``brotli`` or ``lzma``.
        level: Level; None or ``"fastest"``: the lightest that compresses (1 for zlib, gzip and zstd, else 0).
        max_bytes: Only this many bytes from the beginning of every source and target are used.
        chunk_bytes: Sources longer than this are cut into the fewest parts of at most this many bytes, equal in length
            to within a byte, and the score is the mean over the parts. Against the bias for short documents, and for
            documents longer than the compressor's window (32 KiB for zlib).
        subtract_header: Take the size of an empty stream off every size, so that a constant number of header bytes
            does not weigh more in short documents.
        target_sample: Use a random sample of this many targets.
        seed: Seed of the sample.
        approximate: ``"dictionary"``: not ZIP-FIT's score but an approximation with one compression per source instead
            of one per pair: ``1 - C(x | d) / C(x)``, where d is a preset dictionary with an equal share of every target
            in 32 KiB. zlib only.
        engine: See :class:`~modelwright.curation.zip_fit.pair_sizes.PairSizes`. Never changes a score.

    Raises:
        UserError: No targets, an empty one, or an option out of range.
    """

    def __init__(
        self,
        targets: Sequence[str | bytes],
        compressor: str = "zlib",
        level: int | Literal["fastest"] | None = None,
        *,
        max_bytes: int | None = None,
        chunk_bytes: int | None = None,
        subtract_header: bool = False,
        target_sample: int | None = None,
        seed: int = 0,
        approximate: Literal["dictionary"] | None = None,
        engine: Engine = "auto",
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("chunk_bytes", chunk_bytes), ("target_sample", target_sample)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")
        if approximate not in (None, "dictionary"):
            raise UserError(
                f"There is no approximation {approximate!r}: use 'dictionary', or None for the exact score."
            )
        if approximate and compressor != "zlib":
            raise UserError(f"The dictionary approximation needs the compressor 'zlib', not '{compressor}'.")
        self.compressor = make_compressor(compressor, level)
        self.max_bytes, self.chunk_bytes, self.approximate = max_bytes, chunk_bytes, approximate
        encoded = self._encode(targets, "target")
        if not encoded:
            raise UserError("There are no targets: give at least one example of what is wanted.")
        if b"" in encoded:
            raise UserError(
                f"Target {encoded.index(b'')} is empty: remove it, since nothing aligns with an empty text."
            )
        if target_sample is not None and target_sample < len(encoded):
            chosen = np.random.default_rng(seed).choice(len(encoded), target_sample, replace=False)
            encoded = [encoded[i] for i in sorted(chosen)]
        self.targets = encoded
        self.header = self.compressor.empty if subtract_header else 0
        self._sizes = PairSizes(self.compressor, encoded, engine)
        self._target_sizes = np.array([self.compressor.size(target) for target in encoded])
        share = max(1, _WINDOW // len(encoded))
        self._dictionary = b"".join(target[:share] for target in encoded)[-_WINDOW:]

    def score(self, texts: Sequence[str | bytes], num_proc: int = 1) -> np.ndarray:
        """Returns the alignment of each text.

        Args:
            texts: Documents.
            num_proc: Processes to use (threads, where the compiled kernel runs).

        Returns:
            float64, shape ``(len(texts),)``; usually within [0, 1], but not strictly. NaN for empty texts, which a
            warning counts.

        Raises:
            UserError: A document is not text, with its row.
        """
        encoded = self._encode(texts, "row")
        empty = sum(not text for text in encoded)
        if empty:
            warnings.warn(f"{empty:,} of {len(encoded):,} texts are empty and get no score (NaN).", stacklevel=2)
        if self.approximate:
            return np.array([self._dictionary_score(text) if text else math.nan for text in encoded], dtype=np.float64)
        parts = [self._parts(text) for text in encoded]
        flat = [part for of_text in parts for part in of_text]
        blocks = list(_blocks(flat))
        scores = np.empty(len(flat))
        done = 0
        for table in self._tables(blocks, num_proc):
            scores[done : done + len(table)] = self._alignment(table)
            done += len(table)
        out = np.full(len(encoded), math.nan)
        position = 0
        for i, of_text in enumerate(parts):
            if of_text:
                out[i] = scores[position : position + len(of_text)].mean() if len(of_text) > 1 else scores[position]
                position += len(of_text)
        return out

    def _encode(self, texts: Sequence[str | bytes], what: str) -> list[bytes]:
        if isinstance(texts, str | bytes):
            raise UserError(f"A list of texts is needed, not a single {type(texts).__name__}.")
        for i, text in enumerate(texts):
            if not isinstance(text, str | bytes):
                raise UserError(f"{what.capitalize()} {i} is not text but {type(text).__name__}: convert or drop it.")
        return [as_bytes(text)[: self.max_bytes] for text in texts]

    def _parts(self, text: bytes) -> list[bytes]:
        if not text:
            return []
        if self.chunk_bytes is None or len(text) <= self.chunk_bytes:
            return [text]
        count = -(-len(text) // self.chunk_bytes)
        edges = [len(text) * i // count for i in range(count + 1)]
        return [text[a:b] for a, b in itertools.pairwise(edges)]

    def _tables(self, blocks: list[list[bytes]], num_proc: int) -> Iterator[np.ndarray]:
        compiled = self._sizes.plan(sum(len(block) for block in blocks))
        workers = min(num_proc, len(blocks))
        if not compiled and workers > 1:
            name, level = self.compressor.name, self.compressor.level
            calls = ((name, level, self.targets, block) for block in blocks)
            yield from in_processes(sizes_in_process, calls, workers)
        elif workers > 1:
            # The kernel lets go of the GIL, so that threads run side by side and nothing has to be sent.
            import joblib

            pool = joblib.Parallel(n_jobs=workers, backend="threading", return_as="generator")
            yield from pool(joblib.delayed(self._sizes)(block) for block in blocks)
        else:
            yield from map(self._sizes, blocks)

    def _alignment(self, table: np.ndarray) -> np.ndarray:
        sizes = table - self.header
        distances = ncd_of_sizes(sizes[:, :1], self._target_sizes - self.header, sizes[:, 1:])
        return 1.0 - distances.mean(axis=1)

    def _dictionary_score(self, text: bytes) -> float:
        stream = self._primed.copy()
        size = len(stream.compress(text)) + len(stream.flush())
        # A stream with a dictionary has its checksum (4 bytes) in the header.
        return 1.0 - (size - 4 - self.header) / (self.compressor.size(text) - self.header)

    @property
    def _primed(self) -> Any:
        if "_base" not in self.__dict__:
            self._base = zlib.compressobj(self.compressor.level, zdict=self._dictionary)
        return self._base


def _blocks(texts: list[bytes]) -> Iterator[list[bytes]]:
    block: list[bytes] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if len(block) == _BLOCK_DOCUMENTS or size >= _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def dataset_alignment(
    sources: Sequence[str | bytes],
    targets: Sequence[str | bytes],
    compressor: str = "zlib",
    level: int | Literal["fastest"] | None = None,
    num_proc: int = 1,
) -> float:
    """Alignment of two sets of texts: the mean over all pairs (paper, the study of alignment against cross-entropy).

    Args:
        sources: Source documents; empty ones are left out.
        targets: Target examples.
        compressor: Compressor.
        level: Its level.
        num_proc: Processes to use.

    Raises:
        UserError: As in :class:`CompressionAligner`, or all sources are empty.
    """
    scores = CompressionAligner(targets, compressor, level).score([text for text in sources if text], num_proc)
    if len(scores) == 0:
        raise UserError("There are no source documents that are not empty.")
    return float(scores.mean())
