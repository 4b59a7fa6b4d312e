"""Sizes of zlib streams of many concatenations, without writing the streams. Needs numba.

ZIP-FIT compresses every source x followed by every target t. zlib parses x again for each t, and writes out a stream
whose length alone is wanted. Here x is parsed once, up to the first place where what follows could matter, and every t
continues from there; only the length of the Huffman-coded block is computed.

The algorithm is zlib's ``deflate_fast`` (levels 1 to 3) and ``_tr_flush_block`` with its order of ties, for inputs
that fit one block and one window; the names are zlib's. It is not trusted: :mod:`.pair_sizes` compares it with zlib
itself on every source document, and tests compare every size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

#: (max_chain, max_insert, nice_length) by level: zlib's configuration_table.
LEVELS = {1: (4, 4, 8), 2: (8, 5, 16), 3: (32, 6, 32)}
#: Longest input: no match can then be farther than a window allows.
MAX_BYTES = 32768 - 262
#: A block ends when this many symbols are in it.
_MAX_SYMBOLS = 16383
_HEADER_AND_CHECKSUM = 6

_L_CODES, _D_CODES, _BL_CODES, _END_BLOCK = 286, 30, 19, 256
_HEAP_SIZE = 2 * _L_CODES + 1
_EMPTY = np.int64(1) << 62


def _tables() -> tuple[np.ndarray, ...]:
    extra_length = np.array([0] * 8 + [n for n in range(1, 6) for _ in range(4)] + [0], dtype=np.int64)
    extra_distance = np.array([0, 0] + [n for n in range(14) for _ in range(2)], dtype=np.int64)
    length_code = np.zeros(256, dtype=np.int64)
    length_code[:] = np.repeat(np.arange(28), 1 << extra_length[:28])
    length_code[255] = 28
    distance_code = np.zeros(512, dtype=np.int64)
    codes = np.repeat(np.arange(30), 1 << extra_distance)  # of distance - 1
    distance_code[:256] = codes[:256]
    distance_code[256:] = codes[:: 1 << 7][:256]
    extra_lit = np.zeros(_L_CODES, dtype=np.int64)
    extra_lit[257:] = extra_length
    static_lit = np.array([8] * 144 + [9] * 112 + [7] * 24 + [8] * 6, dtype=np.int64)
    extra_bl = np.array([0] * 16 + [2, 3, 7], dtype=np.int64)
    return length_code, distance_code, extra_lit, extra_distance, extra_bl, static_lit


_LENGTH_CODE, _DISTANCE_CODE, _EXTRA_LIT, _EXTRA_DISTANCE, _EXTRA_BL, _STATIC_LIT = _tables()
_STATIC_DISTANCE = np.full(_D_CODES, 5, dtype=np.int64)
_STATIC_BL = np.zeros(_BL_CODES, dtype=np.int64)
_BL_ORDER = np.array([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15], dtype=np.int64)


@njit(nogil=True, cache=True)
def _parse(
    data: Any, position: int, end: int, more_follows: bool, level: Any, head: Any, prev: Any, lit: Any, dist: Any,
    undo: Any, undone: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Continues ``deflate_fast`` and counts symbols; with ``more_follows``, stops where the end could matter.

    Returns:
        New position, number of undo entries (hash slot and old value), number of symbols.
    """
    max_chain, max_insert, nice_length = level
    symbols = 0
    p: Any = position
    while p < end:
        left = end - p
        best = 2
        where = 0
        slot = -1
        candidate: Any = 0
        if left >= 3:
            slot = ((data[p] << 10) ^ (data[p + 1] << 5) ^ data[p + 2]) & 32767
            candidate = np.int64(head[slot])
        elif more_follows:
            break
        first = candidate
        nice = nice_length
        if nice > left:
            if more_follows:
                break
            nice = left
        if candidate != 0:
            limit = min(258, left)
            chain = max_chain
            a, b = data[p], data[p + 1]
            while True:
                if (
                    data[candidate + best] == data[p + best]
                    and data[candidate + best - 1] == data[p + best - 1]
                    and data[candidate] == a
                    and data[candidate + 1] == b
                ):
                    length = 3
                    while length < limit and data[candidate + length] == data[p + length]:
                        length += 1
                    if length > best:
                        best = length
                        where = candidate
                        if length >= nice:
                            break
                candidate = np.int64(prev[candidate])
                chain -= 1
                if candidate == 0 or chain == 0:
                    break
        if more_follows and best >= 3 and left - best < 3:
            # The match might be longer, and zlib stores the places within it only if three bytes are left.
            break
        if slot >= 0:
            undo[undone, 0] = slot
            undo[undone, 1] = first
            undone += 1
            prev[p] = first
            head[slot] = p
        symbols += 1
        if best >= 3:
            lit[257 + _LENGTH_CODE[best - 3]] += 1
            d = p - where - 1
            dist[_DISTANCE_CODE[d] if d < 256 else _DISTANCE_CODE[256 + (d >> 7)]] += 1
            if best <= max_insert and left - best >= 3:
                for q in range(p + 1, p + best):
                    slot = ((data[q] << 10) ^ (data[q + 1] << 5) ^ data[q + 2]) & 32767
                    undo[undone, 0] = slot
                    undo[undone, 1] = head[slot]
                    undone += 1
                    prev[q] = head[slot]
                    head[slot] = q
            p += best
        else:
            lit[data[p]] += 1
            p += 1
    return p, undone, symbols


