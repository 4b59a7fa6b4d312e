"""Seconds and extra memory of a contrastive loss, forward and backward, in a process of its own.

A process starts with the features made and a tiny loss run; the extra memory is the peak of resident memory above that,
so it holds gradients and whatever the loss needs, but not the features themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modelwright.errors import UserError
from modelwright.training.inf_cl.loss import tiled_contrastive_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_matrix(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The plain way: all logits, cross-entropy over rows and over columns."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def row_chunks(size: int) -> Loss:
    """The simple way to save memory: rows in chunks, and each chunk's logits made again in the backward pass."""

    def part(rows: Tensor, keys: Tensor, scale: Tensor, start: int) -> Tensor:
        labels = torch.arange(start, start + len(rows), device=rows.device)
        return F.cross_entropy(scale * rows @ keys.T, labels, reduction="sum")

    def loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        total = images.new_zeros(())
        for rows, keys in ((images, texts), (texts, images)):
            for start in range(0, len(rows), size):
                total = total + checkpoint(part, rows[start : start + size], keys, scale, start, use_reentrant=False)
        return total / (2 * len(images))

    return loss


def two_calls(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Tiles, but each direction swept on its own: what the paper's code does."""
    there = tiled_contrastive_loss(images, texts, scale, symmetric=False)
    return (there + tiled_contrastive_loss(texts, images, scale, symmetric=False)) / 2


def make_loss(variant: str) -> Loss:
    """Returns the loss of a variant: ``full``, ``tiled``, ``two-calls`` or ``chunks-SIZE``.

    Raises:
        UserError: The variant is not known.
    """
    if variant.startswith("chunks-"):
        return row_chunks(int(variant.removeprefix("chunks-")))
    known: dict[str, Loss] = {"full": full_matrix, "tiled": tiled_contrastive_loss, "two-calls": two_calls}
    if variant not in known:
        raise UserError(f"Loss '{variant}' is not known: use {', '.join(known)} or chunks-SIZE.")
    return known[variant]


def features(
    batch: int, width: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Normalised features of pairs that have something in common: two (batch, width) leaves of a graph."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, width, generator=generator)
    texts = images + torch.randn(batch, width, generator=generator)
    return tuple(F.normalize(t, dim=1).to(device, dtype).requires_grad_() for t in (images, texts))  # type: ignore[return-value]


def measure(
    loss: Loss,
    batch: int,
    width: int,
    *,
    scale: float = 14.3,
    seed: int = 0,
    repeats: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Runs a loss forward and backward in this process.

    Args:
        loss: Takes images, texts and scale.
        batch: Pairs.
        width: Width of the features.
        scale: Multiplies the cosines.
        seed: Of the features.
        repeats: Runs; the fastest counts.
        device: Torch device.
        dtype: Of the features.

    Returns:
        ``seconds`` of the fastest run, ``extra_mib`` of the first, and the ``loss``.
    """
    factor = torch.tensor(scale, requires_grad=True)
    images, texts = features(batch, width, seed, device, dtype)
    # Libraries that load on first use, and kernels that are compiled, are not the loss's time or memory.
    loss(*features(64, width, seed, device, dtype), factor).backward()
    seconds, extra, value = [], 0.0, factor
    for repeat in range(repeats):
        images.grad = texts.grad = None
        with peak_memory(device) as peak:
            started = time.perf_counter()
            value = loss(images, texts, factor)
            value.backward()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        extra = extra if repeat else peak.mib
    return {"seconds": min(seconds), "extra_mib": extra, "loss": value.item()}


def in_fresh_process(variant: str, batch: int, width: int, *, threads: int = 1, **options: Any) -> dict[str, float]:
    """Runs :func:`measure` in a new process.

    Args:
        variant: As in :func:`make_loss`.
        batch: Pairs.
        width: Width of the features.
        threads: Threads of torch.
        **options: Those of :func:`measure`, but for ``dtype``.

    Raises:
        UserError: The process ended otherwise, as it does when memory is short.
    """
    arguments = json.dumps({"variant": variant, "batch": batch, "width": width, "threads": threads, **options})
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", __name__, arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message; was memory short?"])[-1]
        raise UserError(f"The loss '{variant}' at batch {batch} ended with code {done.returncode}: {said}")
    return json.loads(done.stdout)


class _Peak:
    mib = 0.0


@contextmanager
def peak_memory(device: str = "cpu") -> Iterator[_Peak]:
    """Measures how far memory rises above what it is on entry.

    On CUDA what torch allocates there. Otherwise this process's resident memory (Linux): the kernel's own high-water
    mark where it can be reset; else a thread looks every millisecond, which may miss a short peak.

    Args:
        device: Torch device.

    Raises:
        UserError: There is no /proc here.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        allocated, peak = torch.cuda.memory_allocated(device), _Peak()
        yield peak
        peak.mib = (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
        return
    if not Path("/proc/self/statm").exists():
        raise UserError("Memory is measured from /proc, which this system does not have: measure on Linux.")
    peak, page = _Peak(), os.sysconf("SC_PAGE_SIZE") / 2**20

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        stop, highest = threading.Event(), before

        def watch() -> None:
            nonlocal highest
            while not stop.wait(0.001):
                highest = max(highest, resident())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            stop.set()
            watcher.join()
            peak.mib = highest - before
        return
    yield peak
    status = Path("/proc/self/status").read_text()
    peak.mib = int(status.split("VmHWM:")[1].split()[0]) / 1024 - before


def _main(variant: str, threads: int, **options: Any) -> None:
    torch.set_num_threads(threads)
    json.dump(measure(make_loss(variant), **options), sys.stdout)


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))
