"""GradCache: the gradient of a loss over a whole batch, with the encoder's memory of a part of it.

A contrastive loss couples all rows of a batch, so the batch cannot be cut into parts whose gradients are added. But the
loss needs only the embeddings (Gao et al., arXiv 2101.06983, section 3): embed all parts without a graph, take the
gradient of the loss by the embeddings, then embed part after part once more, now with a graph, and push each part's
share of that gradient through it. The price is one more forward pass: 4/3 of the time where a backward pass costs two
forward passes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelwright.errors import UserError


def cached(
    encode: Callable[[Any], tuple[Tensor | None, ...]],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    module: nn.Module | None = None,
    remember: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Encodes sub-batches and returns what one call on the whole batch would, at the memory of one sub-batch.

    ``backward()`` of a loss of the result encodes each sub-batch again, in the random state and under the autocast
    of its first time, and adds the gradients to the parameters' ``.grad``. Gradients are those of the whole batch:
    exact, up to the order of sums. With ``torch.amp.GradScaler`` nothing more is needed: what arrives is scaled.

    Under ``DistributedDataParallel`` (``encode`` is the wrapper) gradients are reduced once, with the last sub-batch;
    every process must have as many sub-batches as the others. Sharded wrappers (FSDP) are untested.

    Args:
        encode: From a sub-batch to a tuple of tensors: those with a first dimension are joined along it in the order of
            the sub-batches; those without one (a scale, a bias) must not depend on the sub-batch, and their gradient is
            shared out evenly. ``None`` stays ``None``. It must depend on nothing random but torch's generators (not
            Python's, not NumPy's), and a row's result not on the other rows.
        batches: Sub-batches, of any sizes: anything that ``encode`` takes, such as dictionaries of tensors. They are
            iterated over once and kept until the result is forgotten, where they are: on the CPU if they come from
            there. Without gradients they are not kept.
        device: Where a sub-batch is moved for the time it is encoded; None leaves it where it is.
        module: The module behind ``encode``, if that is not itself one; it is searched for batch normalisation.
        remember: From a sub-batch and what ``encode`` gave for it to the sub-batch that is kept for the second pass,
            such as one that holds what a frozen part has found already. It must draw the same random numbers.

    Returns:
        What ``encode`` returns, of the same type (a tuple, a named tuple): (rows, …) and () tensors.

    Raises:
        UserError: There is no sub-batch, or a module normalises over the batch in training mode, which sees each
            sub-batch alone and twice.
        RuntimeError: In the backward pass, if it is asked for a graph of itself (``create_graph``). Nor does
            ``torch.autograd.grad`` find a way to the parameters, and says so.
    """
    iterator = iter(batches)
    kept = list(itertools.islice(iterator, 2))
    if not kept:
        raise UserError("There is nothing to encode: the list of sub-batches is empty.")
    if len(kept) == 1:
        return encode(_moved(kept[0], device))  # nothing to save: the plain forward pass
    work = _Work(encode, torch.device(device) if device is not None else None, remember)
    batches = itertools.chain(kept, iterator)
    if not torch.is_grad_enabled():
        del kept
        return work.assemble(work.first_pass(batches, keep=False))
    _refuse_batch_norm(module if module is not None else encode)
    # Autograd calls a function's backward only if an input asks for a gradient; the parameters are no inputs here.
    return work.assemble(_Cached.apply(torch.zeros((), requires_grad=True), work, batches))


