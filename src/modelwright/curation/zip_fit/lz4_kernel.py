"""Sizes of LZ4 frames of many concatenations, without writing the frames. Needs numba.

Every source x is parsed once, up to the first place where what follows could matter, and every target continues from
there. The algorithm is that of ``LZ4_compress_fast`` for inputs up to 64 KiB, which is what a frame of one block holds
at levels up to 1. It is not trusted: :mod:`.pair_sizes` compares it with the library on every source document, and
tests compare every size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

#: Longest input: a frame then has one block, and hash entries of 16 bits.
MAX_BYTES = 65536
#: Frame header with the content's size (15), the block's size (4) and the end mark (4).
_FRAME = 23
#: A parse that reads no byte nearer than this to the end does not depend on where the end is.
_END = 16


@njit(nogil=True, cache=True, inline="always")
def _four(data: Any, i: int) -> Any:
    return (
        np.uint32(data[i])
        | (np.uint32(data[i + 1]) << np.uint32(8))
        | (np.uint32(data[i + 2]) << np.uint32(16))
        | (np.uint32(data[i + 3]) << np.uint32(24))
    )


@njit(nogil=True, cache=True, inline="always")
def _hash(sequence: Any) -> Any:
    return np.int64(np.uint32(sequence * np.uint32(2654435761)) >> np.uint32(19))


@njit(nogil=True, cache=True)
def _fours(data: Any, out: Any) -> None:
    """Sets ``out[i]`` to the four bytes from ``i`` on."""
    for i in range(len(data) - 3):
        out[i] = _four(data, i)


@njit(nogil=True, cache=True)
def _parse(data: Any, four: Any, end: int, skip: int, table: Any, state: Any, undo: Any) -> int:
    """Continues the parse from ``state``; with ``undo``, stops before anything that the end could change.

    Args:
        data: uint8, the input.
        four: uint32, the four bytes from each position on.
        end: Length of the input.
        skip: First value of the counter that lengthens the steps where nothing matches.
        table: uint16, position by hash.
        state: int64 of 5: position to look at, step, counter, start of the pending literals, bytes written.
        undo: None; or, if more bytes follow that are not known yet: uint32, receives hash and old position of the
            changes, packed, to step back.

    Returns:
        Bytes of the block if it is finished, else 0.
    """
    position, step, counter, anchor, written = state[0], state[1], state[2], state[3], state[4]
    undone = 0
    last_match = end - 12 + 1
    match_limit = end - 5
    stop = end
    if undo is not None:
        stop = end - _END
    if end >= 13 and position == 0 and stop >= 8:
        # The first position is stored and not looked at.
        slot = _hash(four[0])
        if undo is not None:
            undo[undone] = (slot << 16) | table[slot]
            undone += 1
        table[slot] = 0
        position, step, counter = 1, 1, skip
    while position > 0:
        # Each turn is one probe of the hash table, and what is found there.
        undone = 0
        following = position + step
        if following > last_match:
            break
        if undo is not None and following + 8 > stop:
            break
        sequence = four[position]
        slot = _hash(sequence)
        match = np.int64(table[slot])
        if undo is not None:
            undo[undone] = (slot << 16) | match
            undone += 1
        table[slot] = position
        if four[match] != sequence:
            step = counter >> 6
            counter += 1
            position = following
            continue
        start = position
        while start > anchor and match > 0 and data[start - 1] == data[match - 1]:
            start -= 1
            match -= 1
        literals = start - anchor
        # From 15 on, a length takes bytes of its own: (n + 240) // 255, which is 0 below 15. No branch, no wrong guess.
        now_written = written + 1 + literals + (literals + 240) // 255
        unsafe = False
        # Matches that follow each other directly are taken without a probe between.
        while True:
            now_written += 2
            p, q = start + 4, match + 4
            while p < match_limit:
                differing = four[p] ^ four[q]
                if differing != 0:
                    # The number of equal bytes, without a branch that would be a coin toss.
                    p += (differing & 0xFF == 0) + (differing & 0xFFFF == 0) + (differing & 0xFFFFFF == 0)
                    break
                p += 4
                q += 4
            p = min(p, match_limit)
            if undo is not None and p + 8 > stop:
                unsafe = True
                break
            length = p - start - 4
            now_written += (length + 240) // 255
            start = p
            if start >= last_match:
                break
            slot = _hash(four[start - 2])
            if undo is not None:
                undo[undone] = (slot << 16) | table[slot]
                undone += 1
            table[slot] = start - 2
            sequence = four[start]
            slot = _hash(sequence)
            match = np.int64(table[slot])
            if undo is not None:
                undo[undone] = (slot << 16) | match
                undone += 1
            table[slot] = start
            if four[match] != sequence:
                break
            now_written += 1
        if undo is not None and unsafe:
            for k in range(undone - 1, -1, -1):
                table[undo[k] >> 16] = undo[k] & 65535
            break
        anchor, written = start, now_written
        if start >= last_match:
            break
        position, step, counter = start + 1, 1, skip
    if undo is not None:
        state[0], state[1], state[2], state[3], state[4] = position, step, counter, anchor, written
        return 0
    literals = end - anchor
    written += 1 + literals + (literals + 240) // 255
    # A block that is not smaller than the input is stored as it is. (The library gives up as soon as it lacks room, and
    # what it asks room for on the way never exceeds what the whole block takes.)
    return min(written, end)


@njit(nogil=True, cache=True)
def sizes(texts: Any, starts: Any, targets: Any, target_starts: Any, acceleration: int, out: Any) -> None:
    """Computes the sizes of LZ4 frames.

    Args:
        texts: uint8, the sources one after the other.
        starts: int64, shape ``(n + 1,)``: where each source starts, and the end of the last.
        targets: uint8, the targets one after the other.
        target_starts: int64, shape ``(m + 1,)``.
        acceleration: 1, or 1 - level for negative levels.
        out: int32, shape ``(n, m + 1)``: receives C(x) and C(x t) in bytes, or -1 where the input is too long for
            this function.
    """
    n, m = len(starts) - 1, len(target_starts) - 1
    data = np.zeros(MAX_BYTES + 16, dtype=np.uint8)
    # Copied for every target: four entries at a time.
    table_fours, table_x_fours = np.zeros(2048, dtype=np.uint64), np.zeros(2048, dtype=np.uint64)
    table, table_x = table_fours.view(np.uint16), table_x_fours.view(np.uint16)
    undo = np.zeros(2 * MAX_BYTES, dtype=np.uint32)
    four = np.zeros(len(data), dtype=np.uint32)
    target_four = np.zeros(len(targets), dtype=np.uint32)
    _fours(targets, target_four)
    prefix = np.zeros(5, dtype=np.int64)
    state = np.zeros(5, dtype=np.int64)
    skip = acceleration << 6
    for i in range(n):
        length = starts[i + 1] - starts[i]
        if length > MAX_BYTES:
            out[i] = -1
            continue
        data[:length] = texts[starts[i] : starts[i + 1]]
        _fours(data[:length], four)
        prefix[:] = 0
        table_x[:] = 0
        _parse(data, four, length, skip, table_x, prefix, undo)
        for j in range(-1, m):
            total = length
            if j >= 0:
                total += target_starts[j + 1] - target_starts[j]
                if total > MAX_BYTES:
                    out[i, j + 1] = -1
                    continue
                data[length:total] = targets[target_starts[j] : target_starts[j + 1]]
                four[length:total] = target_four[target_starts[j] : target_starts[j + 1]]
                for k in range(max(0, length - 3), length):
                    four[k] = _four(data, k)
            state[:] = prefix
            table_fours[:] = table_x_fours
            out[i, j + 1] = _FRAME + _parse(data, four, total, skip, table, state, None)
