"""Which pairs make up each step's batch, and their model inputs, prepared in the background in sub-batches."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from modelwright.errors import UserError

#: From rows (``{"query": …, "key": …}``) to model inputs.
Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]


@dataclass
class Order:
    """The rows of each step: every pass over the data is a permutation that depends on the seed and the pass alone.

    Step s of a pass takes rows s * size to (s + 1) * size of its permutation, and process r the r-th equal part of
    them: the batch is the same for any number of processes. What does not fill a batch at the end of a pass is left out
    of that pass, for a smaller batch would be another loss.

    Attributes:
        rows: Pairs of the data set.
        size: Pairs of a step, over all processes.
        seed: Seed of the permutations.
        rank: This process.
        processes: Number of processes.

    Raises:
        UserError: The data do not fill a batch, or a batch cannot be shared out evenly.
    """

    rows: int
    size: int
    seed: int = 0
    rank: int = 0
    processes: int = 1
    _passes: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"A batch must have at least 1 pair, not {self.size}.")
        if self.size % self.processes:
            raise UserError(
                f"A batch of {self.size} pairs cannot be shared evenly by {self.processes} processes: choose a "
                f"multiple of {self.processes}."
            )
        if self.rows < self.size:
            raise UserError(
                f"The data hold {self.rows} pairs, fewer than one batch of {self.size}: choose a smaller batch size or "
                f"give more data (no pair may be twice in a batch)."
            )

    @property
    def steps_per_pass(self) -> int:
        """Whole batches of one pass over the data."""
        return self.rows // self.size

    def of(self, step: int) -> np.ndarray:
        """Returns the rows of a step (from 0) over all processes: (size,) int64, no row twice."""
        epoch, within = divmod(step, self.steps_per_pass)
        return self._permutation(epoch)[within * self.size : (within + 1) * self.size]

    def share(self, step: int) -> np.ndarray:
        """Returns this process's rows of a step: (size / processes,) int64."""
        each = self.size // self.processes
        return self.of(step)[self.rank * each : (self.rank + 1) * each]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._passes:
            # Two are kept, for at the border of a pass the workers are in the next one already.
            self._passes = {k: v for k, v in self._passes.items() if k == epoch - 1}
            self._passes[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return self._passes[epoch]


class Batch:
    """One step's pairs of this process, as sub-batches that arrive while the first ones are used already.

    It is iterated over once, gives dictionaries of tensors, and keeps none of them.

    Attributes:
        step: The step (from 0).
        rows: (m,) rows of this process, in the order of the sub-batches.
        everyone: (size,) rows of all processes, in the order of the ranks.
        sizes: Pairs of each sub-batch.
    """

    def __init__(
        self, step: int, rows: np.ndarray, everyone: np.ndarray, sizes: list[int], parts: Iterator[dict[str, Tensor]]
    ) -> None:
        self.step, self.rows, self.everyone, self.sizes = step, rows, everyone, sizes
        self._coming, self._left = parts, len(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __contains__(self, name: object) -> bool:
        return False  # ``Trainer`` asks for labels; without this, Python would look for them by iterating

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self._left:
            self._left -= 1
            yield next(self._coming)


class Batches:
    """The batches of a run, a pass at a time, each a :class:`Batch`: what ``Trainer`` takes for a data loader.

    The sub-batches of all steps are one stream, so worker processes go on preparing across the border of a step and of
    a pass. Memory holds one step's sub-batches of model inputs and ``4 * workers`` more; 65,536 pictures of 224 x 224
    pixels are 39 GB in float32. Random transforms of the data must depend on the row, not on a generator's state, if a
    resumed run is to repeat them.

    Args:
        data: The pairs: ``rows(indices)`` or single items by index.
        collate: Makes a sub-batch's model inputs; must be picklable if there are workers.
        order: Which rows.
        mini_batch_size: Pairs of a sub-batch; the last of a step may have fewer.
        steps: Steps in all; by default those of one pass.
        start: First step, counted from the first pass; a pass that it lies in is cut short.
        workers: Processes that prepare; 0 prepares here, when asked.
        pin: Whether tensors go to page-locked memory, from which a GPU copies faster.
    """

    def __init__(
        self,
        data: Any,
        collate: Collate,
        order: Order,
        *,
        mini_batch_size: int,
        steps: int | None = None,
        start: int = 0,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        if mini_batch_size < 1:
            raise UserError(f"mini_batch_size must be at least 1, not {mini_batch_size}.")
        self.data, self.collate, self.order = data, collate, order
        self.mini_batch_size, self.workers, self.pin = mini_batch_size, workers, pin
        self.begin(start, order.steps_per_pass if steps is None else steps)

    def begin(self, start: int, steps: int) -> None:
        """Goes to step ``start``, and will stop before step ``steps``."""
        self._next, self.steps = start, steps
        self._coming = self._stream(start)

    def __len__(self) -> int:
        return self.order.steps_per_pass

    def __iter__(self) -> Iterator[Batch]:
        within = self._next % len(self)
        for _ in range(min(len(self) - within, self.steps - self._next)):
            self._next += 1
            yield next(self._coming)

    def _stream(self, start: int) -> Iterator[Batch]:
        indices = (part.tolist() for step in range(start, self.steps) for part in self._cut(self.order.share(step)))
        parts = prepared(self.data, self.collate, indices, workers=self.workers, pin=self.pin)
        for step in range(start, self.steps):
            rows = self.order.share(step)
            batch = Batch(step, rows, self.order.of(step), [len(p) for p in self._cut(rows)], parts)
            yield batch
            for _ in batch:  # the stream goes on with the next step, whatever was used of this one
                pass

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[i : i + self.mini_batch_size] for i in range(0, len(rows), self.mini_batch_size)]


def prepared(
    data: Any, collate: Collate, indices: Iterable[list[int]], *, workers: int = 0, pin: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yields the model inputs of one list of rows after the other, prepared by ``workers`` processes ahead of time.

    Raises:
        UserError: A row cannot be read, also where a worker found that out.
    """
    loader = DataLoader(
        _Prepared(data, collate),
        batch_sampler=indices,  # any iterable of lists will do
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # or the loader would draw from the generator that dropout draws from
    )
    for found in loader:
        if isinstance(found, UserError):
            raise found
        yield found


class _Prepared(Dataset[Any]):
    def __init__(self, data: Any, collate: Collate) -> None:
        self.data, self.collate = data, collate

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return self.collate(read(self.data, indices))
        except UserError as error:
            return error  # raised in a worker it would arrive wrapped in a traceback


def read(data: Any, indices: Sequence[int]) -> list[Any]:
    """Returns rows of a data set by their numbers."""
    if hasattr(data, "rows"):
        return data.rows(indices)
    return [data[int(i)] for i in indices]


def _as_it_is(value: Any) -> Any:
    return value


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends training after the step, which still needs its data


def take(
    parts: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[int],
    positions: Sequence[int],
    padding: Mapping[str, int],
    *,
    left: bool = False,
) -> dict[str, Tensor]:
    """Gathers pairs out of prepared sub-batches into one.

    Args:
        parts: Sub-batches of model inputs; first dimension the pair, or k rows to a pair (hard negatives).
        sizes: Pairs of each sub-batch.
        positions: Pairs to take, counted through all sub-batches.
        padding: What to fill up token sequences with, by the end of the input's name (``input_ids``); 0 where it says
            nothing, which suits masks. Sequences are filled up to the longest of those that are taken from.
        left: Whether to fill up on the left.
    """
    ends = np.cumsum(sizes)
    found = [
        (int(i), int(p - (ends[i] - sizes[i]))) for p, i in zip(positions, np.searchsorted(ends, positions, "right"))
    ]
    result = {}
    for name in parts[0]:
        pieces = []
        for i, within in found:
            each = parts[i][name].shape[0] // sizes[i]
            pieces.append(parts[i][name][within * each : (within + 1) * each])
        if pieces[0].ndim == 2:
            width = max(p.shape[1] for p in pieces)
            fill = next((v for k, v in padding.items() if name.endswith(k)), 0)
            pieces = [_widened(p, width, fill, left) for p in pieces]
        result[name] = torch.cat(pieces)
    return result


def _widened(tensor: Tensor, width: int, fill: int, left: bool) -> Tensor:
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if left else (0, missing), value=fill) if missing else tensor
