"""Contrastive losses over the rows of several processes: the keys travel round a ring, the matrix exists nowhere.

Paper section 3.2 ("multi-level tiling") with two changes. Both directions of the loss come out of one ring: a block of
keys travels together with the running logsumexp of its columns, and after as many hops as there are processes both are
home. And the gradient of the scale is averaged over the processes instead of summed, so that it is that of one process.

A rank sends what its neighbour needs next *before* it computes, so the transfer hides behind the tiles. Keys are read
only and run one hop ahead; what is added up on the way (the columns' logsumexp, the keys' gradient) can only leave when
the tiles are done, so it follows one hop behind its keys and is needed only after the next tiles. Each rank holds its
own rows, two buffers of keys and three of what is added up: O(rows per rank), whatever the number of ranks.

The ranks must hold equally many rows: the loss of the group is then the mean of the ranks' losses. Each rank's loss is
the mean over its own rows, and its backward pass carries the gradients of *all* ranks' losses with respect to its rows:
``n`` times the gradient of the group's loss. ``DistributedDataParallel`` divides by ``n``. Every rank must call
backward, or none.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modelwright.errors import UserError

PATIENCE = 30.0
"""Seconds a rank on the CPU waits for a neighbour in a hop, besides ten times its own computation and the transfer.

All ranks have met just before, so a neighbour that takes longer is gone. Waiting for gloo to say so is not enough: it
reports a lost peer at once for a message that has not begun, but may wait out the group's time limit, 30 minutes by
default, for one that is half-way through. On a GPU the group's own time limit holds: a wait there does not stop the
host.
"""

_SLOWEST_BYTES_PER_SECOND = 1e7

_Group = Any  # ProcessGroup; torch's stubs do not name it where torch.distributed is not built in.


def group_size(group: _Group | None) -> int:
    """Returns how many processes a group has; 1 for None, and then nothing here calls a collective."""
    return 1 if group is None else dist.get_world_size(group)


def ring_softmax(
    q: Tensor, k: Tensor, group: _Group | None, *, backend: str, columns: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns the logsumexp over all ranks' keys for the local rows, and over all ranks' queries for the local columns.

    Differentiable in ``q`` and ``k``; see the module's docstring for what the gradient means.

    Args:
        q: (m, d) float32 or float64, the local queries times the scale.
        k: (n, d) the local keys. A narrower floating type than ``q``'s travels as it is and is widened on arrival.
        group: The processes; None is this process alone.
        backend: ``"torch"`` or ``"triton"``.
        columns: Whether the second result is wanted.
        options: Of the backend's sweeps: ``block_size``, and for Triton ``precision``.

    Returns:
        ``row_lse`` (m,) and ``col_lse`` (n,), the latter None without ``columns``; both in ``q``'s dtype.

    Raises:
        UserError: The ranks' shapes, dtypes or options differ (raised on every rank), or a rank has ended.
    """
    ring = _Ring.of(group)
    ring.check_alike("softmax with columns" if columns else "softmax", q, k)
    rows, cols = _RingSoftmax.apply(q, k, ring, _sweeps(backend), options, columns)
    return rows, cols if columns else None


def ring_sigmoid(q: Tensor, k: Tensor, bias: Tensor, group: _Group | None, *, backend: str, **options: Any) -> Tensor:
    """Returns the sum of SigLIP's terms over the local rows against all ranks' keys; positives are the local diagonal.

    The gradients are made during the forward sweep (one computation of every tile) and the keys' share travels home
    with them, for a unit weight of every rank's sum. The weights that arrive in the backward pass must therefore be the
    same on every rank, as they are when each divides by its number of rows; that is checked.

    Args:
        q: (m, d) float32 or float64, the local queries times the scale.
        k: (m, d) the local keys. A narrower floating type than ``q``'s travels as it is and is widened on arrival.
        bias: One-element tensor. Its gradient is that of the local sum: pass it through :func:`average_gradient` first.
        group: The processes; None is this process alone.
        backend: ``"torch"`` or ``"triton"``.
        options: Of the backend's sweeps: ``block_size``, and for Triton ``precision``.

    Returns:
        A scalar in ``q``'s dtype.

    Raises:
        UserError: The ranks' shapes, dtypes or options differ, or in backward their weights (on every rank), or a rank
            has ended.
    """
    ring = _Ring.of(group)
    ring.check_alike("sigmoid", q, k, bias)
    needs = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or bias.requires_grad)
    total: Tensor = _RingSigmoid.apply(q, k, bias, ring, _sweeps(backend), options, needs)
    return total


