"""An n-gram language model with interpolated modified Kneser-Ney smoothing: estimated, stored, and asked.

The estimate is that of KenLM's ``lmplz`` without pruning (Heafield et al., 2013; Chen and Goodman, 1998, equation 26):
a document is one sentence, its words are what white space separates, n-grams below the highest order are counted by
the number of different words before them, except those that begin the sentence, and unigrams are interpolated with a
uniform distribution over the vocabulary with the unknown word. :mod:`.ngram_scoring` has the fast way to score texts.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelwright.errors import UserError
from modelwright.files import atomic_path

#: The unknown word, and the beginning and the end of a sentence, by their ids.
SYMBOLS = (b"<unk>", b"<s>", b"</s>")
UNKNOWN, BEGIN, END = range(3)
#: What ``lmplz --discount_fallback`` takes where the counts of counts give none.
FALLBACK = (0.5, 1.0, 1.5)
MAX_ORDER = 6
_FORMAT = "modelwright-ngram-1"


@dataclass
class NGramModel:
    """The n-grams of a model by order; entry ``i`` of an order is the n-gram of its prefix and its last word.

    Attributes:
        words: Words (UTF-8) by id; the first three are :data:`SYMBOLS`.
        prefix: Of order n from 2: int64, index of the first n - 1 words among the (n - 1)-grams; order 1 has none.
        word: int32, id of the last word; order 1 holds every id in order.
        log_probability: float64, log10 of the probability of the last word after the others.
        log_backoff: float64, log10 of the weight of the shorter context where no longer n-gram is known; 0 at the
            highest order.
        discounts: Of order n: what is taken off counts of 1, 2, and 3 or more; empty where the model was read.
        fallback: Orders whose counts of counts gave no discounts, so that :data:`FALLBACK` was taken.
    """

    words: list[bytes]
    prefix: list[np.ndarray]
    word: list[np.ndarray]
    log_probability: list[np.ndarray]
    log_backoff: list[np.ndarray]
    discounts: list[tuple[float, float, float]] = field(default_factory=list)
    fallback: list[int] = field(default_factory=list)

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return len(self.word)

    @property
    def sizes(self) -> list[int]:
        """Number of n-grams of every order."""
        return [len(w) for w in self.word]

    def ids(self, order: int) -> np.ndarray:
        """Returns the words of all n-grams of an order: int32, shape ``(n-grams, order)``."""
        found = np.empty((len(self.word[order - 1]), order), dtype=np.int32)
        at = np.arange(len(found))
        for n in range(order, 0, -1):
            found[:, n - 1] = self.word[n - 1][at]
            at = self.prefix[n - 1][at] if n > 1 else at
        return found

    def distribution(self, context: Sequence[str]) -> np.ndarray:
        """Returns the probability of every word after a context, in float64: the slow definition.

        Args:
            context: Words; ``<s>`` may stand first.

        Returns:
            Shape ``(words,)``, by id; the beginning of a sentence is never predicted and has 0.
        """
        known = {w: i for i, w in enumerate(self.words)}
        ids = [known.get(w.encode(), UNKNOWN) for w in context][-(self.order - 1) :]
        found = 10.0 ** self.log_probability[0]
        found[BEGIN] = 0.0
        for length in range(1, len(ids) + 1):
            at = self._find(ids[-length:])
            if at is None:
                break  # a longer context is not known either
            found *= 10.0 ** self.log_backoff[length - 1][at]
            rows = np.flatnonzero(self.prefix[length] == at)
            found[self.word[length][rows]] = 10.0 ** self.log_probability[length][rows]
        return found

    def _find(self, ids: Sequence[int]) -> int | None:
        at = ids[0]
        for n in range(1, len(ids)):
            rows = np.flatnonzero((self.prefix[n] == at) & (self.word[n] == ids[n]))
            if not len(rows):
                return None
            at = int(rows[0])
        return at

    def save(self, path: str | Path, force: bool = False, **information: Any) -> None:
        """Writes the model as one safetensors file.

        Args:
            path: The file.
            force: Whether an existing one may be replaced.
            information: JSON-able, kept beside it.
        """
        from safetensors.numpy import save_file

        arrays: dict[str, np.ndarray] = {"words": np.frombuffer(b"\n".join(self.words), dtype=np.uint8)}
        for n in range(self.order):
            arrays |= {
                f"prefix.{n + 1}": self.prefix[n],
                f"word.{n + 1}": self.word[n],
                f"log_probability.{n + 1}": self.log_probability[n],
                f"log_backoff.{n + 1}": self.log_backoff[n],
            }
        about = {"order": self.order, "discounts": self.discounts, "fallback": self.fallback, "more": information}
        with atomic_path(path, force) as partial:
            save_file(arrays, str(partial), metadata={"format": _FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> tuple[NGramModel, dict[str, Any]]:
        """Reads what :meth:`save` wrote: the model, and the information beside it.

        Raises:
            UserError: The file is missing, or no such model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "numpy") as stream:
                metadata = stream.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(f"{path} holds no n-gram model of this program.")
                about = json.loads(metadata["about"])
                arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist.") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} holds no n-gram model, or is damaged ({error}).") from error
        prefix, word, probability, backoff = (
            [arrays[f"{name}.{n + 1}"] for n in range(about["order"])]
            for name in ("prefix", "word", "log_probability", "log_backoff")
        )
        discounts = [(d[0], d[1], d[2]) for d in about["discounts"]]
        words = arrays["words"].tobytes().split(b"\n")
        return cls(words, prefix, word, probability, backoff, discounts, about["fallback"]), about["more"]

    def write_arpa(self, path: str | Path, force: bool = False) -> None:
        """Writes the model in the ARPA format, which KenLM, SRILM and others read."""
        with atomic_path(path, force) as partial, partial.open("wb") as stream:
            stream.write(b"\\data\\\n")
            stream.write(b"".join(b"ngram %d=%d\n" % (n + 1, size) for n, size in enumerate(self.sizes)))
            for n in range(1, self.order + 1):
                stream.write(b"\n\\%d-grams:\n" % n)
                last = n == self.order
                rows = zip(self.ids(n).tolist(), self.log_probability[n - 1].tolist(), self.log_backoff[n - 1].tolist())
                for ids, probability, backoff in rows:
                    text = b" ".join([self.words[i] for i in ids])
                    end = b"\n" if last else f"\t{backoff:.9g}\n".encode()
                    stream.write(f"{probability:.9g}\t".encode() + text + end)
            stream.write(b"\n\\end\\\n")


