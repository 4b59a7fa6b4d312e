"""After the merges: segment each word by the likelihood itself, and drop the symbols that are worth least.

A vocabulary with probabilities P segments a word into the symbols with the greatest sum of ln P (Viterbi). The search
is that of ``tokenizers``' Unigram model, so what is trained here is what the exported tokenizer does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelwright.tokenization.swe.likelihood import g, log_likelihood


def log_probabilities(symbols: Iterable[str], counts: Mapping[str, int], longest: int) -> dict[str, float]:
    """Returns ln(c_s / N) for each symbol.

    A symbol that does not occur has P = 0. It stays in the vocabulary, because the alphabet must cover other texts,
    with a value so low that no path through a word of up to ``longest`` symbols prefers it to one that avoids it.
    """
    total = sum(counts.values())
    known = {symbol: math.log(counts[symbol] / total) for symbol in symbols if counts.get(symbol)}
    floor = (longest + 1) * min(known.values(), default=-1.0) - 1.0
    return {symbol: known.get(symbol, floor) for symbol in symbols}


def unigram_model(scores: Mapping[str, float], unknown: str | None = None) -> Any:
    """Returns the ``tokenizers`` model that segments by these scores; the order of ``scores`` gives the ids."""
    from tokenizers import models

    names = list(scores)
    return models.Unigram(list(scores.items()), unk_id=None if unknown is None else names.index(unknown))


def count_segments(words: Mapping[str, int], scores: Mapping[str, float]) -> Counter[str]:
    """Segments every word by ``scores`` and returns how often each symbol is used."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(unigram_model(scores))
    names = list(scores)
    counts: Counter[str] = Counter()
    spelled = list(words)
    for start in range(0, len(spelled), 20_000):
        some = spelled[start : start + 20_000]
        for word, encoding in zip(some, tokenizer.encode_batch_fast(some)):
            for i in encoding.ids:
                counts[names[i]] += words[word]
    return counts


def expectation_maximisation(
    words: Mapping[str, int], symbols: Sequence[str], counts: Mapping[str, int], *, rounds: int = 20
) -> tuple[Counter[str], list[float]]:
    """Alternates P = the counts' shares and the best segmentation under P, until no word changes.

    Args:
        words: Words, spelled in symbols of the alphabet, to frequencies.
        symbols: The vocabulary, which stays as it is.
        counts: Counts of the segmentation to start from.
        rounds: Rounds at most.

    Returns:
        The counts at the end, and L after each round, the start first: it never decreases.
    """
    longest = max(map(len, words))
    now = Counter(counts)
    history = [log_likelihood(now.values())]
    for _ in range(rounds):
        new = count_segments(words, log_probabilities(symbols, now, longest))
        if new == now:
            break
        now = new
        history.append(log_likelihood(now.values()))
    return now, history


def removal_losses(symbols: Iterable[str], counts: Mapping[str, int], scores: Mapping[str, float]) -> dict[str, float]:
    """Returns by how much L falls, in nats, if a symbol is taken out and each use of it is spelled with the others.

    Symbols of the alphabet, of one character, cannot be taken out and are left out.
    """
    total = sum(counts.values())
    longest = max(map(len, scores), default=1)
    losses = {}
    for symbol in symbols:
        if len(symbol) == 1:
            continue
        n = counts.get(symbol, 0)
        spelled = Counter(best_segmentation(symbol, scores, longest, without=symbol))
        change = sum(g(counts.get(s, 0) + n * times) - g(counts.get(s, 0)) for s, times in spelled.items())
        length = sum(spelled.values())
        losses[symbol] = g(n) - change + g(total + n * (length - 1)) - g(total)
    return losses


def best_segmentation(word: str, scores: Mapping[str, float], longest: int, *, without: str = "") -> list[str]:
    """Returns the segmentation of a word with the greatest sum of scores, from symbols of up to ``longest`` characters.

    Of equal ones it takes, from the end of the word, the longest symbol, as ``tokenizers`` does.
    """
    best: list[tuple[float, int]] = [(0.0, 0)] + [(-math.inf, 0)] * len(word)
    for start in range(len(word)):
        for end in range(start + 1, min(len(word), start + longest) + 1):
            symbol = word[start:end]
            if symbol != without and symbol in scores and best[start][0] + scores[symbol] > best[end][0]:
                best[end] = (best[start][0] + scores[symbol], start)
    pieces, end = [], len(word)
    while end:
        pieces.append(word[best[end][1] : end])
        end = best[end][1]
    return pieces[::-1]


def prune(
    words: Mapping[str, int], symbols: Sequence[str], counts: Mapping[str, int], size: int, *, share: float = 0.1
) -> tuple[list[str], Counter[str]]:
    """Drops the symbol whose loss is smallest until ``size`` are left, and segments anew after each.

    Args:
        words: Words to frequencies.
        symbols: The larger vocabulary.
        counts: Counts of its present segmentation.
        size: Symbols to keep; never fewer than the alphabet.
        share: Share of the vocabulary that goes between two segmentations; 0 takes one symbol at a time.

    Returns:
        The symbols that stay, in their order, and their counts.
    """
    longest = max(map(len, words))
    kept = list(symbols)
    now = expectation_maximisation(words, kept, counts)[0]
    while len(kept) > size:
        scores = log_probabilities(kept, now, longest)
        losses = removal_losses(kept, now, scores)
        if not losses:
            break
        out = min(len(kept) - size, max(1, int(share * len(kept))), len(losses))
        gone = set(sorted(losses, key=lambda symbol: (losses[symbol], symbol))[:out])
        kept = [symbol for symbol in kept if symbol not in gone]
        now = count_segments(words, {symbol: scores[symbol] for symbol in kept})
        now = expectation_maximisation(words, kept, now)[0]
    return kept, now