@dataclass
class _Work:
    """What the second pass needs from the first."""

    encode: Callable[[Any], tuple[Tensor | None, ...]]
    device: torch.device | None
    remember: Callable[[Any, Any], Any] | None = None
    batches: list[Any] = field(default_factory=list)
    random: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)  # of each sub-batch: rows of each tensor, 0 for one without
    autocast: tuple[tuple[str, dict[str, Any]], ...] = ()
    accelerator: torch.device | None = None
    kind: Callable[[list[Tensor | None]], Any] = tuple
    absent: list[bool] = field(default_factory=list)

    def first_pass(self, batches: Iterable[Any], keep: bool) -> list[Tensor]:
        """Encodes without a graph; returns the joined tensors, those that are not None."""
        found: list[list[Tensor]] = []
        with torch.no_grad(), _no_sync(self.encode):
            for batch in batches:
                moved = _moved(batch, self.device)
                if not found:
                    self._begin(moved)
                if keep:
                    self.random.append(_random_state(self.accelerator))
                outputs = self.encode(moved)
                if keep:
                    self.batches.append(batch if self.remember is None else self.remember(batch, outputs))
                absent = [o is None for o in outputs]
                if not found:
                    self.kind, self.absent = getattr(type(outputs), "_make", tuple), absent
                elif absent != self.absent:
                    raise ValueError("encode returned None for one sub-batch and a tensor for another")
                there = [o for o in outputs if o is not None]
                self.rows.append([o.shape[0] if o.ndim else 0 for o in there])
                found.append(there)
        # Older versions of torch would hand the weights that were cast here, without a graph, to the second pass.
        torch.clear_autocast_cache()
        return [torch.cat(column) if column[0].ndim else column[0].clone() for column in map(list, zip(*found))]

    def _begin(self, batch: Any) -> None:
        device = self.device or next((t.device for t in _tensors(batch)), torch.device("cpu"))
        if device.type not in ("cpu", "meta"):
            self.accelerator = device
        self.autocast = tuple(
            (
                kind,
                {
                    "enabled": torch.is_autocast_enabled(kind),
                    "dtype": torch.get_autocast_dtype(kind),
                    "cache_enabled": torch.is_autocast_cache_enabled(),
                },
            )
            for kind in sorted({"cpu", device.type})
            if torch.amp.is_autocast_available(kind)
        )

    def second_pass(self, gradients: Sequence[Tensor]) -> None:
        """Encodes with a graph and adds the gradients to the parameters."""
        number = len(self.batches)
        starts = [0] * len(gradients)
        with _forked(self.accelerator):
            for i, (batch, state) in enumerate(zip(self.batches, self.random, strict=True)):
                shares = []
                for j, (gradient, rows) in enumerate(zip(gradients, self.rows[i], strict=True)):
                    shares.append(gradient[starts[j] : starts[j] + rows] if gradient.ndim else gradient / number)
                    starts[j] += rows
                _set_random_state(state, self.accelerator)
                with _no_sync(self.encode) if i + 1 < number else contextlib.nullcontext():
                    with torch.enable_grad(), contextlib.ExitStack() as stack:
                        for kind, keys in self.autocast:
                            stack.enter_context(torch.autocast(kind, **keys))
                        outputs = self.encode(_moved(batch, self.device))
                    pairs = [
                        (output, share)
                        for output, share in zip((o for o in outputs if o is not None), shares, strict=True)
                        if output.requires_grad
                    ]
                    if pairs:  # none where everything is frozen
                        torch.autograd.backward([p[0] for p in pairs], [p[1].to(p[0].dtype) for p in pairs])

    def assemble(self, features: Iterable[Tensor]) -> Any:
        """Puts None back where it was."""
        iterator = iter(features)
        return self.kind([None if absent else next(iterator) for absent in self.absent])


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trigger: Tensor, work: _Work, batches: Iterable[Any]) -> tuple[Tensor, ...]:
        ctx.work = work
        features = work.first_pass(batches, keep=True)
        ctx.mark_non_differentiable(*(f for f in features if not f.is_floating_point()))
        return tuple(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "GradCache has no second derivative: call backward() without create_graph, or encode the batch at once."
            )
        ctx.work.second_pass(gradients)
        return None, None, None


def _refuse_batch_norm(module: Any) -> None:
    if not isinstance(module, nn.Module):
        return
    for name, part in module.named_modules():
        # Running statistics, which evaluation mode uses, do not couple the rows.
        if isinstance(part, _BatchNorm) and part.training:
            raise UserError(
                f"The module '{name}' ({type(part).__name__}) normalises over the batch, but with GradCache it would "
                f"see each sub-batch alone, and twice: put it in evaluation mode, or let mini_batch_size be the batch."
            )


def _no_sync(encode: Any) -> contextlib.AbstractContextManager[Any]:
    return encode.no_sync() if hasattr(encode, "no_sync") else contextlib.nullcontext()


def _moved(batch: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_moved(v, device) for v in batch]
        return getattr(type(batch), "_make", type(batch))(moved)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _random_state(device: torch.device | None) -> tuple[Tensor, Tensor | None]:
    if device is None:
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device | None) -> None:
    torch.set_rng_state(state[0])
    if device is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


@contextlib.contextmanager
def _forked(device: torch.device | None) -> Iterator[None]:
    """Leaves the random state as it was."""
    state = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(state, device)
