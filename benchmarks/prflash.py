"""PrFlash's attention forward and backward against the share of blocks it keeps, beside full attention and a window.

    python benchmarks/prflash.py [--quick] [--threads 2] [--output results/benchmarks/prflash.json]
    python benchmarks/prflash.py --device cuda

One layer's attention alone, since everything else of a model costs the same. Every round draws blocks anew and times
all ways in turn, in alternating order. The floor is the share of blocks that were kept: attention costs what it
computes. On a CPU the clock is one process's own time, so that a busy machine is fair to all.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modelwright.attention.prflash import ProbFlashConfig, block_attention, fixed_blocks
from modelwright.attention.prflash.kernel import flex_blocks
from modelwright.files import write_json
from modelwright.provenance import machine, versions


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ways(block: int, blocks: int) -> dict[str, ProbFlashConfig | int | None]:
    """Returns what is timed by name: settings to draw from, a window's width in blocks, or None for full attention."""
    harmonic = ProbFlashConfig(block_size=block)
    density = harmonic.participation.density(blocks)
    wanted = density * blocks * (blocks + 1) / 2
    window = min(range(1, blocks + 1), key=lambda wide: abs(wide * blocks - wide * (wide - 1) / 2 - wanted))
    uniform = {f"uniform law, share {share:g}": (share, "shared") for share in (0.1, 0.25, 0.5, 1.0)}
    uniform["uniform law, share 0.25, a draw for each block"] = (0.25, "independent")
    return {
        "full (torch's SDPA)": None,
        "full again": None,
        "sliding window of as many blocks as the harmonic law": window,
        "harmonic law": harmonic,
        "harmonic law, a draw for each block": ProbFlashConfig(block_size=block, mode="independent"),
        **{
            name: ProbFlashConfig(law="uniform", share=share, mode=mode, block_size=block)  # type: ignore[arg-type]
            for name, (share, mode) in uniform.items()
        },
    }


def measure(shape: tuple[int, int, int, int, int], block: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Times every way; ``shape`` is batch, heads, key heads, tokens, size of a head."""
    batch, heads, shared, tokens, size = shape
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query, key, value = (
        torch.randn(batch, h, tokens, size, generator=generator).to(device, dtype).requires_grad_()
        for h in (heads, shared, shared)
    )
    upstream = torch.randn(batch, heads, tokens, size, generator=generator).to(device, dtype)
    blocks = tokens // block
    rows = torch.arange(blocks)
    whole = blocks * (blocks + 1) / 2

    def full(kept: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=shared < heads
        )

    def some(kept: torch.Tensor | None) -> torch.Tensor:
        assert kept is not None
        if device == "cpu":
            return block_attention(query, key, value, kept, block, scaling=size**-0.5)
        return flex_blocks(query, key, value, kept, block, scaling=size**-0.5)

    seconds: dict[str, list[float]] = {}
    densities: dict[str, list[float]] = {}
    plan = ways(block, blocks)
    for number in range(rounds + 2):  # the first two warm up and compile
        for name in list(plan)[:: 1 if number % 2 else -1]:
            way = plan[name]
            attend: Callable[[torch.Tensor | None], torch.Tensor] = some
            kept: torch.Tensor | None
            if way is None:
                attend, kept = full, None
            elif isinstance(way, int):
                kept = fixed_blocks(tuple(range(way)), rows, blocks)
            else:
                kept = way.kept(rows, blocks, heads, training=True, seed=number)
            gc.disable()
            start = clock(device)
            torch.autograd.grad(attend(kept), (query, key, value), upstream)
            taken = clock(device) - start
            gc.enable()
            if number >= 2:
                seconds.setdefault(name, []).append(taken)
                densities.setdefault(name, []).append(1.0 if kept is None else float(kept.sum()) / whole)
    base = seconds["full (torch's SDPA)"]
    found = []
    for name, times in seconds.items():
        ratio = statistics.mean(times) / statistics.mean(base)
        density = statistics.mean(densities[name])
        found.append(
            {
                "way": name,
                "tokens": tokens,
                "milliseconds": round(1000 * statistics.mean(times), 3),
                "÷ full": round(ratio, 3),
                "blocks kept": round(density, 3),
                "÷ (full × blocks kept)": round(ratio / density, 2),
            }
        )
    return sorted(found, key=lambda row: list(plan).index(row["way"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short sequences, few rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="results/benchmarks/prflash.json, or prflash-gpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    output = options.output or Path(f"results/benchmarks/prflash{'-gpu' if gpu else ''}.json")
    lengths = {
        (True, False): (1024,),
        (False, False): (2048, 8192),
        (True, True): (4096,),
        (False, True): (8192, 32768),
    }
    tables = {}
    for tokens in lengths[options.quick, gpu]:
        shape = (1, 32, 8, tokens, 128) if gpu else (1, 4, 4, tokens, 64)
        rows = measure(shape, 128, 3 if options.quick else 10, options.device)
        tables[f"Forward and backward, {tokens:,} tokens"] = rows
        for row in rows:
            print(f"{tokens}, {row['way']}: {row['milliseconds']} ms, {row['÷ full']} of full at {row['blocks kept']}")
    write_json(
        output,
        {
            "benchmark": output.stem,
            "title": "PrFlash: what attention costs by the share of blocks kept",
            "question": "Does attention over some blocks cost what it computes?",
            "threads": options.threads,
            "quick": options.quick,
            "tables": tables,
            "notes": [
                "Blocks of 128 tokens, one layer's attention alone: "
                + ("bfloat16, 32 heads of 128, 8 key heads, flex_attention. " if gpu else "float32, 4 heads of 64. ")
                + "Means over rounds with a draw each. The last column is 1 if cost follows the blocks exactly.",
            ],
            "command": "python benchmarks/prflash.py" + (" --device cuda" if gpu else ""),
            "machine": machine(),
            "versions": versions(),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
