"""How often windows of tokens stand in a corpus, exactly, in memory that does not grow with the corpus.

The windows that are asked for go into a table of hashes. The corpus is read once, block by block: the hash of the
window at every position (a polynomial in the tokens, modulo 2^64) is looked up, and what is found is compared token
by token, so that a collision of hashes costs time but never a wrong count. Blocks are shared among processes.

Source: section 3 of the paper (exact duplicates of the 32 tokens of the continuation).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelwright.errors import UserError, require
from modelwright.processes import in_processes

Engine = Literal["auto", "compiled", "numpy"]
#: Multiplier of the polynomial: odd, and far from small powers.
BASE = 0x9E3779B97F4A7C55
#: Spreads hashes over the table by their upper bits.
_MIX = 0x9E3779B97F4A7C15
#: Tokens of a block; memory is some 30 bytes a token with numpy, and 4 compiled.
BLOCK = 1 << 22
#: Candidates that are compared at once.
_COMPARED = 1 << 15


@dataclass(frozen=True)
class _Stored:
    """Tokens in a file, read block by block: pages that were mapped would stay in memory."""

    path: Path
    dtype: str
    offset: int
    size: int

    def block(self, start: int, end: int) -> np.ndarray:
        at = self.offset + start * np.dtype(self.dtype).itemsize
        return np.fromfile(self.path, dtype=self.dtype, count=end - start, offset=at)


@dataclass(frozen=True)
class _Held:
    tokens: np.ndarray

    @property
    def size(self) -> int:
        return len(self.tokens)

    def block(self, start: int, end: int) -> np.ndarray:
        return np.asarray(self.tokens[start:end])


@dataclass(frozen=True)
class _Queries:
    """Different windows, ordered by hash. ``hashes`` (n,) uint64, ``windows`` (n, length)."""

    hashes: np.ndarray
    windows: np.ndarray
    modulus: int


def count_duplicates(
    corpus_tokens: Any,
    windows: Any,
    *,
    document_boundaries: Any = None,
    workers: int = 1,
    engine: Engine = "auto",
    block: int = BLOCK,
    modulus: int = 0,
) -> np.ndarray:
    """Counts how often each window stands in the corpus; occurrences may overlap.

    Args:
        corpus_tokens: (n,) whole numbers; a ``numpy.memmap`` is read from its file in blocks, and never held.
        windows: (queries, length) whole numbers; equal ones may be among them.
        document_boundaries: Sorted positions at which documents begin: occurrences that reach over one do not count.
            None takes all tokens as one document.
        workers: Processes that share the blocks.
        engine: ``compiled`` needs numba; ``auto`` takes it for large corpora, if it is there.
        block: Tokens read at once, by each process.
        modulus: Hashes modulo this, to try collisions; 0 is 2^64.

    Returns:
        (queries,) int64. A unique sequence of the corpus has 1.

    Raises:
        UserError: The windows are no table of whole numbers, or numba is asked for and not there.
    """
    queries = np.asarray(windows)
    if queries.ndim != 2 or not np.issubdtype(queries.dtype, np.integer) or (queries.size and queries.min() < 0):
        raise UserError(f"Windows must be a table of token ids (n, length), not of shape {queries.shape}.")
    if workers < 1 or block < 1:
        raise UserError("workers and block must be at least 1.")
    source = _source(corpus_tokens)
    if not len(queries) or not queries.shape[1]:
        return np.zeros(len(queries), dtype=np.int64)
    if queries.max() >= 1 << 32:
        raise UserError("Token ids must be below 2^32.")
    table, inverse = _distinct(queries.astype(np.uint32), modulus)
    limits = None if document_boundaries is None else np.asarray(document_boundaries)
    compiled = _compiled(engine, source.size)
    length = queries.shape[1]
    calls = []
    for start in range(0, max(0, source.size - length + 1), block):
        end = min(source.size, start + block + length - 1)
        near = None
        if limits is not None:
            inside = slice(np.searchsorted(limits, start, "right"), np.searchsorted(limits, end, "left"))
            near = np.asarray(limits[inside]) - start
        calls.append((source, start, end, near))
    found = np.zeros(len(table.hashes), dtype=np.int64)
    for part in _each(table, calls, workers, compiled):
        found += part
    return found[inverse]


def token_frequencies(corpus_tokens: Any, vocab_size: int, *, block: int = BLOCK) -> np.ndarray:
    """Returns (vocab_size,) int64: how often each token stands in the corpus, read block by block.

    Raises:
        UserError: The corpus has a token outside the vocabulary.
    """
    source = _source(corpus_tokens)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, source.size, block):
        tokens = source.block(start, min(source.size, start + block))
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise UserError(
                f"The corpus has token {tokens.max()}, but the vocabulary has {vocab_size}: it was made by another "
                f"tokenizer."
            )
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def window_hashes(tokens: np.ndarray, length: int, modulus: int = 0) -> np.ndarray:
    """Returns (n - length + 1,) uint64, the hash of the window at each position.

    That is ``sum_j (token_j + 1) * BASE^(length - 1 - j)`` modulo 2^64, made by doubling: the hash of 2m tokens is
    that of the first m, times BASE^m, plus that of the last m.

    Args:
        tokens: (n,) whole numbers from 0 to 2^32 - 1.
        length: Tokens of a window.
        modulus: The result modulo this; 0 is 2^64.
    """
    count = len(tokens) - length + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    power = tokens.astype(np.uint64)
    power += np.uint64(1)
    result, covered, size = power[:0], 0, 1
    while True:
        if length & size:
            # Windows of `covered` tokens at each start, and behind them one of `size` more.
            if not covered:
                result = power.copy()
            else:
                kept = len(power) - covered
                result = result[:kept] * np.uint64(pow(BASE, size, 1 << 64)) + power[covered:]
            covered += size
        if covered == length:
            break
        power = power[:-size] * np.uint64(pow(BASE, size, 1 << 64)) + power[size:]
        size *= 2
    result = result[:count]
    return result % np.uint64(modulus) if modulus else result


def _distinct(windows: np.ndarray, modulus: int) -> tuple[_Queries, np.ndarray]:
    """Returns the different windows, and for each window which of them it is."""
    count, length = windows.shape
    hashes = np.concatenate(
        [
            window_hashes(part.reshape(-1), length, modulus)[::length]
            for part in np.array_split(windows, count // 65536 + 1)
        ]
    )
    order = np.argsort(hashes, kind="stable")
    hashes, windows = hashes[order], windows[order]
    same_hash = hashes[1:] == hashes[:-1]
    same = np.zeros(count - 1, dtype=bool)
    same[same_hash] = (windows[1:][same_hash] == windows[:-1][same_hash]).all(1)
    if not np.array_equal(same, same_hash):
        # Different windows of one hash: equal ones need not be neighbours, so the windows themselves are sorted.
        by_window = np.lexsort([*windows.T[::-1], hashes])
        order, hashes, windows = order[by_window], hashes[by_window], windows[by_window]
        same = (windows[1:] == windows[:-1]).all(1)
    first = np.concatenate([[True], ~same])
    inverse = np.empty(count, dtype=np.int64)
    inverse[order] = np.cumsum(first) - 1
    return _Queries(hashes[first], windows[first], modulus), inverse


def _source(tokens: Any) -> _Stored | _Held:
    # A slice of a mapped file keeps the offset of the whole, so it is taken as an array.
    mapped = isinstance(tokens, np.memmap) and not isinstance(tokens.base, np.memmap)
    if mapped and tokens.ndim == 1 and tokens.filename:
        return _Stored(Path(str(tokens.filename)), tokens.dtype.name, int(tokens.offset), tokens.size)
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"The corpus must be a row of token ids, not {array.dtype} of shape {array.shape}.")
    return _Held(array)


def _compiled(engine: Engine, tokens: int) -> bool:
    if engine not in ("auto", "compiled", "numpy"):
        raise UserError(f"The engine is '{engine}': use auto, compiled or numpy.")
    if engine == "compiled":
        require("numba", "speed", "the engine 'compiled'")
        return True
    # Compiling takes seconds, which a small corpus does not.
    large = tokens > 1 << 24 or "numba" in sys.modules
    return engine == "auto" and large and importlib.util.find_spec("numba") is not None


def _each(table: _Queries, calls: list[Any], workers: int, compiled: bool) -> Iterator[np.ndarray]:
    if workers == 1 or len(calls) < 2:
        look = _lookup(table, compiled)
        yield from (_count(table, look, *call) for call in calls)
        return
    # A share of blocks for each process, so that its table is made once; large arrays reach it as mapped files.
    shares = [calls[i::workers] for i in range(workers) if calls[i::workers]]
    calls_of_shares = ((table, share, compiled) for share in shares)
    yield from in_processes(_share, calls_of_shares, len(shares), in_order=False)


def _share(table: _Queries, calls: list[Any], compiled: bool) -> np.ndarray:
    look = _lookup(table, compiled)
    total = np.zeros(len(table.hashes), dtype=np.int64)
    for call in calls:
        total += _count(table, look, *call)
    return total


def _count(table: _Queries, look: Any, source: Any, start: int, end: int, limits: np.ndarray | None) -> np.ndarray:
    tokens = source.block(start, end)
    if tokens.dtype not in (np.uint16, np.uint32):
        if tokens.size and tokens.min() < 0:
            raise UserError("The corpus has a negative token id.")
        tokens = tokens.astype(np.uint32)
    length = table.windows.shape[1]
    counts = np.zeros(len(table.hashes), dtype=np.int64)
    places, hashes = look(tokens)
    if limits is not None and len(limits):
        whole = np.searchsorted(limits, places, "right") == np.searchsorted(limits, places + length - 1, "right")
        places, hashes = places[whole], hashes[whole]
    for begin in range(0, len(places), _COMPARED):
        _compare(table, tokens, places[begin : begin + _COMPARED], hashes[begin : begin + _COMPARED], counts)
    return counts


def _compare(table: _Queries, tokens: np.ndarray, places: np.ndarray, hashes: np.ndarray, counts: np.ndarray) -> None:
    """Adds to ``counts`` where window and query are the same, token by token."""
    low = np.searchsorted(table.hashes, hashes, "left")
    high = np.searchsorted(table.hashes, hashes, "right")
    seen = tokens[places[:, None] + np.arange(table.windows.shape[1])]
    waiting = np.arange(len(places))
    while len(waiting):
        # One candidate query of each at a time: nearly always there is only one.
        equal = (seen[waiting] == table.windows[low[waiting]]).all(1)
        np.add.at(counts, low[waiting[equal]], 1)
        waiting = waiting[~equal]
        low[waiting] += 1
        waiting = waiting[low[waiting] < high[waiting]]


def _lookup(table: _Queries, compiled: bool) -> Any:
    """Returns a function from a block's tokens to places and hashes of windows whose hash is a query's."""
    different = np.unique(table.hashes)
    bits = max(10, len(different).bit_length() + 2)
    length = table.windows.shape[1]
    homes = ((different * np.uint64(_MIX)) >> np.uint64(64 - bits)).astype(np.int64)
    if not compiled:
        # A hash can be a query's only if its upper bits are: this spares most searches.
        bits = min(28, bits + 3)
        homes = ((different * np.uint64(_MIX)) >> np.uint64(64 - bits)).astype(np.int64)
        marked = np.zeros(1 << bits, dtype=bool)
        marked[homes] = True

        def with_numpy(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            hashes = window_hashes(tokens, length, table.modulus)
            likely = np.flatnonzero(marked[(hashes * np.uint64(_MIX)) >> np.uint64(64 - bits)])
            chosen = hashes[likely]
            at = np.minimum(np.searchsorted(different, chosen), len(different) - 1)
            there = different[at] == chosen
            return likely[there], chosen[there]

        return with_numpy
    from modelwright.probing.memorization.counting_kernel import candidates

    slots = np.zeros(1 << bits, dtype=np.uint64)
    filled = np.zeros(1 << bits, dtype=bool)
    marks = np.zeros(1 << bits, dtype=np.uint8)
    fine = (different * np.uint64(_MIX)) >> np.uint64(61 - bits)
    np.bitwise_or.at(
        marks, (fine >> np.uint64(3)).astype(np.int64), np.uint8(1) << (fine & np.uint64(7)).astype(np.uint8)
    )
    mask = (1 << bits) - 1
    for key, home in zip(different, homes.tolist()):
        while filled[home]:
            home = (home + 1) & mask
        slots[home], filled[home] = key, True

    def with_numba(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        base, modulus = np.uint64(BASE), np.uint64(table.modulus)
        return candidates(tokens, length, base, modulus, slots, 64 - bits, filled, marks)

    return with_numba
