"""What SWE maximises, and the plain greedy search for it: the specification of the fast one in ``merging.py``.

A word is a tuple of symbols, a corpus maps words to how often they occur. With c_s the count of symbol s in the present
segmentation and N their sum, the log-likelihood of the corpus under its own unigram frequencies is

    L = sum_s c_s ln(c_s / N) = sum_s g(c_s) - g(N),    g(x) = x ln x,  g(0) = 0.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Word = tuple[str, ...]
Pair = tuple[str, str]
#: Gains of up to so many nats are rounding.
NO_GAIN = 1e-6


@dataclass(frozen=True)
class Merge:
    """One step of training.

    Attributes:
        pair: The two symbols that become one.
        count: Times they were merged, n: occurrences that do not overlap, from the left.
        gain: By how much L grew, in nats.
    """

    pair: Pair
    count: int
    gain: float


def g(x: float) -> float:
    """Returns x ln x."""
    return x * math.log(x) if x > 0 else 0.0


def symbol_counts(words: Mapping[Word, int]) -> Counter[str]:
    """Returns how often each symbol occurs in the corpus."""
    counts: Counter[str] = Counter()
    for word, frequency in words.items():
        for symbol in word:
            counts[symbol] += frequency
    return counts


def log_likelihood(counts: Iterable[int]) -> float:
    """Returns L in nats (never above 0) from the symbols' counts."""
    counts = list(counts)
    return sum(map(g, counts)) - g(sum(counts))


def merge_gain(n: int, count_a: int, count_b: int, total: int, *, same: bool = False) -> float:
    """Returns the exact change of L when ``n`` occurrences of the pair (a, b) become one new symbol.

    Args:
        n: Occurrences that do not overlap.
        count_a: Count of a before.
        count_b: Count of b before; not read if ``same``.
        total: N before.
        same: a and b are the same symbol, of which each occurrence takes two.
    """
    parts = g(count_a - 2 * n) - g(count_a) if same else g(count_a - n) - g(count_a) + g(count_b - n) - g(count_b)
    return g(n) + parts - g(total - n) + g(total)


def merge_word(word: Word, pair: Pair) -> tuple[Word, int]:
    """Merges a pair in a word from the left; returns the new word and how many times."""
    merged: list[str] = []
    times = place = 0
    while place < len(word):
        if word[place : place + 2] == pair:
            merged.append(pair[0] + pair[1])
            times += 1
            place += 2
        else:
            merged.append(word[place])
            place += 1
    return tuple(merged), times


def pair_counts(words: Mapping[Word, int]) -> Counter[Pair]:
    """Returns how often each pair could be merged: ``aaa`` holds (a, a) once."""
    counts: Counter[Pair] = Counter()
    for word, frequency in words.items():
        for pair in set(itertools.pairwise(word)):
            counts[pair] += frequency * merge_word(word, pair)[1]
    return counts


def apply_merge(words: Mapping[Word, int], pair: Pair) -> dict[Word, int]:
    """Merges a pair in every word."""
    merged: Counter[Word] = Counter()
    for word, frequency in words.items():
        merged[merge_word(word, pair)[0]] += frequency
    return dict(merged)


def greedy_merges(words: Mapping[Word, int], merges: int, *, min_frequency: int = 1) -> list[Merge]:
    """Takes the merge that raises L most, again and again: slow, and nothing but the definition.

    Ties go to the pair that occurs more often, then to the one that sorts first. A pair whose union is a symbol already
    is never merged: it would spend a merge without giving the vocabulary a symbol, and such merges can make a
    tokenizer that applies them by rank segment otherwise than training did.

    Args:
        words: The corpus.
        merges: Merges at most; it ends earlier when none raises L.
        min_frequency: A pair must occur this often.
    """
    done: list[Merge] = []
    symbols = set(symbol_counts(words))
    while len(done) < merges:
        counts = symbol_counts(words)
        total = sum(counts.values())
        found = [
            Merge((a, b), n, merge_gain(n, min(counts[a], counts[b]), max(counts[a], counts[b]), total, same=a == b))
            for (a, b), n in pair_counts(words).items()
            if n >= min_frequency and a + b not in symbols
        ]
        if not found:
            break
        best = min(found, key=lambda merge: (-merge.gain, -merge.count, merge.pair))
        if best.gain <= NO_GAIN:
            break
        words = apply_merge(words, best.pair)
        symbols.add("".join(best.pair))
        done.append(best)
    return done


def exact_search(words: Mapping[Word, int], merges: int) -> tuple[list[Pair], float]:
    """Returns the sequence of at most ``merges`` merges with the greatest L, and that L, by trying all of them.

    Greedy merging takes the best next step; the best sequence is an NP-hard problem. For corpora of a few symbols.
    """
    best: tuple[list[Pair], float] = ([], log_likelihood(symbol_counts(words).values()))
    seen: set[tuple[frozenset[tuple[Word, int]], int]] = set()

    def search(now: Mapping[Word, int], done: list[Pair], symbols: frozenset[str]) -> None:
        nonlocal best
        likelihood = log_likelihood(symbol_counts(now).values())
        if likelihood > best[1] + 1e-12:
            best = (done, likelihood)
        state = (frozenset(now.items()), len(done))
        if len(done) == merges or state in seen:
            return
        seen.add(state)
        for pair in sorted(pair_counts(now)):
            if "".join(pair) not in symbols:
                search(apply_merge(now, pair), [*done, pair], symbols | {"".join(pair)})

    search(words, [], frozenset(symbol_counts(words)))
    return best
