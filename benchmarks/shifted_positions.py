"""STRING against plain attention: time and memory of a prefill, and time of a decoding step, interleaved in one run.

    python benchmarks/shifted_positions.py [--quick] [--device cpu] [--output results/benchmarks/shifted-positions.json]
    python benchmarks/shifted_positions.py --device cuda [--sweep]

Whole models first (attention is a part of them), then, on a GPU, the attention of one layer alone by every path that
could serve it, beside torch's by every backend. ``--sweep`` tries other cuts of the Triton kernel and writes nothing.
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
from modelwright.attention.string.hook import Call
from modelwright.attention.string.rotation import Rotation
from modelwright.attention.string.serve import by_path
from modelwright.files import write_json
from modelwright.kernels.shifted_attention import Turn
from modelwright.provenance import machine, versions

PREFILL_TARGET, DECODE_TARGET = 1.15, 1.10
VARIANTS = ("plain", "plain (again)", "string")
ON_GPU = ("1B", "8B")


def shape(size: str, longest: int) -> dict[str, Any]:
    sizes = {
        "quick": (64, 128, 2, 4, 2),
        "cpu": (512, 1408, 4, 8, 4),
        # Widths of Llama 3.2 1B and of Llama 3.1 8B, with a quarter or fewer of their layers.
        "1B": (2048, 8192, 4, 32, 8),
        "8B": (4096, 14336, 4, 32, 8),
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
    return model.to("cuda", torch.bfloat16) if size in ON_GPU else model


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


def reading(model: LlamaForCausalLM, variant: str, ids: torch.Tensor) -> Callable[[], None]:
    """A prefill that times itself inside the context, which is entered once for many prompts."""

    @torch.no_grad()
    def read() -> None:
        with context(variant, model, ids.shape[1]):
            start = clock(ids.is_cuda)
            model(ids, use_cache=True, logits_to_keep=1)
            read.seconds = clock(ids.is_cuda) - start  # type: ignore[attr-defined]

    return read


def entering(model: LlamaForCausalLM, repeats: int, gpu: bool) -> float:
    """Seconds that entering and leaving STRING's context takes."""

    def work() -> None:
        with context("string", model, model.config.max_position_embeddings - 64):
            pass

    return statistics.median(interleaved({"it": work}, repeats, gpu)["it"])


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prefill(model, variant, ids)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def allocated(function: Callable[[], Any]) -> int:
    """Bytes that a call on the GPU adds to what is allocated, at most."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def drawn(rows: int, keys: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's query, key and value with 32 heads and 8 key heads."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(1, 32, rows, size, **options)
    return query, torch.randn(1, 8, keys, size, **options), torch.randn(1, 8, keys, size, **options)


def attentions(rows: int, keys: int, size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The attention of one layer, by every way that runs here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = drawn(rows, keys, size)
    shift, scaling = keys // 3, size**-0.5
    module = torch.nn.Module()
    module.register_buffer("inv_freq", 500_000.0 ** -(torch.arange(0, size, 2, device="cuda") / size))
    rotation = Rotation(module, "inv_freq")

    def plain(*backends: Any) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(list(backends)) if backends else contextlib.nullcontext():
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=rows > 1, enable_gqa=True, scale=scaling
                )

        return call

    def shifted(path: Any) -> Callable[[], torch.Tensor]:
        call = Call(
            query=query, key=key, value=value, mask=None, lefts=(), places=None, rotation=rotation, scaling=scaling,
            softcap=None, dropout=0.0, weights=False,
        )  # fmt: skip
        return lambda: by_path(call, path, shift=shift, window=128)[0]

    ways = {
        "plain": plain(),
        "plain (again)": plain(),
        "plain, flash": plain(SDPBackend.FLASH_ATTENTION),
        "plain, cudnn": plain(SDPBackend.CUDNN_ATTENTION),
        **{f"string, {path}": shifted(path) for path in ("triton", "flash", "cudnn")},
    }
    running = {}
    for name, way in ways.items():
        try:
            start = clock(True)
            way()
            print(f"first call of {name}, {rows} rows, {keys} keys, size {size}: {(clock(True) - start) * 1e3:.0f} ms")
            running[name] = way
        except (RuntimeError, TypeError, NotImplementedError) as error:
            print(f"{name} does not run here: {str(error).splitlines()[0][:150]}")
    return running


def events(work: dict[str, Callable[[], Any]], repeats: int, calls: int) -> dict[str, list[float]]:
    """Seconds of a call on the GPU's own clock, in turn; the launches of a call that is short are part of them."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, function in work.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            stop.record()
            torch.cuda.synchronize()
            if repeat:
                seconds[name].append(start.elapsed_time(stop) / 1000 / calls)
    return seconds


