"""Log-probabilities of documents under an :class:`~modelwright.models.ngram.NGramModel`, fast.

All n-grams of two words and more lie in one hash table whose key is a 64-bit hash of the words, from the last to the
first, so that the longest n-gram that a model knows is found by lengthening the context until one is missing. The keys
of a model are checked to differ; as in KenLM, an unknown n-gram would be taken for a known one with a chance of 2^-63
for each entry. Values are float32 there, sums float64.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from modelwright.errors import require
from modelwright.models.ngram import BEGIN, END, NGramModel

Engine = Literal["auto", "compiled", "numpy"]
_LEFT, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_ONE, _SHIFT = np.uint64(1), np.uint64(29)
_ENTRY = np.dtype([("key", "<u8"), ("probability", "<f4"), ("backoff", "<f4")])
_WORD = np.dtype([("hash", "<u8"), ("id", "<i4"), ("unused", "<i4")])
_UNIGRAM = np.dtype([("probability", "<f4"), ("backoff", "<f4")])
#: Bytes of documents that are scored at once.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Scores:
    """What a model says of documents.

    Attributes:
        log_probability: float64, shape ``(documents,)``: log10 of the probability of the words and the end.
        tokens: int64: the words, and the end.
        unknown: int64: how many of the words the model does not know.
    """

    log_probability: np.ndarray
    tokens: np.ndarray
    unknown: np.ndarray

    @property
    def perplexity(self) -> np.ndarray:
        """float64: ``10 ** (-log_probability / tokens)``, or NaN for a document without any word."""
        with np.errstate(over="ignore"):
            found = 10.0 ** (-self.log_probability / self.tokens)
        return np.where(self.tokens > 1, found, np.nan)


def extend(key: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Returns the keys (uint64, odd) of n-grams that are one word longer on the left than those of ``key``."""
    longer = (key ^ ((left.astype(np.uint64) + _ONE) * _LEFT)) * _MIX
    return (longer ^ (longer >> _SHIFT)) | _ONE


def first_key(last: np.ndarray) -> np.ndarray:
    """Returns the key (uint64) from which n-grams with these last words are extended."""
    return (last.astype(np.uint64) + _ONE) * _MIX