def estimate(texts: Iterable[str], order: int = 5, *, fallback: Sequence[float] | None = FALLBACK) -> NGramModel:
    """Estimates a model; texts are read once as a stream, and four bytes a word are kept of them.

    Args:
        texts: Documents, each one sentence. Words that spell one of :data:`SYMBOLS` are left out.
        order: Length of the longest n-grams, 2 to 6.
        fallback: Discounts for an order whose counts of counts give none (small or artificial texts); None refuses
            such texts, as ``lmplz`` does.

    Raises:
        UserError: No text has a word, the order makes no sense, or there are no discounts.
    """
    if not 2 <= order <= MAX_ORDER:
        raise UserError(f"The order of an n-gram model must lie between 2 and {MAX_ORDER}, not {order}.")
    words, tokens = _tokens(texts)
    if len(words) == len(SYMBOLS):
        raise UserError("The reference of the n-gram model is empty: give texts with words.")
    counts = _count(tokens, len(words), order)
    model = NGramModel(words, [c.prefix for c in counts], [c.word for c in counts], [], [])
    for n, level in enumerate(counts):
        discounts, given = _discounts(level.adjusted)
        if not given:
            if fallback is None:
                raise UserError(
                    f"The texts give no Kneser-Ney discounts for {n + 1}-grams: they are few or artificial; remove "
                    f"duplicates, or allow the fallback."
                )
            discounts = np.array([0.0, *fallback])
            model.fallback.append(n + 1)
        model.discounts.append((float(discounts[1]), float(discounts[2]), float(discounts[3])))
        _probabilities(model, counts, n, discounts)
    return model


@dataclass
class _Level:
    """The n-grams of one order."""

    prefix: np.ndarray  # int64, among those of the order before
    word: np.ndarray  # int32
    suffix: np.ndarray  # int64, the n-gram without its first word, among those of the order before
    begins: np.ndarray  # bool, whether <s> is the first word
    raw: np.ndarray  # int64, how often it occurs
    adjusted: np.ndarray  # int64


def _tokens(texts: Iterable[str]) -> tuple[list[bytes], np.ndarray]:
    """All documents as ids, ``<s> words </s>`` one after another."""
    known: dict[bytes, int] = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    ids = array("i")
    for text in texts:
        row = [known.setdefault(w, len(known)) for w in text.encode("utf-8", "surrogatepass").split()]
        row = [i for i in row if i > END]
        if row:
            ids.append(BEGIN)
            ids.extend(row)
            ids.append(END)
    return list(known), np.array(ids, dtype=np.int32)


def _count(tokens: np.ndarray, words: int, order: int) -> list[_Level]:
    raw = np.bincount(tokens, minlength=words)
    begins = np.arange(words) == BEGIN
    empty = np.empty(0, dtype=np.int64)
    levels = [_Level(empty, np.arange(words, dtype=np.int32), empty, begins, raw, raw)]
    # `node[i]` is the n-gram that starts at position i, for those in `place`: not over a sentence's end.
    place, node = np.arange(len(tokens)), tokens.astype(np.int64)
    for n in range(2, order + 1):
        place = place[tokens[place + n - 2] != END]
        keys = node[place] * words + tokens[place + n - 1]
        unique, first, inverse, raw = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        # Without its first word it is the (n - 1)-gram that starts one position on.
        suffix, before = node[place[first] + 1], levels[-1]
        before.adjusted = np.where(before.begins, before.raw, np.bincount(suffix, minlength=len(before.word)))
        prefix = unique // words
        levels.append(_Level(prefix, (unique % words).astype(np.int32), suffix, before.begins[prefix], raw, raw))
        node[place] = inverse
    levels[0].adjusted[BEGIN] = 0
    return levels


