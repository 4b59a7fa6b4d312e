"""The words of documents and their probabilities under an n-gram model, over bytes. Needs numba.

The same table and the same hashes as :mod:`.ngram_scoring`, which compares both ways in its tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_FNV, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_LEFT, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_ONE, _SHIFT, _ZERO = np.uint64(1), np.uint64(29), np.uint64(0)
_BEGIN, _END = 1, 2


@njit(nogil=True, cache=True)
def word_hashes(data: Any, starts: Any) -> Any:
    """Returns the hash of every word: uint64.

    Args:
        data: uint8, the words' bytes.
        starts: int64, (words + 1,), where each begins.
    """
    found = np.empty(len(starts) - 1, dtype=np.uint64)
    for i in range(len(found)):
        h = _FNV
        for p in range(starts[i], starts[i + 1]):
            h = (h ^ np.uint64(data[p])) * _FNV_PRIME
        h = (h ^ (h >> _SHIFT)) * _MIX
        found[i] = max(h ^ (h >> _SHIFT), _ONE)
    return found


@njit(nogil=True, cache=True)
def score(
    data: Any, starts: Any, vocabulary: Any, unigrams: Any, table: Any, order: Any,
    total: Any, tokens: Any, unknown: Any,
) -> None:  # fmt: skip
    """Scores documents, each order in a pass of its own: the look-ups of a pass do not wait for each other's memory.

    Args:
        data: uint8, their bytes.
        starts: int64, (documents + 1,), where each begins.
        vocabulary: Open-addressing table of words: ``hash`` (0: free) and ``id``.
        unigrams: By id: ``probability`` and ``backoff``, log10.
        table: Open-addressing table of n-grams: ``key`` (0: free; the lowest bit says whether a longer n-gram ends
            with this one), ``probability`` and ``backoff``.
        order: Of the model.
        total: float64, (documents,): receives the log10 probability.
        tokens: int64: receives the number of words and the end.
        unknown: int64: receives the number of unknown words.
    """
    longest = 0
    for document in range(len(total)):
        longest = max(longest, starts[document + 1] - starts[document])
    room = longest // 2 + 4
    hashes = np.empty(room, dtype=np.uint64)
    ids, matched, alive = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    value, backoff = np.empty(room, np.float32), np.empty((order + 1, room), np.float32)
    word_mask, mask = np.uint64(len(vocabulary) - 1), np.uint64(len(table) - 1)
    for document in range(len(total)):
        count = _words(data, starts[document], starts[document + 1], hashes)
        last = count + 1
        missed = 0
        ids[0], ids[last] = _BEGIN, _END
        for i in range(1, last):
            h = hashes[i]
            slot = h & word_mask
            while vocabulary[slot].hash != _ZERO and vocabulary[slot].hash != h:
                slot = (slot + _ONE) & word_mask
            ids[i] = vocabulary[slot].id if vocabulary[slot].hash == h else 0
            missed += ids[i] == 0
        living = 0
        for i in range(last + 1):
            word = ids[i]
            value[i], backoff[1, i], matched[i] = unigrams[word].probability, unigrams[word].backoff, 1
            hashes[i] = (np.uint64(word) + _ONE) * _MIX
            if i and word and ids[i - 1]:
                alive[living] = i
                living += 1
        for n in range(2, order + 1):
            kept = 0
            for a in range(living):
                i = alive[a]
                key = (hashes[i] ^ ((np.uint64(ids[i - n + 1]) + _ONE) * _LEFT)) * _MIX
                key = (key ^ (key >> _SHIFT)) | _ONE
                hashes[i] = key
                slot = (key >> _ONE) & mask
                held = table[slot].key
                while held != _ZERO and (held | _ONE) != key:
                    slot = (slot + _ONE) & mask
                    held = table[slot].key
                if held != _ZERO:
                    value[i], backoff[n, i], matched[i] = table[slot].probability, table[slot].backoff, n
                    if held & _ONE:
                        alive[kept] = i
                        kept += 1
            # A longer n-gram is known only where its first words are, which the pass that ends here has found.
            living = 0
            for a in range(kept):
                i = alive[a]
                if i >= n and matched[i - 1] >= n:
                    alive[living] = i
                    living += 1
        sum_ = 0.0
        for i in range(1, last + 1):
            sum_ += np.float64(value[i])
            for k in range(matched[i], min(matched[i - 1], order - 1) + 1):
                sum_ += np.float64(backoff[k, i - 1])
        total[document], tokens[document], unknown[document] = sum_, count + 1, missed


@njit(nogil=True, cache=True)
def _words(data: Any, p: Any, end: Any, hashes: Any) -> Any:
    """Writes the hashes of a document's words from index 1, and returns how many there are."""
    count = 0
    while True:
        while p < end and (data[p] == 32 or 9 <= data[p] <= 13):
            p += 1
        if p == end:
            return count
        h = _FNV
        while p < end and not (data[p] == 32 or 9 <= data[p] <= 13):
            h = (h ^ np.uint64(data[p])) * _FNV_PRIME
            p += 1
        count += 1
        h = (h ^ (h >> _SHIFT)) * _MIX
        hashes[count] = max(h ^ (h >> _SHIFT), _ONE)