class Lookup:
    """A model as tables to look up.

    Args:
        model: The model.
        engine: ``compiled`` reads bytes with numba; ``numpy`` needs no more than numpy; ``auto`` takes the first if
            it is there. The scores are the same.

    Raises:
        UserError: ``compiled`` without numba.
    """

    def __init__(self, model: NGramModel, engine: Engine = "auto") -> None:
        if engine == "auto":
            engine = "compiled" if _kernel_loads() else "numpy"
        if engine == "compiled":
            require("numba", "speed", "the engine 'compiled'")
        self.engine, self.order = engine, model.order
        self.unigrams = np.empty(len(model.words), dtype=_UNIGRAM)
        self.unigrams["probability"], self.unigrams["backoff"] = model.log_probability[0], model.log_backoff[0]
        self.table = self._n_grams(model)
        # What spells a symbol in a text is no symbol.
        self._ids = {word: i for i, word in enumerate(model.words) if i > END} if engine == "numpy" else {}
        self._vocabulary = self._words(model.words) if engine == "compiled" else np.empty(0, dtype=_WORD)

    def score(self, texts: Sequence[str], workers: int = 1) -> Scores:
        """Scores documents, by ``workers`` threads."""
        blocks = list(_blocks([text.encode("utf-8", "surrogatepass") for text in texts]))
        one = self._compiled if self.engine == "compiled" else self._vectors
        if workers > 1 and len(blocks) > 1:
            with ThreadPoolExecutor(workers) as pool:
                found = list(pool.map(one, blocks))
        else:
            found = [one(block) for block in blocks]
        empty = (np.empty(0), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        return Scores(*(np.concatenate(parts) for parts in zip(empty, *found)))

    def _compiled(self, documents: list[bytes]) -> tuple[np.ndarray, ...]:
        from modelwright.models.ngram_kernel import score

        found = np.empty(len(documents)), *np.empty((2, len(documents)), dtype=np.int64)
        score(*_joined(documents), self._vocabulary, self.unigrams, self.table, self.order, *found)
        return found

    def _vectors(self, documents: list[bytes]) -> tuple[np.ndarray, ...]:
        get = self._ids.get
        rows = [[BEGIN, *[get(w, 0) for w in d.split()], END] for d in documents]
        lengths = np.array([len(row) for row in rows])
        first = np.cumsum(lengths) - lengths
        ids = np.concatenate([np.array(row, dtype=np.int64) for row in rows])
        place = np.arange(len(ids)) - np.repeat(first, lengths)  # in its document
        value = self.unigrams["probability"][ids].astype(np.float64)
        matched = np.ones(len(ids), dtype=np.int64)
        backoffs = [self.unigrams["backoff"][ids].astype(np.float64)]
        key, alive = first_key(ids), np.flatnonzero((place > 0) & (ids > 0) & (np.roll(ids, 1) > 0))
        for n in range(2, self.order + 1):
            key[alive] = extend(key[alive], ids[alive - (n - 1)])
            slot = self._find(key[alive])
            alive, slot = alive[slot >= 0], slot[slot >= 0]
            found = self.table[slot]
            value[alive], matched[alive] = found["probability"], n
            backoffs.append(np.zeros(len(ids)))
            backoffs[-1][alive] = found["backoff"]
            alive = alive[(found["key"] & _ONE) > 0]
            alive = alive[(place[alive] >= n) & (matched[alive - 1] >= n)]
        # What was matched at the word before are the contexts that there are.
        contexts = np.minimum(np.roll(matched, 1), self.order - 1)
        for k in range(1, self.order):
            more = np.flatnonzero((place > 0) & (k >= matched) & (k <= contexts))
            value[more] += backoffs[k - 1][more - 1]
        value[first] = 0.0
        unknown = np.add.reduceat((ids == 0).astype(np.int64), first)
        return np.add.reduceat(value, first), lengths - 1, unknown

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """The slots of keys, or -1."""
        last = len(self.table) - 1
        slot = ((keys >> _ONE) & np.uint64(last)).astype(np.int64)
        open_ = np.arange(len(keys))
        while len(open_):
            there = self.table["key"][slot[open_]]
            slot[open_[there == 0]] = -1
            open_ = open_[(there != 0) & ((there | _ONE) != keys[open_])]
            slot[open_] = (slot[open_] + 1) & last
        return slot

    def _n_grams(self, model: NGramModel) -> np.ndarray:
        parts: list[np.ndarray] = []
        for n in range(2, model.order + 1):
            ids = model.ids(n)
            key = first_key(ids[:, -1])
            for left in range(n - 2, -1, -1):
                shorter, key = key, extend(key, ids[:, left])
            if parts:
                # The lowest bit is free to say whether a longer n-gram ends with this one.
                longer = np.isin(parts[-1]["key"], shorter)
                parts[-1]["key"][~longer] &= ~_ONE
            part = np.empty(len(key), dtype=_ENTRY)
            part["key"], part["probability"] = key, model.log_probability[n - 1]
            part["backoff"] = model.log_backoff[n - 1]
            parts.append(part)
        parts[-1]["key"] &= ~_ONE
        entries = np.concatenate(parts)
        return _open_addressing(entries, "key", entries["key"] >> _ONE)

    def _words(self, words: list[bytes]) -> np.ndarray:
        from modelwright.models.ngram_kernel import word_hashes

        entries = np.zeros(len(words), dtype=_WORD)
        entries["hash"], entries["id"] = word_hashes(*_joined(words)), np.arange(len(words))
        return _open_addressing(entries[END + 1 :], "hash", entries["hash"][END + 1 :])


def _kernel_loads() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("modelwright.models.ngram_kernel")
    except (ImportError, RuntimeError, OSError):
        # numba does not fit this Python or numpy, or finds no folder for what it compiles.
        return False
    return True


def _blocks(documents: list[bytes]) -> Iterator[list[bytes]]:
    block: list[bytes] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _joined(parts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return np.frombuffer(b"".join(parts), dtype=np.uint8), starts


def _open_addressing(entries: np.ndarray, key: str, hashes: np.ndarray) -> np.ndarray:
    """Puts entries into a table of 2^k slots, three quarters full at most: at ``hash mod slots`` or the next free."""
    if len(np.unique(hashes)) < len(hashes) or not hashes.all():
        raise ValueError("two n-grams or words share a hash")
    slots = 1 << max(2, (4 * len(entries) // 3).bit_length())
    table = np.zeros(slots, dtype=entries.dtype)
    waiting = np.arange(len(entries))
    slot = (hashes & np.uint64(slots - 1)).astype(np.int64)
    while len(waiting):
        free = waiting[table[key][slot[waiting]] == 0]
        places, first = np.unique(slot[free], return_index=True)
        table[places] = entries[free[first]]
        waiting = np.setdiff1d(waiting, free[first], assume_unique=True)
        slot[waiting] = (slot[waiting] + 1) & (slots - 1)
    return table