@njit(nogil=True, cache=True)
def _sift_down(heap: Any, k: int, size: int) -> None:
    """``pqdownheap``. An entry is frequency, depth and node packed in that order; the node does not take part."""
    value = heap[k]
    key = value >> 10
    j = k << 1
    while j <= size:
        # Beyond the last entry there is always an _EMPTY one, so no test for it. No branch: it would be a coin toss.
        j += (heap[j + 1] >> 10) <= (heap[j] >> 10)
        if key <= heap[j] >> 10:
            break
        heap[k] = heap[j]
        k = j
        j = k << 1
    heap[k] = value


@njit(nogil=True, cache=True)
def _build_tree(
    freq: Any, elements: int, max_length: int, extra: Any, static: Any, lengths: Any, heap: Any, order: Any, parent: Any
) -> tuple[int, int, int]:
    """``build_tree`` with ``gen_bitlen``.

    Args:
        freq: int64, counts of ``elements`` symbols, with room for the inner nodes.
        elements: Symbols of the alphabet.
        max_length: Longest code.
        extra: Extra bits of each symbol.
        static: Code lengths of the static tree.
        lengths: Receives the code lengths.
        heap: Scratch.
        order: Scratch.
        parent: Scratch.

    Returns:
        Largest symbol used, bits with this tree, bits with the static tree.
    """
    size = 0
    max_code = -1
    optimal = 0
    fixed = 0
    for n in range(elements):
        lengths[n] = 0
        if freq[n] != 0:
            size += 1
            heap[size] = (freq[n] << 18) | n
            max_code = n
    while size < 2:
        size += 1
        node = 0
        if max_code < 2:
            max_code += 1
            node = max_code
        freq[node] = 1
        heap[size] = (1 << 18) | node
        optimal -= 1
        fixed -= static[node]
    heap[size + 1] = _EMPTY
    for n in range(size // 2, 0, -1):
        _sift_down(heap, n, size)
    node = elements
    top = _HEAP_SIZE
    while True:
        least = heap[1]
        heap[1] = heap[size]
        heap[size] = _EMPTY
        size -= 1
        _sift_down(heap, 1, size)
        second = heap[1]
        n, m = least & 1023, second & 1023
        top -= 1
        order[top] = n
        top -= 1
        order[top] = m
        freq[node] = freq[n] + freq[m]
        depth = max((least >> 10) & 255, (second >> 10) & 255) + 1
        parent[n] = node
        parent[m] = node
        heap[1] = (freq[node] << 18) | (depth << 10) | node
        _sift_down(heap, 1, size)
        node += 1
        if size < 2:
            break
    root = heap[1] & 1023
    lengths[root] = 0
    overflow = 0
    # bl_count is kept for the rare tree that is too deep.
    for i in range(top, _HEAP_SIZE):
        n = order[i]
        bits = lengths[parent[n]] + 1
        if bits > max_length:
            bits = max_length
            overflow += 1
        lengths[n] = bits
        if n < elements:
            optimal += freq[n] * (bits + extra[n])
            fixed += freq[n] * (static[n] + extra[n])
    if overflow:
        optimal += _shorten(freq, elements, max_length, lengths, order, top, overflow)
    return max_code, optimal, fixed


@njit(nogil=True, cache=True)
def _shorten(freq: Any, elements: int, max_length: int, lengths: Any, order: Any, top: int, overflow: int) -> int:
    """The end of ``gen_bitlen``: moves leaves so that no code is too long; returns the bits that this costs."""
    count = np.zeros(max_length + 1, dtype=np.int64)
    for i in range(top, _HEAP_SIZE):
        if order[i] < elements:
            count[lengths[order[i]]] += 1
    while overflow > 0:
        bits = max_length - 1
        while count[bits] == 0:
            bits -= 1
        count[bits] -= 1
        count[bits + 1] += 2
        count[max_length] -= 1
        overflow -= 2
    cost = 0
    i = _HEAP_SIZE
    for bits in range(max_length, 0, -1):
        n = count[bits]
        while n != 0:
            i -= 1
            m = order[i]
            if m >= elements:
                continue
            cost += (bits - lengths[m]) * freq[m]
            lengths[m] = bits
            n -= 1
    return cost


@njit(nogil=True, cache=True)
def _count_code_lengths(lengths: Any, max_code: int, freq: Any) -> None:
    """``scan_tree``: counts the symbols of the run-length code for a tree's code lengths."""
    previous = -1
    following = lengths[0]
    count = 0
    most, least = (138, 3) if following == 0 else (7, 4)
    for n in range(max_code + 1):
        current = following
        following = lengths[n + 1] if n < max_code else -1
        count += 1
        if count < most and current == following:
            continue
        if count < least:
            freq[current] += count
        elif current != 0:
            if current != previous:
                freq[current] += 1
            freq[16] += 1
        elif count <= 10:
            freq[17] += 1
        else:
            freq[18] += 1
        count = 0
        previous = current
        if following == 0:
            most, least = 138, 3
        elif current == following:
            most, least = 6, 3
        else:
            most, least = 7, 4


@njit(nogil=True, cache=True)
def _block_bytes(
    total: int, lit: Any, dist: Any, bl: Any, lit_lengths: Any, dist_lengths: Any, bl_lengths: Any, heap: Any,
    order: Any, parent: Any,
) -> int:  # fmt: skip
    """``_tr_flush_block``: bytes of the only block, given the counts of its symbols (which are spoilt)."""
    lit_max, bits, fixed = _build_tree(lit, _L_CODES, 15, _EXTRA_LIT, _STATIC_LIT, lit_lengths, heap, order, parent)
    dist_max, more, more_fixed = _build_tree(
        dist, _D_CODES, 15, _EXTRA_DISTANCE, _STATIC_DISTANCE, dist_lengths, heap, order, parent
    )
    bits += more
    fixed += more_fixed
    bl[:_BL_CODES] = 0
    _count_code_lengths(lit_lengths, lit_max, bl)
    _count_code_lengths(dist_lengths, dist_max, bl)
    _, more, _ = _build_tree(bl, _BL_CODES, 7, _EXTRA_BL, _STATIC_BL, bl_lengths, heap, order, parent)
    last = _BL_CODES - 1
    while last >= 3 and bl_lengths[_BL_ORDER[last]] == 0:
        last -= 1
    bits += more + 3 * (last + 1) + 14
    best = min((bits + 10) >> 3, (fixed + 10) >> 3)
    return total + 5 if total + 4 <= best else best


@njit(nogil=True, cache=True)
def sizes(texts: Any, starts: Any, targets: Any, target_starts: Any, level: Any, out: Any) -> None:
    """Computes the sizes of zlib streams.

    Args:
        texts: uint8, the sources one after the other.
        starts: int64, shape ``(n + 1,)``: where each source starts, and the end of the last.
        targets: uint8, the targets one after the other.
        target_starts: int64, shape ``(m + 1,)``.
        level: Triple of :data:`LEVELS`.
        out: int32, shape ``(n, m + 1)``: receives C(x) and C(x t) in bytes, or -1 where the input is too long for
            this function.
    """
    n, m = len(starts) - 1, len(target_starts) - 1
    data = np.zeros(MAX_BYTES + 300, dtype=np.uint8)
    head = np.zeros(32768, dtype=np.uint16)
    prev = np.zeros(MAX_BYTES, dtype=np.uint16)
    undo = np.zeros((MAX_BYTES, 2), dtype=np.uint16)
    lit_x = np.zeros(_L_CODES, dtype=np.int64)
    dist_x = np.zeros(_D_CODES, dtype=np.int64)
    lit, dist, bl = np.zeros(_HEAP_SIZE, np.int64), np.zeros(_HEAP_SIZE, np.int64), np.zeros(_HEAP_SIZE, np.int64)
    lit_lengths, dist_lengths, bl_lengths = np.zeros_like(lit), np.zeros_like(lit), np.zeros_like(lit)
    heap, order, parent = np.zeros(_HEAP_SIZE + 2, np.int64), np.zeros_like(lit), np.zeros_like(lit)
    for i in range(n):
        length = starts[i + 1] - starts[i]
        if length > MAX_BYTES:
            out[i] = -1
            continue
        data[:length] = texts[starts[i] : starts[i + 1]]
        lit_x[:] = 0
        lit_x[_END_BLOCK] = 1
        dist_x[:] = 0
        shared, shared_undo, shared_symbols = _parse(data, 0, length, True, level, head, prev, lit_x, dist_x, undo, 0)
        for j in range(-1, m):
            total = length
            if j >= 0:
                extra = target_starts[j + 1] - target_starts[j]
                total += extra
                if total > MAX_BYTES:
                    out[i, j + 1] = -1
                    continue
                data[length:total] = targets[target_starts[j] : target_starts[j + 1]]
            lit[:_L_CODES] = lit_x
            dist[:_D_CODES] = dist_x
            _, undone, symbols = _parse(data, shared, total, False, level, head, prev, lit, dist, undo, shared_undo)
            for k in range(undone - 1, shared_undo - 1, -1):
                head[undo[k, 0]] = undo[k, 1]
            if shared_symbols + symbols >= _MAX_SYMBOLS:
                out[i, j + 1] = -1
                continue
            out[i, j + 1] = _HEADER_AND_CHECKSUM + _block_bytes(
                total, lit, dist, bl, lit_lengths, dist_lengths, bl_lengths, heap, order, parent
            )
        for k in range(shared_undo):
            head[undo[k, 0]] = 0