def _discounts(adjusted: np.ndarray) -> tuple[np.ndarray, bool]:
    """Chen and Goodman's discounts of counts 0, 1, 2, and 3 or more; and whether the counts of counts give them."""
    t = np.bincount(np.minimum(adjusted, 5), minlength=6)[:5].astype(np.float64)
    if (t[1:4] == 0).any():
        return np.zeros(4), False
    k = np.arange(1, 4)
    y = t[1] / (t[1] + 2 * t[2])
    found = np.concatenate([[0.0], k - (k + 1) * y * t[2:5] / t[1:4]])
    return found, bool((found[1:] >= 0).all() and (found[1:] <= k).all())


def _probabilities(model: NGramModel, counts: list[_Level], n: int, discounts: np.ndarray) -> None:
    """Adds an order's probabilities, and the back-off weights of the order before, from which they interpolate."""
    level = counts[n]
    taken = discounts[np.minimum(level.adjusted, 3)]
    if n == 0:
        total = level.adjusted.sum()
        # <s> is not predicted, so it is not among the words that share the rest.
        found = (level.adjusted - taken) / total + taken.sum() / total / (len(level.word) - 1)
        found[BEGIN] = 1.0
    else:
        contexts = len(counts[n - 1].word)
        total = np.bincount(level.prefix, level.adjusted, contexts)
        rest = np.bincount(level.prefix, taken, contexts)
        weight = np.divide(rest, total, out=np.ones(contexts), where=total > 0)
        lower = 10.0 ** model.log_probability[n - 1][level.suffix]
        found = (level.adjusted - taken) / total[level.prefix] + weight[level.prefix] * lower
        with np.errstate(divide="ignore"):
            model.log_backoff[n - 1] = np.log10(weight)
    model.log_probability.append(np.log10(found))
    model.log_backoff.append(np.zeros(len(found)))


def read_arpa(path: str | Path) -> NGramModel:
    """Reads a model in the ARPA format, such as KenLM's ``lmplz`` writes; plain text or ``.gz``.

    Raises:
        UserError: The file is missing or is no ARPA file.
    """
    import gzip

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            return _parse_arpa(line.rstrip(b"\r\n") for line in stream)
        except (ValueError, IndexError, KeyError, StopIteration, OSError) as error:
            raise UserError(f"{path} is not a whole ARPA file ({type(error).__name__}: {error}).") from error


def _parse_arpa(lines: Iterator[bytes]) -> NGramModel:
    for line in lines:
        if line == b"\\data\\":
            break
    sizes = [int(line.split(b"=")[1]) for line in itertools.takewhile(lambda line: line.strip(), lines)]
    if not sizes:
        raise ValueError("no n-grams are announced")
    model = NGramModel([], [], [], [], [])
    ids: dict[bytes, int] = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    known: dict[Any, int] = {}
    for n, size in enumerate(sizes, 1):
        while not next(lines).startswith(b"\\%d-grams:" % n):
            pass
        rows = [line.split(b"\t") for line in itertools.islice(lines, size)]
        if len(rows) < size:
            raise ValueError(f"{size} {n}-grams are announced, and there are fewer")
        grams = [row[1].split() for row in rows]
        probability = np.array([float(row[0]) for row in rows])
        backoff = np.array([float(row[2]) if len(row) > 2 else 0.0 for row in rows])
        if n == 1:
            for gram in grams:
                ids.setdefault(gram[0], len(ids))
            at = np.array([ids[gram[0]] for gram in grams], dtype=np.int64)
            whole = np.full((2, len(ids)), 0.0)
            whole[0] = -100.0  # a symbol that the file does not have
            whole[:, at] = probability, backoff
            probability, backoff = whole
            known = {(i,): i for i in range(len(ids))}
            model.word.append(np.arange(len(ids), dtype=np.int32))
            model.prefix.append(np.empty(0, dtype=np.int64))
        else:
            keys = [tuple(ids[w] for w in gram) for gram in grams]
            model.prefix.append(np.array([known[key[:-1]] for key in keys], dtype=np.int64))
            model.word.append(np.array([key[-1] for key in keys], dtype=np.int32))
            known = {key: i for i, key in enumerate(keys)}
        model.log_probability.append(probability)
        model.log_backoff.append(backoff)
    model.words = list(ids)
    return model
