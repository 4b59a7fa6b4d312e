"""A stream of blocks from several sources whose shares are exact in tokens at every point, not on average.

Each source is cut into blocks of ``block_size`` tokens. An epoch is a fixed sequence of sources (so many of each as its
rate says), interleaved so that after any number of blocks each source is less than one block away from its share. What
the n-th block of a source is, follows from the seed, the epoch and n. So block i of the stream is a function of i
alone: resuming needs the position, and ranks take turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modelwright.errors import UserError, did_you_mean
from modelwright.training.packing import TokenStream, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Rates are kept as whole millionths, so that shares are exact.
_UNIT = 1_000_000
#: Epoch whose generator chooses the blocks of a source that is not drawn anew: none that is reached.
_FIXED = 2**32 - 1


def check_rates(rates: Mapping[str, float], sources: Iterable[str]) -> dict[str, float]:
    """Returns the rates above 0, checked.

    Raises:
        UserError: A rate is negative or names no source, or they do not sum to 1.
    """
    sources = list(sources)
    for name, rate in rates.items():
        if name not in sources:
            raise UserError(f"The mixture has no source '{name}': {did_you_mean(name, sources)}")
        if not (rate >= 0 and math.isfinite(rate)):
            raise UserError(f"The rate of '{name}' must be 0 or more, not {rate}.")
    total = math.fsum(rates.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"The rates of the mixture must sum to 1, but {_written(rates)} sum to {total:g}.")
    return {name: rate for name, rate in rates.items() if rate > 0}


def interleave(rates: Sequence[float], length: int) -> np.ndarray:
    """Returns which source each of ``length`` blocks comes from, by token credit.

    After t blocks a source has between ``floor(rate t)`` and ``ceil(rate t)`` of them: its j-th block may come once
    ``rate t`` has passed j - 1, and must have come before ``rate t`` passes j; of those that may, the one that must
    come soonest is taken. (This is scheduling of periodic unit tasks on one machine by earliest deadline, which never
    fails as long as the rates sum to 1.)

    Args:
        rates: Positive, summing to 1.
        length: Blocks.

    Returns:
        int32, shape ``(length,)``.
    """
    weights = _millionths(rates)
    found = np.zeros(length, dtype=np.int32)
    taken = [0] * len(weights)
    deadlines = [-(-_UNIT // w) for w in weights]
    sources = range(len(weights))
    for t in range(length):
        may = [s for s in sources if taken[s] * _UNIT < weights[s] * (t + 1)]
        source = min(may, key=deadlines.__getitem__)
        found[t] = source
        taken[source] += 1
        deadlines[source] = -(-(taken[source] + 1) * _UNIT // weights[source])
    return found


def _millionths(rates: Sequence[float]) -> list[int]:
    """Rates as whole numbers that sum to a million; what rounding leaves goes to the largest remainders."""
    exact = [rate * _UNIT for rate in rates]
    whole = [max(1, math.floor(value + 1e-6)) for value in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: whole[i] - exact[i])
    left = _UNIT - sum(whole)
    for i in range(abs(left)):
        whole[by_remainder[i % len(whole)] if left > 0 else int(np.argmax(whole))] += 1 if left > 0 else -1
    return whole


class Mixture(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The stream as a dataset with positions, for a sequential sampler: item i is block i, whatever the epoch.

    With one source at rate 1 and all its blocks in an epoch, it is exactly
    :class:`~modelwright.training.packing.PackedBlocks`.

    Args:
        sources: Name to (tokens,) integers.
        rates: Name to share of the tokens; must sum to 1. A source without a rate is not used.
        tokens_per_epoch: Tokens of an epoch, rounded down to whole blocks.
        block_size: Tokens a block.
        resample: Sources whose blocks are drawn anew, without replacement, for each epoch ("data-dynamic"). The others
            keep those drawn once ("data-fixed"). The order changes with the epoch in both cases.
        seed: Seed of the draws and the order.
        length: Items in all; an epoch by default.

    Attributes:
        blocks_per_epoch: Blocks of an epoch.
        pattern: int32, (blocks_per_epoch,): the source of each, as index into :attr:`names`.
        counts: Source to its blocks in an epoch.

    Raises:
        UserError: Rates that make no sense, a source with a rate and less than a block of tokens, or no block at all.
    """

    def __init__(
        self,
        sources: Mapping[str, np.ndarray],
        rates: Mapping[str, float],
        *,
        tokens_per_epoch: int,
        block_size: int,
        resample: Iterable[str] = (),
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        rates = check_rates(rates, sources)
        if block_size < 1:
            raise UserError(f"block_size must be at least 1, not {block_size}.")
        self.blocks_per_epoch = tokens_per_epoch // block_size
        if self.blocks_per_epoch < 1:
            raise UserError(
                f"An epoch of {tokens_per_epoch:,} tokens is less than one block of {block_size}: give more tokens, or "
                f"a smaller block size."
            )
        self.names, self.block_size, self.seed = list(rates), block_size, seed
        self.resample = set(resample)
        for name in self.resample - set(sources):
            raise UserError(f"The mixture has no source '{name}' to draw anew: {did_you_mean(name, sources)}")
        self.blocks = [self._cut(name, sources[name]) for name in self.names]
        self.pattern = interleave(list(rates.values()), self.blocks_per_epoch)
        of_epoch = np.bincount(self.pattern, minlength=len(self.names))
        self.counts = {name: int(n) for name, n in zip(self.names, of_epoch)}
        self._place = np.empty(self.blocks_per_epoch, dtype=np.int64)  # among the blocks of its source
        for s, n in enumerate(of_epoch):
            self._place[self.pattern == s] = np.arange(n)
        self.length = self.blocks_per_epoch if length is None else length
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def _cut(self, name: str, tokens: np.ndarray) -> np.ndarray:
        blocks = len(tokens) // self.block_size
        if blocks == 0:
            raise UserError(
                f"The source '{name}' has a rate, but {f'only {len(tokens)}' if len(tokens) else 'no'} tokens, less "
                f"than one block of {self.block_size}: give it data, or the rate 0."
            )
        return np.asarray(tokens[: blocks * self.block_size]).reshape(blocks, self.block_size)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of an epoch, in whole blocks."""
        return self.blocks_per_epoch * self.block_size

    def report(self, epochs: int = 1) -> dict[str, dict[str, float]]:
        """Returns, by source: ``share`` of the tokens, ``tokens`` an epoch, ``available`` tokens, ``passes`` in all."""
        found = {}
        for name, blocks in zip(self.names, self.blocks):
            found[name] = {
                "share": self.counts[name] / self.blocks_per_epoch,
                "tokens": self.counts[name] * self.block_size,
                "available": len(blocks) * self.block_size,
                "passes": round(epochs * self.counts[name] / len(blocks), 3),
            }
        return found

    def largest(self) -> int:
        """Returns the largest token of the first 16 million of each source."""
        rows = max(1, (1 << 24) // self.block_size)
        return max(int(blocks[:rows].max()) for blocks in self.blocks)

    def take(self, length: int) -> Mixture:
        """Sets the number of items, and returns itself."""
        self.length = length
        return self

    def __len__(self) -> int:
        return self.length

    def source(self, index: int) -> str:
        """Returns the source of block ``index``."""
        return self.names[self.pattern[index % self.blocks_per_epoch]]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns a batch: ``input_ids`` and ``labels``, the same (len(indices), block_size) int64 tensor."""
        rows = np.empty((len(indices), self.block_size), dtype=np.int64)
        for i, index in enumerate(indices):
            epoch, at = divmod(index, self.blocks_per_epoch)
            source = self.pattern[at]
            rows[i] = self.blocks[source][self._orders(epoch)[source][self._place[at]]]
        ids = torch.from_numpy(rows)
        return {"input_ids": ids, "labels": ids}

    def _orders(self, epoch: int) -> list[np.ndarray]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, [self._order(epoch, s) for s in range(len(self.names))])
        return self._epoch[1]

    def _order(self, epoch: int, source: int) -> np.ndarray:
        """The blocks of a source in an epoch, in their order."""
        there, wanted = len(self.blocks[source]), self.counts[self.names[source]]
        # The first source has the generator of PackedBlocks, so that one source alone is the plain run.
        more = (source,) if source else ()
        draw = np.random.default_rng((self.seed, epoch, *more))
        dynamic = self.names[source] in self.resample
        if dynamic and wanted <= there:
            return draw.permutation(there)[:wanted]
        # Whole passes and a part: a source smaller than its share is repeated within the epoch.
        whole, rest = divmod(wanted, there)
        part = (draw if dynamic else np.random.default_rng((self.seed, _FIXED, *more))).permutation(there)[:rest]
        chosen = np.concatenate([np.tile(np.arange(there), whole), np.sort(part)])
        return chosen[draw.permutation(wanted)]


