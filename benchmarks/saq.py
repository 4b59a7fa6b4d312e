"""The staircase cache against the plain one and KIVI: bytes, and decoding steps per second, interleaved in one run.

    python benchmarks/saq.py [--quick] [--device cpu] [--output results/benchmarks/saq.json]
    python benchmarks/saq.py --device cuda

A random model of Llama's shape whose caches are filled with drawn keys and values, so that no prompt need be read; then
each cache decodes the same number of tokens, turn by turn, and they grow alike. On a GPU also the attention of one
layer alone: torch's SDPA in bfloat16 over plain states, and packed states by the Triton kernel and by torch.
transformers' own quantised cache takes part where its backend is installed, the package optimum-quanto.
Targets: at 32,768 tokens at least 3.5 times smaller than 16 bits, scales and minima included; on a CPU at least 80% of
the plain cache's decoding speed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from modelwright.attention.saq import KiviCache, StaircaseQuantizedCache, staircase_bytes
from modelwright.attention.saq.layer import StaircaseLayer
from modelwright.files import write_json
from modelwright.kernels.packed_attention import Held, packed_attention
from modelwright.provenance import machine, versions

TARGETS = {"smaller_than_16_bits_at_32768_tokens": 3.5, "cpu_decoding_speed_to_plain": 0.8}
#: Hidden size, intermediate size, layers, heads, key heads.
SHAPES = {
    "quick": (128, 256, 2, 4, 2),
    "cpu": (512, 1408, 4, 8, 4),
    # Widths of Llama 3.2 1B and of Llama 3.1 8B, with a quarter or fewer of their layers.
    "1B": (2048, 8192, 4, 32, 8),
    "8B": (4096, 14336, 4, 32, 8),
}
CACHES: dict[str, Callable[[Any], Cache]] = {
    "plain": lambda config: DynamicCache(config=config),
    "plain (again)": lambda config: DynamicCache(config=config),
    "saq": StaircaseQuantizedCache,
    "kivi-2": lambda config: KiviCache(config, 2),
    "kivi-4": lambda config: KiviCache(config, 4),
}
if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
    CACHES |= {
        # Its defaults, but for as many tokens that are not quantised as the others keep.
        f"quanto-{bits}": lambda config, bits=bits: QuantizedCache(  # type: ignore[misc]
            "quanto", config, nbits=bits, residual_length=128
        )
        for bits in (2, 4)
    }


def build(name: str, longest: int, gpu: bool) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, kept = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kept, vocab_size=1024, max_position_embeddings=longest, attn_implementation="sdpa",
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return model.to("cuda", torch.bfloat16) if gpu else model


def filled(model: LlamaForCausalLM, kind: str, tokens: int) -> Cache:
    """A cache that holds drawn states of all layers."""
    config, cache = model.config, CACHES[kind](model.config)
    generator = torch.Generator(model.device).manual_seed(0)
    shape = 1, config.num_key_value_heads, tokens, config.head_dim
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype) for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def quanto_bytes(cache: Any) -> int:
    """Bytes of transformers' quantised cache: packed numbers, scales, shifts, and what is not quantised."""
    size = 0
    for layer in cache.layers:
        for packed in (layer._quantized_keys, layer._quantized_values):
            size += packed._data._data.nbytes + packed._scale.nbytes + packed._shift.nbytes
        size += layer.keys.nbytes + layer.values.nbytes
    return size


def wait(gpu: bool) -> float:
    if not gpu:
        # One thread's processor time: the same as wall time on an idle machine, and fair on a busy one.
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def decoding(model: LlamaForCausalLM, tokens: int, steps: int, repeats: int, gpu: bool) -> dict[str, Any]:
    """Seconds of a decoded token by cache, in turn and in alternating order, and the bytes of the caches."""
    caches = {kind: filled(model, kind, tokens) for kind in CACHES}
    found: dict[str, Any] = {kind: {} for kind in CACHES}
    config = model.config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for kind, cache in caches.items():
        plain = isinstance(cache, DynamicCache)
        if isinstance(cache, QuantizedCache):
            found[kind]["bytes"] = quanto_bytes(cache)
        else:
            found[kind]["bytes"] = (
                tokens * elements * model.dtype.itemsize if plain else cache.memory_bytes()  # type: ignore[attr-defined]
            )
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    seconds: dict[str, list[float]] = {kind: [] for kind in CACHES}
    gc.disable()
    for repeat in range(repeats + 1):
        for kind in list(CACHES)[:: 1 if repeat % 2 else -1]:
            start = wait(gpu)
            for _ in range(steps):
                model(token, past_key_values=caches[kind])
            if repeat:
                seconds[kind].append((wait(gpu) - start) / steps)
    gc.enable()
    for kind, times in seconds.items():
        found[kind] |= {
            "tokens_per_second": 1 / statistics.median(times),
            "speed_to_plain": statistics.median(base / own for own, base in zip(times, seconds["plain"])),
        }
    return found