def average_gradient(scale: Tensor, group: _Group | None) -> Tensor:
    """Returns ``scale`` itself; in the backward pass its gradient becomes the mean over the group's ranks.

    A scale (or bias) multiplies the local rows only, so each rank sees only its share of the gradient. The mean is the
    gradient that one process with all rows would find, it is the same on every rank, and averaging once more in
    ``DistributedDataParallel`` leaves it alone. (The paper's code sums, which gives ``n`` times as much: harmless with
    Adam, not with SGD or clipping by norm.)
    """
    if group_size(group) == 1:
        return scale
    averaged: Tensor = _AverageGradient.apply(scale, _Ring.of(group))
    return averaged


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a graph of the gradient; torch's ``once_differentiable`` is silent where what arrives is constant."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("The losses over several processes have no second derivative: leave out create_graph.")
        return backward(ctx, *gradients)

    return wrapped


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, ring: _Ring) -> Tensor:
        ctx.ring = ring
        return scale.view_as(scale)

    @staticmethod
    @_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Never summed in half precision; and gloo has no AVG.
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        with ctx.ring.answering():
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=ctx.ring.group)
        return (total / ctx.ring.size).to(gradient.dtype), None


class _RingSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, ring: _Ring, sweeps: ModuleType, options: dict[str, Any], columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        row_lse = torch.full((q.shape[0],), -torch.inf, dtype=q.dtype, device=q.device)

        def hop(number: int, keys: Tensor) -> Tensor | None:
            rows, cols = sweeps.softmax_sweep(q, keys.to(q.dtype), columns=columns, **options)
            # logaddexp(-inf, x) is x, and -inf for two of them, so "nothing yet" needs no case of its own.
            torch.logaddexp(row_lse, rows, out=row_lse)
            return cols

        col_lse = ring.circulate([k.contiguous()], hop, torch.logaddexp)
        ctx.ring, ctx.sweeps, ctx.options, ctx.columns = ring, sweeps, options, columns
        ctx.save_for_backward(q, k, row_lse, col_lse)
        return row_lse, col_lse

    @staticmethod
    @_once
    def backward(ctx: Any, row_grad: Tensor, col_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, row_lse, col_lse = ctx.saved_tensors
        dq = torch.zeros_like(q)

        def hop(number: int, keys: Tensor, *column: Tensor) -> Tensor:
            queries, part = ctx.sweeps.softmax_sweep_backward(
                q, keys.to(q.dtype), row_lse, row_grad.contiguous(), *column, **ctx.options
            )
            dq.add_(queries)
            return part

        ctx.ring.meet(q)
        travelling = [k.contiguous()]
        if ctx.columns:
            assert col_grad is not None
            travelling += [col_lse, col_grad.contiguous()]
        dk = ctx.ring.circulate(travelling, hop, _add)
        assert dk is not None
        return dq, dk.to(k.dtype), None, None, None, None


class _RingSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        bias: Tensor,
        ring: _Ring,
        sweeps: ModuleType,
        options: dict[str, Any],
        gradients: bool,
    ) -> Tensor:
        total = q.new_zeros(())
        dq = torch.zeros_like(q) if gradients else None
        dbias = q.new_zeros(()) if gradients else None

        def hop(number: int, keys: Tensor) -> Tensor | None:
            part, queries, dk, db = sweeps.sigmoid_sweep(
                q,
                keys.to(q.dtype),
                bias.detach().to(q.dtype),
                diagonal=number == 0,
                gradients=gradients,
                **options,
            )
            total.add_(part)
            if dq is not None and dbias is not None:
                dq.add_(queries)
                dbias.add_(db.reshape(()))
            return dk

        dk = ring.circulate([k.contiguous()], hop, _add)
        ctx.ring, ctx.key_dtype = ring, k.dtype
        # Not narrowed before it is weighted: the sum over a large batch is beyond what float16 holds.
        ctx.save_for_backward(dq, dk, dbias, bias)
        return total

    @staticmethod
    @_once
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dbias, bias = ctx.saved_tensors
        ctx.ring.check_weights(weight)
        dk, dbias = (weight * dk).to(ctx.key_dtype), (weight * dbias).to(bias.dtype).reshape(bias.shape)
        return weight * dq, dk, dbias, *[None] * 4


