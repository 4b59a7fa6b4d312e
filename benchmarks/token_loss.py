"""What tracking losses by token type costs over plain evaluation, and the memory of a vocabulary of 128,000.

    python benchmarks/token_loss.py [--quick] [--output results/benchmarks/token-loss.json]

Time: the same documents through the same model in the same windows, once for perplexity (``score_documents``) and
once for losses by type (``measure_documents``), in turn and in alternating order; the sums of losses are compared.
Target: at most 5% more. The floor is the forward pass, of which the body is shared; the head of the tracker runs in
parts, and only where a token is scored.

Memory: processes of their own, which load a model with 128,000 types, score a few tokens, and then a batch of
documents; the rise of the peak of resident memory in the batch is reported. Target: below 1 GiB. Plain evaluation holds
the logits of a batch: 2 GiB for 4,096 tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelwright.files import write_json
from modelwright.models.scoring import score_documents
from modelwright.models.tiny import byte_tokenizer, seeded
from modelwright.probing.fair_lm import measure_documents
from modelwright.provenance import machine, versions

TARGET, LIMIT = 1.05, 2**30
#: Name to width, layers, vocabulary.
SHAPES = {
    "small, 2,048 types": (64, 4, 2048),
    "32,000 types": (256, 6, 32_000),
    "128,000 types": (128, 2, 128_000),
}
_LENGTH, _BATCH = 512, 8


def model_of(width: int, layers: int, vocabulary: int) -> Any:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=vocabulary, max_position_embeddings=_LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    with seeded(0):
        return LlamaForCausalLM(config).eval()


def documents(count: int) -> list[str]:
    """Texts of about a window each: a byte is a token."""
    return [f"{number} is a number, and here are some words about it. " * 9 for number in range(10_000, 10_000 + count)]


def plain(model: Any, texts: list[str]) -> float:
    scores = score_documents(model, byte_tokenizer(), texts, window=_LENGTH, batch_size=_BATCH)
    return -sum(score.log_probability for score in scores)


def tracked(model: Any, texts: list[str]) -> float:
    report = measure_documents(model, byte_tokenizer(), texts, window=_LENGTH, batch_size=_BATCH).compute()
    return float(report.loss.sum())


WAYS = {"plain": plain, "tracked": tracked}


def measure_time(shape: tuple[int, int, int], count: int, repeats: int) -> dict[str, Any]:
    model, texts = model_of(*shape), documents(count)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu: dict[str, list[float]] = {name: [] for name in WAYS}
    sums = {}
    for repeat in range(-1, repeats):  # the first is a warm-up
        for name in list(WAYS)[:: 1 if repeat % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            sums[name] = WAYS[name](model, texts)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    ratios = [t / p for t, p in zip(seconds["tracked"], seconds["plain"], strict=True)]
    return {
        "shape": dict(zip(("hidden_size", "layers", "vocab_size"), shape, strict=True)),
        "tokens": sum(len(text.encode()) for text in texts),
        "seconds": {name: round(statistics.median(s), 3) for name, s in seconds.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
        # Of processor time, which other processes disturb less.
        "cpu_ratio": round(statistics.median(t / p for t, p in zip(cpu["tracked"], cpu["plain"], strict=True)), 4),
        "relative_difference_of_sums": abs(sums["tracked"] / sums["plain"] - 1),
        "target": TARGET,
        "met": statistics.median(ratios) <= TARGET,
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(way: str) -> None:
    """Prints what a batch adds to the peak of resident memory in this process, bytes."""
    torch.set_num_threads(1)
    model = model_of(*SHAPES["128,000 types"])
    WAYS[way](model, ["a few words"])
    before = peak()
    WAYS[way](model, documents(_BATCH))
    print(json.dumps({"before": before, "rise": peak() - before}))


def measure_memory() -> dict[str, Any]:
    found = {}
    for way in WAYS:
        call = [sys.executable, __file__, "--child", way]
        found[way] = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    return {
        "vocab_size": 128_000,
        "tokens_in_a_batch": _BATCH * _LENGTH,
        "loaded_process_bytes": {way: one["before"] for way, one in found.items()},
        "rise_bytes": {way: one["rise"] for way, one in found.items()},
        "limit": LIMIT,
        "met": found["tracked"]["rise"] < LIMIT,
    }


def tables(times: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    rows = [
        {
            "model": name,
            "perplexity alone (s)": one["seconds"]["plain"],
            "losses by type (s)": one["seconds"]["tracked"],
            "ratio, median": one["ratio"],
            "lowest": min(one["ratios"]),
            "highest": max(one["ratios"]),
            "ratio of processor time": one["cpu_ratio"],
            "asked": f"at most {one['target']}",
        }
        for name, one in times.items()
    ]
    rise = {way: f"{value / 2**20:,.0f}" for way, value in memory["rise_bytes"].items()}
    return {
        "title": "Losses by token type against plain evaluation",
        "question": "What does it cost to know the loss of every token type and not only the average?",
        "rows": rows,
        "notes": (
            f"Memory of a batch of {memory['tokens_in_a_batch']:,} tokens at {memory['vocab_size']:,} types, above the "
            f"loaded model: {rise['tracked']} MiB (asked: below 1,024), plain evaluation {rise['plain']} MiB."
        ),
        "command": "python benchmarks/token_loss.py",
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer documents and repeats")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/token-loss.json"))
    parser.add_argument("--child", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    torch.set_num_threads(options.threads)
    memory = measure_memory()
    print(f"memory of a batch, MiB: { {way: round(v / 2**20) for way, v in memory['rise_bytes'].items()} }")
    times = {}
    for name, shape in SHAPES.items():
        few = options.quick or shape[2] > 100_000  # a batch of so many types takes long enough
        times[name] = measure_time(shape, 8 if few else 32, 2 if options.quick else 7)
        print(f"{name}: {times[name]['ratio']:.3f} of plain evaluation (CPU seconds: {times[name]['cpu_ratio']:.3f})")
    result = {
        "benchmark": "token-loss",
        "threads": options.threads,
        "results": {"time": times, "memory": memory},
        **tables(times, memory),
        "machine": machine(),
        "versions": versions(),
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
