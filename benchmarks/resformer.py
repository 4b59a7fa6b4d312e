"""Speed and cache of ResFormer and SVFormer as ratios to Llama of the same shape, interleaved in one run.

    python benchmarks/resformer.py [--quick] [--output results/benchmarks/resformer.json]

Targets: a ResFormer training step at least 97% of Llama's tokens/s; SVFormer's cache exactly (N+1)/(2N).
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modelwright.architectures.resformer import (
    ResFormerConfig,
    ResFormerForCausalLM,
    SVFormerConfig,
    SVFormerForCausalLM,
    ValueResidualConfig,
    kv_cache_bytes,
)
from modelwright.files import write_json
from modelwright.provenance import machine, versions

RESFORMER_TARGET = 0.97


def models(shape: dict[str, Any]) -> dict[str, PreTrainedModel]:
    def resformer(**residual: Any) -> PreTrainedModel:
        return ResFormerForCausalLM(ResFormerConfig(**shape, value_residual=ValueResidualConfig(**residual)))

    return {
        "llama": LlamaForCausalLM(LlamaConfig(**shape)),
        # Llama once more: how far its ratio is from 1 is the noise of this run.
        "llama (again)": LlamaForCausalLM(LlamaConfig(**shape)),
        "resformer (1/2, 1/2)": resformer(),
        "resformer (2, 1)": resformer(mode="constant"),
        "resformer learnable": resformer(mode="learnable"),
        "svformer": SVFormerForCausalLM(SVFormerConfig(**shape)),
    }


def interleaved(
    work: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each piece of work, in turn and in alternating order, so that drift of the machine hits all alike."""
    for function in work.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    gc.disable()
    for repeat in range(repeats):
        for name in list(work)[:: 1 if repeat % 2 else -1]:
            start = clock()
            work[name]()
            seconds[name].append(clock() - start)
    gc.enable()
    return seconds


def summary(seconds: dict[str, list[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Tokens/s at the median, and the median over rounds of the ratio to Llama's tokens/s in the same round."""
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(times),
            "ratio_to_llama": statistics.median(base / own for base, own in zip(seconds["llama"], times)),
            "best_ratio_to_llama": min(seconds["llama"]) / min(times),
        }
        for name, times in seconds.items()
    }


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    rows = [
        {
            "model": name,
            "training (tokens/s)": result["training"][name]["tokens_per_second"],
            "÷ Llama": result["training"][name]["ratio_to_llama"],
            "decoding (tokens/s)": result["decoding"][name]["tokens_per_second"],
            "decoding ÷ Llama": result["decoding"][name]["ratio_to_llama"],
            "cache ÷ Llama": result["cache"][name]["ratio_to_llama"],
        }
        for name in result["cache"]
    ]
    return {
        "title": "ResFormer and SVFormer: speed and cache against Llama",
        "question": "Does the value residual cost time, and does sharing values save memory?",
        "rows": rows,
        "notes": "'llama (again)' is the same model measured twice: its ratio is the noise.",
        "command": "python benchmarks/resformer.py",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--repeats", type=int, help="rounds instead of the usual number")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/resformer.json"))
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    if not gpu:
        torch.set_num_threads(1)
    shape: dict[str, Any] = {"vocab_size": 2048, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if gpu:  # the paper's 82M shape
        shape |= {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8}
        batch, length, context, decode_batch, repeats = 32, 2048, 32768, 16, 20
    elif options.quick:
        shape |= {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4}
        batch, length, context, decode_batch, repeats = 2, 64, 128, 2, 3
    else:
        shape |= {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
        batch, length, context, decode_batch, repeats = 8, 256, 2048, 4, 15
    repeats = options.repeats or repeats
    shape["max_position_embeddings"] = context + 64
    torch.manual_seed(0)
    built = {name: model.to(device=device, dtype=dtype) for name, model in models(shape).items()}
    for model in built.values():
        if getattr(model.model, "value_residual", None) is not None:
            model.model.value_residual.float()
    ids = torch.randint(shape["vocab_size"], (batch, length), device=device)

    def clock() -> float:
        if not gpu:
            # One thread's processor time: the same as wall time on an idle machine, and fair on a busy one.
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def training_step(model: PreTrainedModel) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    train = interleaved({name: training_step(model) for name, model in built.items()}, repeats, clock)

    decoded = 8
    caches: dict[str, Any] = {}
    cache_bytes: dict[str, int] = {}
    for name, model in built.items():
        model.eval()
        prompt = torch.randint(shape["vocab_size"], (decode_batch, context), device=device)
        with torch.no_grad():
            caches[name] = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        cache_bytes[name] = kv_cache_bytes(caches[name])

    def decoding(model: PreTrainedModel, cache: Any) -> Callable[[], None]:
        token = torch.ones(decode_batch, 1, dtype=torch.long, device=device)

        @torch.no_grad()
        def step() -> None:
            for _ in range(decoded):
                model(token, past_key_values=cache, use_cache=True)
            cache.crop(-decoded)

        return step

    decode = interleaved({n: decoding(model, caches[n]) for n, model in built.items()}, repeats, clock)

    layers = shape["num_hidden_layers"]
    result = {
        "format": 1,
        "benchmark": "resformer",
        "quick": options.quick,
        "machine": machine(),
        "versions": versions(),
        "clock": "wall" if gpu else "processor time of one thread",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "training": {"batch": batch, "length": length, "repeats": repeats, **summary(train, batch * length)},
        "decoding": {
            "batch": decode_batch, "context": context, "repeats": repeats, **summary(decode, decode_batch * decoded),
        },
        "cache": {
            name: {"bytes": size, "ratio_to_llama": size / cache_bytes["llama"]} for name, size in cache_bytes.items()
        },
        "targets": {
            "resformer_training_ratio": RESFORMER_TARGET,
            "svformer_cache_ratio": (layers + 1) / (2 * layers),
        },
    }  # fmt: skip
    write_json(options.output, result | tables(result))
    print(f"{'':22}{'train tok/s':>12}{'/ llama':>9}{'decode tok/s':>14}{'/ llama':>9}{'cache / llama':>15}")
    for name in built:
        t, d, c = result["training"][name], result["decoding"][name], result["cache"][name]
        print(
            f"{name:22}{t['tokens_per_second']:12,.0f}{t['ratio_to_llama']:9.3f}"
            f"{d['tokens_per_second']:14,.0f}{d['ratio_to_llama']:9.3f}{c['ratio_to_llama']:15.4f}"
        )
    exact = cache_bytes["svformer"] * 2 * layers == cache_bytes["llama"] * (layers + 1)
    slowest = min(result["training"][n]["ratio_to_llama"] for n in ("resformer (1/2, 1/2)", "resformer (2, 1)"))
    print(
        f"ResFormer at least {RESFORMER_TARGET:.0%} of Llama in training: {slowest >= RESFORMER_TARGET} ({slowest:.1%})"
    )
    print(f"SVFormer's cache exactly (N+1)/(2N) of Llama's: {exact}")


if __name__ == "__main__":
    main()