def memory(tokens: int) -> dict[str, Any]:
    """Bytes of one layer of 8 key heads of 128 channels in bfloat16, measured and by the formula, against 16 bits."""
    found = {}
    states = torch.randn(2, 1, 8, tokens, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    ways = {
        "saq": ((16, 8, 4, 2), 32), "saq, groups of 64": ((16, 8, 4, 2), 64), "kivi-2": ((16, 2), 32),
        "kivi-4": ((16, 4), 32),
    }  # fmt: skip
    for name, (levels, group) in ways.items():
        layer = StaircaseLayer(levels, 128, group)
        layer.update(*states)
        packed = sum(part.bytes for pair in layer.segments for part in pair)
        measured = packed + layer.keys.nbytes + layer.values.nbytes
        formula = sum(level.bytes for level in staircase_bytes(tokens, 2 * 8 * 128, levels, 128, group))
        found[name] = {
            "bytes": measured, "formula_bytes": formula, "smaller_than_16_bits": states.nbytes / measured,
            "bits_per_element": 8 * measured / states.numel(),
        }  # fmt: skip
    return found


@torch.no_grad()
def attentions(tokens: int, size: int, repeats: int, calls: int = 50) -> dict[str, Any]:
    """Microseconds of one layer's attention of one token on a GPU: 32 heads, 8 key heads, bfloat16."""
    from modelwright.kernels import packed_attention_triton as kernels

    query = torch.randn(1, 32, 1, size, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(1, 8, tokens, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    work: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    }
    work["sdpa (again)"] = work["sdpa"]
    moved = {"sdpa": keys.nbytes + values.nbytes, "sdpa (again)": keys.nbytes + values.nbytes}
    for name, levels in {"saq": (16, 8, 4, 2), "kivi-2": (16, 2), "kivi-4": (16, 4)}.items():
        layer = StaircaseLayer(levels)
        layer.update(keys, values)
        held = [Held(tuple(pair[i] for pair in layer.segments), (layer.keys, layer.values)[i]) for i in (0, 1)]
        size_of_all = sum(part.bytes for h in held for part in h.parts) + sum(h.rest.nbytes for h in held)
        for way, function in (("triton", kernels.packed_attention), ("torch", packed_attention)):
            work[f"{name}, {way}"] = lambda f=function, h=held: f(query, *h, scaling=size**-0.5)  # type: ignore[misc]
            moved[f"{name}, {way}"] = size_of_all
        off = (work[f"{name}, triton"]().float() - work[f"{name}, torch"]().float()).abs().max()
        print(f"layer {size:3} {tokens:7,} {name}: kernel and torch differ by {float(off):.4f} at most")
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, function in work.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()  # type: ignore[no-untyped-call]
            for _ in range(calls):
                function()
            stop.record()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            if repeat:
                seconds[name].append(start.elapsed_time(stop) / 1000 / calls)
    found = {}
    for name, times in seconds.items():
        typical = statistics.median(times)
        found[name] = {
            "microseconds": typical * 1e6,
            "speed_to_sdpa": statistics.median(b / own for own, b in zip(times, seconds["sdpa"])),
            "gbytes_per_second": moved[name] / typical / 1e9,
        }
        print(f"layer {size:3} {tokens:7,} {name:14}{typical * 1e6:8.1f} us  {found[name]['speed_to_sdpa']:.2f}")
    return found


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    gpu = result["device"] != "cpu"
    rows: list[dict[str, Any]] = [
        {
            "what": f"decoding, {name}",
            "tokens": tokens,
            "cache": kind,
            "memory (MiB)": cell["bytes"] / 2**20,
            "tokens/s": cell["tokens_per_second"],
            "speed ÷ plain": cell["speed_to_plain"],
        }
        for name, lengths in result["models"].items()
        for tokens, cells in lengths.items()
        for kind, cell in cells.items()
    ]
    rows += [
        {
            "what": f"attention alone, heads of {size}",
            "tokens": tokens,
            "cache": kind,
            "speed ÷ plain": cell["speed_to_sdpa"],
        }
        for size, lengths in result.get("layers", {}).items()
        for tokens, cells in lengths.items()
        for kind, cell in cells.items()
    ]
    rows += [
        {
            "what": "memory of a layer, 8 key heads of 128, 16-bit states",
            "tokens": result["memory_tokens"],
            "cache": kind,
            "memory (MiB)": cell["bytes"] / 2**20,
            "16 bits ÷ memory": cell["smaller_than_16_bits"],
        }
        for kind, cell in result["memory"].items()
    ]
    title = "SAQ: memory and decoding speed of the staircase cache"
    return {
        "title": f"{title}, on a GPU" if gpu else title,
        "question": "How much smaller is the cache, and what does a decoding step cost?",
        "rows": rows,
        "notes": "'again' is the same measured twice: its ratio is the noise. Memory of decoding is in the model's "
        "own dtype before the first step; scales and minima are in it.",
        "command": f"python benchmarks/saq.py{' --device cuda' if gpu else ''}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, help="rounds instead of the usual number")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens in the cache instead of the usual numbers")
    parser.add_argument("--output", type=Path, help="by default in results/benchmarks/, or nowhere if it is --quick")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if not gpu:
        torch.set_num_threads(1)
    usual = [512, 1024] if options.quick else [8192, 32768, 131072] if gpu else [1024, 4096, 32768]
    lengths, repeats = options.lengths or usual, options.repeats or (3 if options.quick else 7)
    steps = 8 if options.quick else 32
    models: dict[str, Any] = {}
    # On a CPU a small model, whose weights cost little beside the cache, and one of a usual width.
    for name in ["1B", "8B"] if gpu else ["quick"] if options.quick else ["cpu", "1B"]:
        model = build(name, max(lengths) + 1024, gpu)
        for tokens in lengths:
            # Sixteen times the weights: a quarter of the steps.
            cells = decoding(model, tokens, steps // 4 if name == "1B" and not gpu else steps, repeats, gpu)
            models.setdefault(name, {})[str(tokens)] = cells
            for kind, cell in cells.items():
                print(
                    f"{name:5} {tokens:7,} {kind:14}{cell['bytes'] / 2**20:9.1f} MiB {cell['tokens_per_second']:8.1f} "
                    f"tokens/s  {cell['speed_to_plain']:.3f}",
                    flush=True,
                )
        del model
    memory_tokens = 4096 if options.quick else 32768
    result = {
        "format": 1,
        "benchmark": "saq-gpu" if gpu else "saq",
        "quick": options.quick,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "machine": machine(),
        "versions": versions(),
        "clock": "wall, device synchronised" if gpu else "processor time of one thread",
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if gpu else "float32",
        "shapes": {name: SHAPES[name] for name in models},
        "repeats": repeats,
        "decoded_tokens": steps,
        "models": models,
        "memory": memory(memory_tokens),
        "memory_tokens": memory_tokens,
        "targets": TARGETS,
    }
    for name, cell in result["memory"].items():
        print(
            f"{name}: {cell['bytes']:,} bytes (formula {cell['formula_bytes']:,}), {cell['smaller_than_16_bits']:.2f}x"
        )
    if gpu:
        result["layers"] = {
            str(size): {str(tokens): attentions(tokens, size, repeats) for tokens in lengths} for size in (64, 128)
        }
    output = options.output
    if output is None and not options.quick:
        output = Path(f"results/benchmarks/{result['benchmark']}.json")
    if output is not None:
        write_json(output, result | tables(result))


if __name__ == "__main__":
    main()