@torch.no_grad()
def layers(lengths: list[int], repeats: int) -> dict[str, Any]:
    """Times and memory of one layer's attention: {size of head: {tokens: {prefill, memory, decoding}}}."""
    found: dict[str, Any] = {}
    for size in (64, 128):
        for length in lengths:
            work = attentions(length, length, size)
            cell = {"prefill": ratios(events(work, repeats, 2)), "memory": {k: allocated(f) for k, f in work.items()}}
            # Two operations for each feature of each pair, for scores and for the mix.
            operations = 2 * 2 * size * 32 * length * (length + 1) / 2
            for name, times in cell["prefill"].items():
                times["tflops"] = operations / times["seconds"] / 1e12
                print(
                    f"layer {size:3} {length:7,} {name:16}prefill {times['seconds'] * 1e3:8.3f} ms "
                    f"{times['tflops']:4.0f} TFLOP/s {times['ratio_to_plain']:.3f}  memory {cell['memory'][name]:,}"
                )
            del work
            work = attentions(1, length, size)
            cell["decoding"] = ratios(events(work, repeats, 50))
            # Keys and values are read once.
            moved = 2 * 2 * 8 * length * size
            for name, times in cell["decoding"].items():
                times["gbytes_per_second"] = moved / times["seconds"] / 1e9
                print(
                    f"layer {size:3} {length:7,} {name:16}decoding {times['seconds'] * 1e6:7.1f} us "
                    f"{times['gbytes_per_second']:5.0f} GB/s {times['ratio_to_plain']:.3f}"
                )
            del work
            found.setdefault(str(size), {})[str(length)] = cell
    return found


