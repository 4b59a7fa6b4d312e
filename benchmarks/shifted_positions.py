"""STRING against plain attention: time and memory of a prefill, and time of a decoding step, interleaved in one run.

    python benchmarks/shifted_positions.py [--quick] [--output results/benchmarks/string.json]

Targets: a prefill within 15% of plain SDPA's time and memory at 16,384 tokens; decoding within 10%.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelwright.attention.string import StringConfig, apply_string
from modelwright.files import write_json
from modelwright.provenance import machine, versions

PREFILL_TARGET, DECODE_TARGET = 1.15, 1.10
VARIANTS = ("plain", "plain (again)", "string")


def shape(size: str, longest: int) -> dict[str, Any]:
    sizes = {
        "quick": (64, 128, 2, 4, 2),
        "cpu": (512, 1408, 4, 8, 4),
        # Llama 3.1 8B's attention: 32 heads of 128, 8 key/value heads.
        "gpu": (4096, 14336, 8, 32, 8),
    }
    hidden, intermediate, layers, heads, kept = sizes[size]
    return {
        "vocab_size": 1024, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kept, "max_position_embeddings": longest,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def build(size: str, longest: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape(size, longest), attn_implementation="sdpa")).eval()
    return model.to("cuda", torch.bfloat16) if size == "gpu" else model


def context(variant: str, model: LlamaForCausalLM, length: int) -> contextlib.AbstractContextManager[Any]:
    if variant != "string":
        return contextlib.nullcontext()
    return apply_string(model, StringConfig(shift=length // 3, window=min(128, length // 6)))


def clock(gpu: bool) -> float:
    if not gpu:
        # One thread's processor time: the same as wall time on an idle machine, and fair on a busy one.
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(work: dict[str, Callable[[], None]], repeats: int, gpu: bool) -> dict[str, list[float]]:
    """Seconds of each piece of work, in turn and in alternating order, so that drift of the machine hits all alike."""
    for function in work.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    gc.disable()
    for repeat in range(repeats):
        for name in list(work)[:: 1 if repeat % 2 else -1]:
            start = clock(gpu)
            work[name]()
            seconds[name].append(clock(gpu) - start)
    gc.enable()
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio_to_plain": statistics.median(own / base for own, base in zip(times, seconds["plain"])),
            "best_ratio_to_plain": min(times) / min(seconds["plain"]),
        }
        for name, times in seconds.items()
    }


@torch.no_grad()
def prefill(model: LlamaForCausalLM, variant: str, ids: torch.Tensor) -> Any:
    with context(variant, model, ids.shape[1]):
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def decoding(model: LlamaForCausalLM, variant: str, ids: torch.Tensor, steps: int) -> Callable[[], None]:
    cache = prefill(model, "plain", ids)
    token = ids[:, :1]

    @torch.no_grad()
    def step() -> None:
        # The context's own cost, two single tokens, is paid once a prompt and not here.
        with context(variant, model, ids.shape[1]):
            start = clock(ids.is_cuda)
            for _ in range(steps):
                model(token, past_key_values=cache, use_cache=True)
            step.seconds = clock(ids.is_cuda) - start  # type: ignore[attr-defined]
        cache.crop(-steps)

    return step


def timed_inside(work: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Like :func:`interleaved`, of seconds that the work itself measures."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name in list(work)[:: 1 if repeat % 2 else -1]:
            work[name]()
            if repeat:
                seconds[name].append(work[name].seconds)
    return seconds


def peak_of_process(size: str, variant: str, length: int) -> int:
    """Bytes that a prefill adds to the peak of a process of its own, over what the model took."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", size, variant, str(length)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def report_peak(size: str, variant: str, length: int) -> None:
    torch.set_num_threads(1)
    model = build(size, length + 64)
    ids = torch.randint(1024, (1, length), device=model.device)
    prefill(model, variant, ids[:, :64])  # what every first call takes
    if size == "gpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        prefill(model, variant, ids)
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prefill(model, variant, ids)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    rows = [
        {
            "tokens": length,
            "attention": name,
            "prefill (s)": found["prefill"][name]["seconds"],
            "prefill ÷ plain": found["prefill"][name]["ratio_to_plain"],
            "memory ÷ plain": found["memory"].get(name, {}).get("ratio_to_plain"),
            "decoding ÷ plain": found["decoding"][name]["ratio_to_plain"],
        }
        for length, found in result["lengths"].items()
        for name in VARIANTS
    ]
    return {
        "title": "STRING: prefill and decoding against plain SDPA",
        "question": "What do shifted far positions cost?",
        "rows": rows,
        "notes": "'plain (again)' is the same model measured twice: its ratio is the noise. Memory is what a prefill "
        "adds to the peak over the weights.",
        "command": "python benchmarks/shifted_positions.py",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--repeats", type=int, help="rounds instead of the usual number")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths instead of the usual ones")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/string.json"))
    parser.add_argument("--peak", nargs=3, metavar=("SIZE", "VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        report_peak(options.peak[0], options.peak[1], int(options.peak[2]))
        return

    gpu = torch.cuda.is_available()
    size = "gpu" if gpu else "quick" if options.quick else "cpu"
    if not gpu:
        torch.set_num_threads(1)
    usual = [512, 1024] if options.quick else [4096, 16384, 65536, 131072] if gpu else [4096, 8192, 16384]
    lengths = options.lengths or usual
    repeats = options.repeats or (3 if options.quick else 10 if gpu else 5)
    steps = 8 if options.quick else 32
    model = build(size, max(lengths) + 64)
    found: dict[str, Any] = {}
    for length in lengths:
        ids = torch.randint(1024, (1, length), device=model.device)
        times = interleaved({v: lambda v=v, ids=ids: prefill(model, v, ids) for v in VARIANTS}, repeats, gpu)  # type: ignore[misc]
        decoded = timed_inside({v: decoding(model, v, ids, steps) for v in VARIANTS}, repeats)
        peaks = {v: peak_of_process(size, v, length) for v in ("plain", "string")}
        found[str(length)] = {
            "prefill": ratios(times),
            "decoding": ratios(decoded),
            "memory": {
                v: {"bytes": p, "ratio_to_plain": p / peaks["plain"] if peaks["plain"] else None}
                for v, p in peaks.items()
            },
        }
        for name in VARIANTS:
            memory = found[str(length)]["memory"].get(name, {}).get("ratio_to_plain")
            print(
                f"{length:7,} {name:15}prefill {found[str(length)]['prefill'][name]['ratio_to_plain']:.3f}  "
                f"decoding {found[str(length)]['decoding'][name]['ratio_to_plain']:.3f}  "
                f"memory {'' if memory is None else f'{memory:.3f}'}"
            )
    result = {
        "format": 1,
        "benchmark": "string",
        "quick": options.quick,
        "machine": machine(),
        "versions": versions(),
        "clock": "wall" if gpu else "processor time of one thread",
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if gpu else "float32",
        "shape": shape(size, max(lengths) + 64),
        "repeats": repeats,
        "decoded_tokens": steps,
        "lengths": found,
        "targets": {"prefill": PREFILL_TARGET, "memory": PREFILL_TARGET, "decoding": DECODE_TARGET},
    }
    write_json(options.output, result | tables(result))


if __name__ == "__main__":
    main()
