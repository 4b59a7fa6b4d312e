"""Rolling hashes of a corpus looked up in a table of queries, in one loop. Needs numba.

The hash is the polynomial of ``duplicates.window_hashes``, so both engines find the same candidates.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def candidates(
    tokens: np.ndarray,
    length: int,
    base: np.uint64,
    modulus: np.uint64,
    table: np.ndarray,
    shift: int,
    filled: np.ndarray,
    marks: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds windows whose hash is in a table.

    Args:
        tokens: (n,) uint32 or uint16.
        length: Tokens of a window.
        base: Multiplier of the polynomial.
        modulus: Hashes are taken modulo this; 0 means 2^64.
        table: (2^k,) uint64, open addressing by the hash's mixed upper bits.
        shift: 64 - k.
        filled: (2^k,) bool, which places of the table are taken.
        marks: (2^k,) uint8: 8 bits for each place, by three more of the mixed hash's bits. A hash whose bit is not
            set is in no place of the table, and these bits fit the processor's cache where the table does not.

    Returns:
        Starts of the windows, int64, and their hashes, uint64.
    """
    n = tokens.shape[0]
    places = np.empty(1024, np.int64)
    hashes = np.empty(1024, np.uint64)
    count = 0
    if n < length:
        return places[:0], hashes[:0]
    one = np.uint64(1)
    mix = np.uint64(0x9E3779B97F4A7C15)
    mask = table.shape[0] - 1
    top = one
    for _ in range(length - 1):
        top = top * base
    value = np.uint64(0)
    for i in range(length - 1):
        value = value * base + np.uint64(tokens[i]) + one
    for i in range(length - 1, n):
        value = value * base + np.uint64(tokens[i]) + one
        key = value if modulus == np.uint64(0) else value % modulus
        fine = (key * mix) >> np.uint64(shift - 3)
        place = np.int64(fine >> np.uint64(3))
        marked = (marks[place] >> (fine & np.uint64(7))) & one
        while marked and filled[place]:
            if table[place] == key:
                if count == places.shape[0]:
                    places = np.concatenate((places, np.empty(count, np.int64)))
                    hashes = np.concatenate((hashes, np.empty(count, np.uint64)))
                places[count] = i - length + 1
                hashes[count] = key
                count += 1
                break
            place = (place + 1) & mask
        value = value - (np.uint64(tokens[i - length + 1]) + one) * top
    return places[:count], hashes[:count]