@torch.no_grad()
def sweep(length: int) -> None:
    """Prints the speed of other cuts of the Triton kernel."""
    from modelwright.kernels import shifted_attention_triton as kernels

    launch = kernels.Launch
    many = [launch(m, n, w, s) for m, n, w, s in [(128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)]]
    few = [launch(64, n, w, s) for n, w, s in [(64, 4, 3), (64, 4, 2), (128, 4, 2), (32, 4, 4), (64, 2, 2), (32, 2, 3)]]
    for size in (128, 64):
        for rows, cuts in ((1, few), (length, many)):
            query, key, value = drawn(rows, length, size)
            turn = Turn(torch.ones(size).cuda(), torch.zeros(size).cuda(), torch.arange(size).int().cuda())
            programs = kernels.PROGRAMS
            for cut, each in [(cut, each) for cut in cuts for each in ((2, 3, 4, 6) if rows == 1 else (2,))]:
                kernels.PROGRAMS = each

                def call(q=query, k=key, v=value, t=turn, c=cut) -> torch.Tensor:  # type: ignore[no-untyped-def]
                    return kernels.shifted_attention(q, k, v, t, length // 3, scaling=q.shape[-1] ** -0.5, launch=c)

                try:
                    times = events({"it": call}, 5, 3 if rows > 1 else 50)["it"]
                    print(f"sweep {size:3} rows {rows:6} {tuple(cut)} {each}: {statistics.median(times) * 1e6:9.1f} us")
                except Exception as error:
                    print(f"sweep {size:3} rows {rows:6} {tuple(cut)} {each}: {str(error).splitlines()[0][:100]}")
            kernels.PROGRAMS = programs


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    gpu = result["device"] != "cpu"
    rows = [
        {
            "model": size,
            "tokens": length,
            "attention": name,
            "prefill (s)": found["prefill"][name]["seconds"],
            "prefill ÷ plain": found["prefill"][name]["ratio_to_plain"],
            "memory ÷ plain": found["memory"].get(name, {}).get("ratio_to_plain"),
            "decoding ÷ plain": found["decoding"][name]["ratio_to_plain"],
        }
        for size, lengths in result["models"].items()
        for length, found in lengths.items()
        for name in VARIANTS
    ]
    rows += [
        {
            "model": f"attention alone, heads of {size}",
            "tokens": length,
            "attention": name,
            "prefill (s)": found["prefill"][name]["seconds"],
            "prefill ÷ plain": found["prefill"][name]["ratio_to_plain"],
            "memory ÷ plain": found["memory"][name] / found["memory"]["plain"],
            "decoding ÷ plain": found["decoding"].get(name, {}).get("ratio_to_plain"),
        }
        for size, lengths in result.get("layers", {}).items()
        for length, found in lengths.items()
        for name in found["prefill"]
    ]
    title = "STRING: prefill and decoding against plain SDPA"
    return {
        "title": f"{title}, on a GPU" if gpu else title,
        "question": "What do shifted far positions cost?",
        "rows": rows,
        "notes": "'plain (again)' is the same measured twice: its ratio is the noise. Memory is what a prefill adds to "
        "the peak over the weights (attention alone: over its inputs). Entering the context is paid once and not in a "
        f"prefill: {', '.join(f'{s * 1e3:.0f} ms ({n})' for n, s in result['entering_seconds'].items())}.",
        "command": f"python benchmarks/shifted_positions.py{' --device cuda' if gpu else ''}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sweep", action="store_true", help="only try other cuts of the Triton kernel; needs a GPU")
    parser.add_argument("--repeats", type=int, help="rounds instead of the usual number")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths instead of the usual ones")
    parser.add_argument("--output", type=Path, help="by default in results/benchmarks/, or nowhere if it is --quick")
    parser.add_argument("--peak", nargs=3, metavar=("SIZE", "VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        report_peak(options.peak[0], options.peak[1], int(options.peak[2]))
        return

    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if options.sweep:
        sweep((options.lengths or [65536])[0])
        return
    if not gpu:
        torch.set_num_threads(1)
    usual = [512, 1024] if options.quick else [16384, 32768, 65536] if gpu else [4096, 8192, 16384]
    lengths = options.lengths or usual
    repeats = options.repeats or (3 if options.quick else 5)
    steps = 8 if options.quick else 32
    models: dict[str, Any] = {}
    once: dict[str, float] = {}
    for size in ON_GPU if gpu else ["quick" if options.quick else "cpu"]:
        model = build(size, max(lengths) + 64)
        once[size] = entering(model, repeats, gpu)
        print(f"{size:5} entering the context takes {once[size] * 1e3:.1f} ms")
        for length in lengths:
            ids = torch.randint(1024, (1, length), device=model.device)
            work: dict[str, Any] = {v: lambda v=v, ids=ids, model=model: prefill(model, v, ids) for v in VARIANTS}  # type: ignore[misc]
            times = timed_inside({v: reading(model, v, ids) for v in VARIANTS}, repeats)
            if gpu:
                peaks = {v: allocated(work[v]) for v in ("plain", "string")}
            else:
                peaks = {v: peak_of_process(size, v, length) for v in ("plain", "string")}
            decoded = timed_inside({v: decoding(model, v, ids, steps) for v in VARIANTS}, repeats)
            cell = {
                "prefill": ratios(times),
                "decoding": ratios(decoded),
                "memory": {
                    v: {"bytes": p, "ratio_to_plain": p / peaks["plain"] if peaks["plain"] else None}
                    for v, p in peaks.items()
                },
            }
            models.setdefault(size, {})[str(length)] = cell
            for name in VARIANTS:
                memory = cell["memory"].get(name, {}).get("ratio_to_plain")
                print(
                    f"{size:5} {length:7,} {name:15}prefill {cell['prefill'][name]['ratio_to_plain']:.3f}  "
                    f"decoding {cell['decoding'][name]['ratio_to_plain']:.3f}  "
                    f"memory {'' if memory is None else f'{memory:.3f}'}",
                    flush=True,
                )
        del model, work
    result = {
        "format": 1,
        "benchmark": "shifted-positions-gpu" if gpu else "shifted-positions",
        "quick": options.quick,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "machine": machine(),
        "versions": versions(),
        "clock": "wall, device synchronised" if gpu else "processor time of one thread",
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16" if gpu else "float32",
        "shapes": {size: shape(size, max(lengths) + 64) for size in models},
        "repeats": repeats,
        "decoded_tokens": steps,
        "models": models,
        "entering_seconds": once,
        **({"layers": layers(lengths, repeats)} if gpu else {}),
        "targets": {"prefill": PREFILL_TARGET, "memory": PREFILL_TARGET, "decoding": DECODE_TARGET},
    }
    output = options.output
    if output is None and not options.quick:
        output = Path(f"results/benchmarks/{result['benchmark']}.json")
    if output is not None:
        write_json(output, result | tables(result))


if __name__ == "__main__":
    main()
