"""The greedy search of ``likelihood.py`` for real corpora: same merges, without a rescan for each.

All words stand one behind the other in one array of symbols, doubly linked within a word. Each pair knows its count and
the places where it begins; a merge touches those places and their neighbours only. As every merge makes a new symbol,
a pair that is there can only become rarer, so a pair below the smallest frequency is forgotten for good.

The best merge changes with every count, so no queue can hold the pairs in order. But a pair that occurs n times cannot
gain more than n (1 + ln(N / n)), which grows with n: one look at all counts leaves few pairs to work out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from modelwright.tokenization.swe.likelihood import NO_GAIN, Merge

_KEY = 1 << 31
#: An index of fewer pairs is not worth making smaller.
_SMALL = 4096


class PairIndex:
    """A corpus under merging.

    Args:
        symbols: The alphabet, one string a symbol.
        words: Words as strings of symbols of one character each.
        frequencies: Occurrences of each word.
        min_frequency: A pair must occur this often to be merged.
        max_length: Longest symbol to make, in characters of the alphabet.
    """

    def __init__(
        self,
        symbols: Sequence[str],
        words: Sequence[str],
        frequencies: Sequence[int],
        *,
        min_frequency: int = 1,
        max_length: int | None = None,
    ) -> None:
        self.symbols = list(symbols)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.min_frequency = max(1, min_frequency)
        self.max_length = max_length or 1 << 30
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._lay_out("".join(words), lengths, np.asarray(frequencies, np.int64))
        self.a = np.empty(0, np.int64)
        self.b = np.empty(0, np.int64)
        self.n = np.empty(0, np.int64)
        self.places: list[list[np.ndarray]] = []
        self.slots: dict[int, int] = {}
        self._exact: dict[int, tuple[int, int]] = {}
        self._leaders: list[tuple[int, int]] = []
        self._add(np.flatnonzero(self.next >= 0))

    def _lay_out(self, text: str, lengths: np.ndarray, frequencies: np.ndarray) -> None:
        characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        table = np.full(int(characters.max(initial=0)) + 1, -1, np.int64)
        for symbol, i in self.ids.items():
            if ord(symbol) < len(table):
                table[ord(symbol)] = i
        self.symbol = table[characters]
        place = np.arange(len(self.symbol))
        ends = np.cumsum(lengths)
        self.next = place + 1
        self.next[ends - 1] = -1
        self.previous = place - 1
        self.previous[ends - lengths] = -1
        self.weight = np.repeat(frequencies, lengths)
        self.counts = np.bincount(self.symbol, self.weight, len(self.symbols)).astype(np.int64)
        self.total = int(self.counts.sum())

    def merges(self, most: int) -> Iterator[Merge]:
        """Yields up to ``most`` merges, each done before it is given; ends when none raises L."""
        for _ in range(most):
            best = self._best()
            if best is None:
                return
            yield self._merge(*best)

    def segmentation(self) -> list[tuple[str, ...]]:
        """Returns the present symbols of every word, in the order the words were given."""
        words: list[tuple[str, ...]] = []
        for start in np.flatnonzero(self.previous < 0):
            word, place = [], int(start)
            while place >= 0:
                word.append(self.symbols[self.symbol[place]])
                place = int(self.next[place])
            if self.symbol[start] >= 0:
                words.append(tuple(word))
        return words

    # The best pair

    def _best(self) -> tuple[int, float] | None:
        """Returns the slot of the pair with the greatest gain, and that gain, or None if no gain is above 0."""
        if not len(self.n):
            return None
        # What led last time, and the most frequent pair, give a gain that the best one must reach.
        leaders = [slot for slot, a in self._leaders if slot < len(self.a) and self.a[slot] == a]
        trial = np.unique([*leaders, int(self.n.argmax())])
        low = max(0.0, float(self._gains(trial).max()))
        slots = np.flatnonzero(self.n >= max(self.min_frequency, self._rarest(low)))
        if not len(slots):
            return None
        gains = self._gains(slots)
        order = np.argsort(-gains, kind="stable")[:8]
        self._leaders = [(int(slots[i]), int(self.a[slots[i]])) for i in order]
        best = float(gains[order[0]])
        if not best > NO_GAIN:
            return None
        tied = slots[gains == best]
        return min((int(s) for s in tied), key=lambda s: (-self._true_count(s), *self._pair(s))), best

    def _rarest(self, gain: float) -> int:
        """Returns a count below which no pair can gain as much."""
        if gain <= 0:
            return 1
        low, high = 1, self.total
        while low < high:
            middle = (low + high) // 2
            if middle * (1 + np.log(self.total / middle)) * (1 + 1e-9) >= gain:
                high = middle
            else:
                low = middle + 1
        return low

    def _gains(self, slots: np.ndarray) -> np.ndarray:
        """Returns the exact gains, in nats, and -inf where the pair is too rare."""
        n = self.n[slots].copy()
        same = self.a[slots] == self.b[slots]
        for i in np.flatnonzero(same):
            n[i] = self._true_count(int(slots[i]))
        gains = np.full(len(slots), -np.inf)
        keep = n >= self.min_frequency
        n, slots, same = n[keep].astype(np.float64), slots[keep], same[keep]
        a, b = self.counts[self.a[slots]].astype(np.float64), self.counts[self.b[slots]].astype(np.float64)
        taken = np.where(same, 2 * n, n)
        lost = _fall(a, taken) + np.where(same, 0.0, _fall(b, n))
        gains[keep] = n * np.log(n) + lost - _fall(np.full_like(n, self.total), n)
        return gains

    def _true_count(self, slot: int) -> int:
        """Returns how often a pair can be merged; of (a, a) the places overlap in a run of a."""
        raw = int(self.n[slot])
        if self.a[slot] != self.b[slot]:
            return raw
        # Places only ever disappear, and with each of them some weight, so an equal count means equal places.
        if self._exact.get(slot, (-1, 0))[0] != raw:
            self._exact[slot] = (raw, int(self.weight[self._occurrences(slot)].sum()))
        return self._exact[slot][1]

    def _occurrences(self, slot: int) -> np.ndarray:
        """Returns the places where a pair is merged, left to right."""
        a, b = self.a[slot], self.b[slot]
        places = np.sort(np.concatenate(self.places[slot]))
        after = self.next[places]
        places = places[(self.symbol[places] == a) & (after >= 0) & (self.symbol[after] == b)]
        self.places[slot] = [places]
        if a != b or len(places) < 2:
            return places
        # In a run of a, every second place.
        begins = np.ones(len(places), bool)
        begins[1:] = self.next[places[:-1]] != places[1:]
        index = np.arange(len(places))
        return places[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]

    def _pair(self, slot: int) -> tuple[str, str]:
        return self.symbols[self.a[slot]], self.symbols[self.b[slot]]

    # The merge

    def _merge(self, slot: int, gain: float) -> Merge:
        pair = self._pair(slot)
        a, b = int(self.a[slot]), int(self.b[slot])
        first = self._occurrences(slot)
        second = self.next[first]
        left, right = self.previous[first], self.next[second]
        self._remove(np.unique(np.concatenate([left[left >= 0], first, second[right >= 0]])))
        new = self._new_symbol(pair)
        self.symbol[first] = new
        self.symbol[second] = -1
        self.next[first] = right
        self.previous[right[right >= 0]] = first[right >= 0]
        n = int(self.weight[first].sum())
        self.counts[a] -= n
        self.counts[b] -= n
        self.counts[new] = n
        self.total -= n
        before = self.previous[first]
        self._add(np.unique(np.concatenate([before[before >= 0], first[self.next[first] >= 0]])))
        return Merge(pair, n, gain)

    def _new_symbol(self, pair: tuple[str, str]) -> int:
        text = "".join(pair)
        new = self.ids[text] = len(self.symbols)
        self.symbols.append(text)
        if new >= len(self.counts):
            self.counts = np.concatenate([self.counts, np.zeros(max(1024, new), np.int64)])
        # Every other pair with that union is out: its symbol is there.
        for cut in range(1, len(text)):
            key = self.ids.get(text[:cut], -1) * _KEY + self.ids.get(text[cut:], -1)
            if key in self.slots:
                self.n[self.slots[key]] = 0
        return new

    def _remove(self, starts: np.ndarray) -> None:
        """Takes the pairs that begin at these places out of the counts."""
        keys, weights = self._sums(starts)[:2]
        found = [(self.slots[key], weight) for key, weight in zip(keys.tolist(), weights.tolist()) if key in self.slots]
        if found:
            slots, lost = np.array(found, np.int64).T
            self.n[slots] = np.maximum(0, self.n[slots] - lost)

    def _add(self, starts: np.ndarray) -> None:
        """Counts the pairs that begin at these places; none of them was there before."""
        if not len(starts):
            return
        keys, weights, starts, bounds = self._sums(starts)
        wanted = np.flatnonzero(weights >= self.min_frequency)
        kept = []
        for i in wanted.tolist():
            a, b = divmod(int(keys[i]), _KEY)
            union = self.symbols[a] + self.symbols[b]
            if union not in self.ids and len(union) <= self.max_length:
                self.slots[int(keys[i])] = len(self.places)
                self.places.append([starts[bounds[i] : bounds[i + 1]]])
                kept.append(i)
        first, second = np.divmod(keys[kept], _KEY)
        self.a = np.concatenate([self.a, first])
        self.b = np.concatenate([self.b, second])
        self.n = np.concatenate([self.n, weights[kept]])
        if len(self.n) > _SMALL and (self.n >= self.min_frequency).sum() * 2 < len(self.n):
            self._compact()

    def _sums(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Groups places by the pair that begins there: keys, weights, places sorted by key, bounds of the groups."""
        keys = self.symbol[starts] * _KEY + self.symbol[self.next[starts]]
        order = np.argsort(keys, kind="stable")
        keys, starts = keys[order], starts[order]
        bounds = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.int64)
        weights = np.add.reduceat(self.weight[starts], bounds) if len(keys) else np.empty(0, np.int64)
        return keys[bounds], weights, starts, np.append(bounds, len(keys))

    def _compact(self) -> None:
        """Forgets pairs that are too rare: none of them can come back."""
        alive = np.flatnonzero(self.n >= self.min_frequency)
        self.a, self.b, self.n = self.a[alive], self.b[alive], self.n[alive]
        self.places = [self.places[i] for i in alive.tolist()]
        self.slots = {int(a) * _KEY + int(b): i for i, (a, b) in enumerate(zip(self.a, self.b))}
        self._exact.clear()
        self._leaders.clear()


def _fall(count: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Returns g(count - n) - g(count), without the cancellation of two large numbers."""
    rest = count - n
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(rest > 0, rest * np.log1p(-n / count), 0.0) - n * np.log(count)