@dataclass(frozen=True)
class _Ring:
    """This process's place in a group; with one process no method communicates."""

    group: _Group | None
    size: int
    rank: int = 0
    following: int = 0  # global ranks, which is what point-to-point operations address
    previous: int = 0

    @staticmethod
    def of(group: _Group | None) -> _Ring:
        if group_size(group) == 1:
            return _Ring(None, 1)
        assert group is not None
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if rank < 0:
            raise UserError(
                "This process is not a member of the process group that was given for the contrastive loss."
            )
        following, previous = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        return _Ring(group, size, rank, following, previous)

    def circulate(
        self,
        travelling: Sequence[Tensor],
        hop: Callable[..., Tensor | None],
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor | None:
        """Runs ``hop(number, *tensors)`` on every rank's tensors, the own first, and brings home what the hops add up.

        Args:
            travelling: This rank's tensors, contiguous; they are read, never written.
            hop: Called with 0, 1, … and the tensors of rank ``rank - number``; returns what this rank adds for their
                owner, or always None.
            merge: Joins what has been added up so far (which it must leave as it is) with this rank's part.

        Returns:
            For this rank's own tensors: the parts of all ranks merged, its own first, then in the order of the ring.
        """
        here, spare = list(travelling), None
        sum_so_far: Tensor | None = None  # of the tensors that have just been sent on
        for number in range(self.size):
            last = number == self.size - 1
            coming = [] if last else spare or [torch.empty_like(t) for t in here]
            added = None if sum_so_far is None else torch.empty_like(sum_so_far)
            with self.answering():
                under_way = self._exchange(
                    ([] if last else here) + ([] if sum_so_far is None else [sum_so_far]),
                    coming + ([] if added is None else [added]),
                )
            start = time.monotonic()
            part = hop(number, *here)
            seconds = time.monotonic() - start
            self._wait(under_way, [*here, part], seconds)
            if part is not None:
                sum_so_far = part if added is None else merge(added, part)
            # The tensors of the first hop are the caller's: not to be received into.
            here, spare = coming, (here if number else None)
        if sum_so_far is None or self.size == 1:
            return sum_so_far
        home = torch.empty_like(sum_so_far)
        with self.answering():
            under_way = self._exchange([sum_so_far], [home])
        self._wait(under_way, [home], seconds)
        return home

    def check_alike(self, what: str, q: Tensor, k: Tensor, *more: Tensor) -> None:
        """Refuses, on every rank, a group whose ranks are about to do different things.

        On every call, not once for every shape: when one rank has a shape that it has seen and another has a new one, a
        rank that relied on its memory would enter the ring while the other asks.
        """
        if self.size == 1:
            return
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, *more))
        mine = torch.tensor(
            [_LOSSES.index(what), *q.shape, *k.shape, _DTYPES.index(q.dtype), _DTYPES.index(k.dtype), gradient],
            device=q.device,
        )
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self.answering():
            dist.all_gather(everyone, mine, group=self.group)
        found = torch.stack(everyone).tolist()
        if empty := [str(rank) for rank, one in enumerate(found) if not one[1] or not one[3]]:
            raise UserError(
                f"A contrastive loss needs at least one pair on every process, and rank {', '.join(empty)} of "
                f"{self.size} has none: drop a last batch that is not full."
            )
        if any(one != found[0] for one in found):
            said = "; ".join(f"rank {rank} has {_describe(*one)}" for rank, one in enumerate(found))
            raise UserError(
                "The processes of a group must bring rows of the same number, width and type to the same loss; drop or "
                f"fill up a batch that is smaller than the others: {said}."
            )

    def meet(self, like: Tensor) -> None:
        """Waits until all ranks are here, so that from now on the patience of a hop is enough."""
        if self.size > 1 and like.device.type == "cpu":
            with self.answering():
                dist.all_reduce(torch.zeros(1), group=self.group)

    def check_weights(self, weight: Tensor) -> None:
        """Refuses, on every rank, weights of the ranks' sums that differ."""
        if self.size == 1:
            return
        everyone = [torch.empty_like(weight) for _ in range(self.size)]
        with self.answering():
            dist.all_gather(everyone, weight.contiguous(), group=self.group)
        weights = torch.stack(everyone)
        if not torch.allclose(weights, weights[:1], rtol=1e-6, atol=0.0, equal_nan=True):
            raise UserError(
                "The sigmoid loss over a process group needs the same weight on every rank, because the keys' "
                f"gradients were added up on their way, but the weights are {weights.tolist()}: scale the loss equally."
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turns what a backend raises when a peer is gone into one sentence."""
        try:
            yield
        except RuntimeError as error:  # gloo raises it bare; NCCL's DistBackendError is one
            if isinstance(self.group, dist.ProcessGroup) and dist.get_backend(self.group) == "gloo":
                atexit.register(_leave)
            # Its first sentence, without the place in its source.
            reason = re.sub(r"^\[[^\]]*\] ", "", str(error).strip()).split("\n")[0].split(". ")[0]
            raise UserError(
                f"A process of the group has ended or does not answer, found rank {self.rank} of {self.size} "
                f"({reason}): see what that process printed last, and start all of them again."
            ) from error

    def _exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Any]:
        if self.size == 1 or not sent:
            return []
        operations = [dist.P2POp(dist.isend, t, self.following, self.group) for t in sent]
        operations += [dist.P2POp(dist.irecv, t, self.previous, self.group) for t in received]
        works: list[Any] = dist.batch_isend_irecv(operations)
        return works

    def _wait(self, works: Sequence[Any], tensors: Sequence[Tensor | None], seconds: float) -> None:
        held = [t for t in tensors if t is not None]
        with self.answering():
            for work in works:
                if held[0].device.type != "cpu":
                    work.wait()
                    continue
                transfer = sum(t.numel() * t.element_size() for t in held) / _SLOWEST_BYTES_PER_SECOND
                work.wait(timedelta(seconds=PATIENCE + 10 * seconds + transfer))


def _leave() -> None:
    """Ends gloo's threads, when a peer was lost, before the interpreter ends.

    A thread of gloo that drops its last tensor while Python is being finalised asks for Python's lock, is unwound by it
    and takes the process with it ("terminate called without an active exception"): exit code -6 after a clear message.
    """
    with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # whoever made the group may have ended it
        if dist.is_initialized():
            dist.destroy_process_group()


def _add(sum_so_far: Tensor, part: Tensor) -> Tensor:
    return part.add_(sum_so_far)


_LOSSES = ("softmax", "softmax with columns", "sigmoid")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _describe(what: int, m: int, d: int, n: int, d_k: int, q: int, k: int, gradient: int) -> str:
    names = [str(_DTYPES[i]).removeprefix("torch.") for i in (q, k)]
    return (
        f"{m} × {d} queries ({names[0]}), {n} × {d_k} keys ({names[1]}), {_LOSSES[what]}"
        f"{' with' if gradient else ' without'} gradient"
    )


def _sweeps(backend: str) -> ModuleType:
    """Imported where needed: Triton is an optional package."""
    if backend == "triton":
        from modelwright.kernels import pair_tiles_triton

        return pair_tiles_triton
    from modelwright.kernels import pair_tiles

    return pair_tiles
