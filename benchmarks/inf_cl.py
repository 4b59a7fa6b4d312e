"""Memory and time of the contrastive loss, forward and backward, on a CPU: full matrix, row chunks, tiles.

    python benchmarks/inf_cl.py [--quick] [--threads 1] [--output results/benchmarks/inf-cl.json]

Every measurement is a process of its own, rounds interleaved, the best time and the least memory of each kept: other
work on a machine only ever slows. Memory is the peak of resident memory above that of the process with its features.
Targets, at batch 16,384 and width 64: at most 1/40 of the full matrix's memory and at least 2.5 times its speed; one
sweep for both directions at least 1.5 times as fast as two. Memory must grow linearly to batch 131,072.

The floor is what the matrix products alone take, 2 b²c forward and 6 b²c backward at the rate of products of the tiles'
shape, and with them one exponential a pair each way.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modelwright.files import write_json
from modelwright.kernels.pair_tiles import default_block_size
from modelwright.provenance import machine, versions
from modelwright.training.inf_cl.measure import in_fresh_process

WIDTH = 64
TARGETS = {"memory": 40.0, "speed": 2.5, "one_sweep": 1.5}
CHUNKS = (64, 128, 256, 512, 1024, 2048)
LABELS = {
    "full": "full matrix",
    "chunks": "row chunks, checkpointed",
    "two-calls": "tiles, two sweeps",
    "tiled": "tiles, one sweep",
}


def seconds_of(work: Callable[[], Any], at_least: float = 0.3) -> float:
    """Seconds of the fastest of as many runs as fit."""
    work()
    best, spent = float("inf"), 0.0
    while spent < at_least:
        started = time.perf_counter()
        work()
        took = time.perf_counter() - started
        best, spent = min(best, took), spent + took
    return best


def floor(threads: int) -> dict[str, float]:
    """What the machine does at best with one tile: rates of the three products, and of the exponential."""
    torch.set_num_threads(threads)
    size = default_block_size(torch.device("cpu"), WIDTH)
    q, k, tile = torch.randn(size, WIDTH), torch.randn(size, WIDTH), torch.randn(size, size)
    out, flops, square = torch.zeros(size, WIDTH), 2 * size * size * WIDTH, torch.randn(2048, 2048)
    product = seconds_of(lambda: torch.addmm(tile, q, k.T, beta=0, out=tile))
    tile.normal_()
    gradients = [seconds_of(lambda m=m: out.addmm_(m, q)) for m in (tile, tile.T)]
    spare = torch.empty_like(tile)
    exponential = seconds_of(lambda: torch.exp2(tile, out=spare))
    pairs = size * size
    return {
        "tile": size,
        "gflops_of_the_product": flops / product / 1e9,
        "gflops_of_the_gradients": 2 * flops / sum(gradients) / 1e9,
        "gflops_of_a_large_square_product": 2 * 2048**3 / seconds_of(lambda: square @ square) / 1e9,
        "ns_per_pair_products": (2 * product + sum(gradients)) / pairs * 1e9,
        "ns_per_pair_exponentials": 2 * exponential / pairs * 1e9,
    }


def best(rounds: int, cases: dict[str, str], batch: int, **options: Any) -> dict[str, dict[str, float]]:
    """The fastest time and the least memory of each variant over interleaved rounds."""
    found: dict[str, dict[str, float]] = {}
    for turn in range(rounds):
        for label in list(cases)[:: 1 if turn % 2 == 0 else -1]:
            one = in_fresh_process(cases[label], batch, WIDTH, **options)
            old = found.get(label, one)
            found[label] = {key: min(one[key], old[key]) for key in ("seconds", "extra_mib")} | {"loss": one["loss"]}
    losses = [one["loss"] for one in found.values()]
    assert max(losses) - min(losses) < 1e-5 + 1e-4 * max(losses), f"the losses differ: {found}"
    print(batch, {label: (round(v["seconds"], 3), round(v["extra_mib"], 1)) for label, v in found.items()}, flush=True)
    return {label: found[label] for label in cases}


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    comparison = [
        {
            "batch": int(batch),
            **{f"{LABELS[name]} (MiB)": found[name]["extra_mib"] for name in LABELS},
            "full ÷ one sweep, memory": found["full"]["extra_mib"] / found["tiled"]["extra_mib"],
            **{f"{LABELS[name]} (s)": found[name]["seconds"] for name in LABELS},
            "full ÷ one sweep, time": found["full"]["seconds"] / found["tiled"]["seconds"],
            "two ÷ one sweep, time": found["two-calls"]["seconds"] / found["tiled"]["seconds"],
        }
        for batch, found in result["comparison"].items()
    ]
    ground = result["floor"]
    products = ground["ns_per_pair_products"] * 1e-9
    growth = [
        {
            "batch": int(batch),
            "extra memory (MiB)": found["extra_mib"],
            "KiB a pair of the batch": found["extra_mib"] * 1024 / int(batch),
            "seconds": found["seconds"],
            "ns a pair of all pairs": found["seconds"] / int(batch) ** 2 * 1e9,
            "matrix products alone ÷ time": products * int(batch) ** 2 / found["seconds"],
        }
        for batch, found in result["growth"].items()
    ]
    return {
        "title": "Inf-CL: memory and time of the contrastive loss on a CPU",
        "question": "What does the loss of b pairs, both directions, forward and backward, need beyond its features?",
        "tables": {
            f"Against the full matrix, {result['threads']} thread(s), width {WIDTH}": comparison,
            "Growth of the tiled loss": growth,
        },
        "notes": (
            "Asked at batch 16,384: memory at most 1/40 and speed at least 2.5 times that of the full matrix; one "
            "sweep at least 1.5 times as fast as two (at scale 100 it is "
            f"{result['ratios']['one_sweep_at_scale_100']:.2f}). "
            f"Row chunks have {result['chunk']} rows, the fastest of {list(CHUNKS)}. The floor: the products of a tile "
            f"take {ground['ns_per_pair_products']:.2f} ns a pair, at {ground['gflops_of_the_product']:.0f} and "
            f"{ground['gflops_of_the_gradients']:.0f} GFLOP/s (a large square product: "
            f"{ground['gflops_of_a_large_square_product']:.0f}), and its two exponentials "
            f"{ground['ns_per_pair_exponentials']:.2f}."
        ),
        "command": "python benchmarks/inf_cl.py",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, to see that it runs; no result is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/inf-cl.json"))
    options = parser.parse_args()
    quick, threads = options.quick, options.threads
    os.environ["OMP_NUM_THREADS"] = str(threads)

    tuning = 1024 if quick else 8192
    chunk_seconds = {
        size: in_fresh_process(f"chunks-{size}", tuning, WIDTH, threads=threads)["seconds"]
        for size in (CHUNKS[:2] if quick else CHUNKS)
    }
    chunk = min(chunk_seconds, key=lambda size: chunk_seconds[size])
    print(f"chunks of {chunk} rows: {chunk_seconds}")
    cases = {"full": "full", "chunks": f"chunks-{chunk}", "two-calls": "two-calls", "tiled": "tiled"}
    comparison = {
        batch: best(1 if quick else 3 if batch <= 4096 else 2, cases, batch, threads=threads, repeats=2)
        for batch in ((512, 1024) if quick else (2048, 4096, 8192, 16_384))
    }
    # A trained CLIP's scale: logits too far apart for exponentials without a shift.
    largest = max(comparison)
    at_100 = best(1, {"two-calls": "two-calls", "tiled": "tiled"}, largest, threads=threads, repeats=2, scale=100.0)
    growth = {largest: comparison[largest]["tiled"]}
    for batch in (2048,) if quick else (32_768, 65_536, 131_072):
        growth |= {batch: best(1, {"tiled": "tiled"}, batch, threads=threads)["tiled"]}

    found = comparison[largest]
    ratios = {
        "memory": found["full"]["extra_mib"] / found["tiled"]["extra_mib"],
        "speed": found["full"]["seconds"] / found["tiled"]["seconds"],
        "one_sweep": found["two-calls"]["seconds"] / found["tiled"]["seconds"],
        "one_sweep_at_scale_100": at_100["two-calls"]["seconds"] / at_100["tiled"]["seconds"],
    }
    result = {
        "format": 1,
        "benchmark": "inf-cl",
        "threads": threads,
        "width": WIDTH,
        "chunk": chunk,
        "chunk_seconds": chunk_seconds,
        "comparison": comparison,
        "at_scale_100": {largest: at_100},
        "growth": growth,
        "floor": floor(threads),
        "ratios": ratios,
        "targets": TARGETS,
    }
    result |= {**tables(result), "machine": machine(), "versions": versions()}
    for name, asked in TARGETS.items():
        print(f"{name}: {ratios[name]:.2f}, asked {asked}: {ratios[name] >= asked}")
    print(result["notes"])
    if not quick:
        write_json(options.output, result)
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