class MixtureDataset(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """A :class:`Mixture` that a ``Trainer`` or a ``DataLoader`` can iterate, an epoch at a time.

    ``Trainer`` (which calls :meth:`set_epoch`) gives the processes of a distributed run parts of each batch by itself;
    in a loop of one's own, give each process :meth:`shard`. With several workers of a ``DataLoader`` the blocks are the
    same, in another order. One item is ``input_ids`` and ``labels``, both int64, (block_size,).

    Example:
        ``MixtureDataset({"domain": good, "code": code}, {"domain": .82, "code": .18}, tokens_per_epoch=5_000_000,
        tokenizer=tokenizer, resample=["domain"])``

    Args:
        sources: Name to tokens (an integer array or :class:`~modelwright.training.packing.TokenStream`), or to texts: a
            list, or a ``datasets.Dataset`` with the column ``text``.
        rates: As for :class:`Mixture`, with the rest.
        tokens_per_epoch: Tokens of an epoch.
        block_size: Tokens a block.
        resample: Sources drawn anew for each epoch.
        seed: Seed.
        tokenizer: Needed where a source is texts.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        rates: Mapping[str, float],
        *,
        tokens_per_epoch: int,
        block_size: int = 512,
        resample: Iterable[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.mixture = Mixture(
            {name: _as_tokens(name, source, tokenizer) for name, source in sources.items()},
            rates,
            tokens_per_epoch=tokens_per_epoch,
            block_size=block_size,
            resample=resample,
            seed=seed,
        )
        self.epoch = self.position = self._start = 0
        self.rank, self.world_size = 0, 1

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.mixture.block_size

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch (from 0), unless a state within it was loaded."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def shard(self, rank: int, world_size: int) -> MixtureDataset:
        """Returns the part of one process: every ``world_size``-th block from ``rank`` on."""
        if not 0 <= rank < world_size:
            raise UserError(f"The rank must lie between 0 and {world_size - 1} (world_size - 1), not {rank}.")
        part = MixtureDataset.__new__(MixtureDataset)
        part.__dict__ = {**self.__dict__, "rank": rank, "world_size": world_size}
        return part

    def state_dict(self) -> dict[str, int]:
        """Returns where the stream is: epoch and blocks of it that were given out (of all processes together)."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Lets the next iteration continue where :meth:`state_dict` was taken."""
        self.epoch, self.position, self._start = state["epoch"], state["position"], state["position"]

    def __len__(self) -> int:
        """Blocks of an epoch that this process gets."""
        return len(range(self.rank, self.mixture.blocks_per_epoch, self.world_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        n = self.mixture.blocks_per_epoch
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        start, self._start = self._start + self.rank + first * self.world_size, 0
        for at in range(start, n, self.world_size * step):
            self.position = at - self.rank + self.world_size
            yield self.mixture[self.epoch * n + at]


def _as_tokens(name: str, source: Any, tokenizer: PreTrainedTokenizerBase | None) -> np.ndarray:
    if isinstance(source, TokenStream):
        return source.tokens
    if isinstance(source, np.ndarray) and np.issubdtype(source.dtype, np.integer):
        return source
    if tokenizer is None:
        raise UserError(f"The source '{name}' is text: give the tokenizer that reads it.")
    if "text" in getattr(source, "column_names", ()):
        source = source["text"]
    return tokenize(source, tokenizer).tokens


def warn_of_repeats(mixture: Mixture, epochs: int, most: float = 4.0) -> list[str]:
    """Returns a sentence for each source that is seen more often than is known to be harmless (four times)."""
    return [
        f"The source '{name}' is seen {numbers['passes']:.1f} times: beyond {most:g} times a model learns less from "
        f"it, and begins to learn it by heart."
        for name, numbers in mixture.report(epochs).items()
        if numbers["passes"] > most
    ]


def _written(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())


__all__ = ["Mixture", "MixtureDataset", "check_rates", "interleave", "warn_of_repeats"]
