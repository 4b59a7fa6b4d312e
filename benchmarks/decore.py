"""What DeCoRe costs: model and twin as two rows of one batch, against two forward passes, and against plain generation.

    python benchmarks/decore.py [--device cuda] [--size 8b] [--quick] [--output results/benchmarks/decore.json]

A random model of Llama's shape (its text means nothing, its speed does), a long prompt, and the same number of new
tokens in every arm. Targets: on a GPU at batch 1, the two-row batch gives at least 1.6 times the tokens/s of two
separate passes; on a CPU it takes at most 1.15 times their time; the loop without a method keeps 95% of stock
``generate``. Arms take turns in every round; ratios are medians over rounds. Prompts are read before the clock starts,
so tokens/s are of writing alone; the time to read a prompt stands beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from modelwright.decoding.decore import DeCoReConfig, decore_generate
from modelwright.decoding.plain import PlainDecoding
from modelwright.files import write_json
from modelwright.provenance import machine, versions

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "8b": ((4096, 14336, 32, 32, 8), 128_256),
    "1b": ((2048, 8192, 16, 32, 8), 128_256),
    "15m": ((384, 1024, 8, 6, 6), 8192),
    "tiny": ((64, 128, 2, 4, 2), 512),
}
TARGETS = {"gpu_rows_to_streams_at_batch_1": 1.6, "cpu_time_rows_to_streams": 1.15, "loop_to_generate": 0.95}


def build(name: str, device: str) -> Any:
    """A Llama with random weights, drawn on the device: bfloat16 on a GPU, float32 on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, vocabulary = SHAPES[name]
    config = LlamaConfig(
        **dict(zip(FIELDS, shape, strict=True)), vocab_size=vocabulary, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def arms(model: Any, heads: int) -> dict[str, Any]:
    """Name to what ``generate`` takes as its loop."""
    every = [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(4)]
    some = every[:: max(1, len(every) // heads)][:heads]
    return {
        "generate": None,
        "plain loop": PlainDecoding(),
        "DeCoRe, two rows": decore_generate(DeCoReConfig(some)),
        "DeCoRe, two streams": decore_generate(DeCoReConfig(some, batch=False)),
    }


def timed(model: Any, ids: torch.Tensor, new: int, loop: Any) -> tuple[float, float, int]:
    """Returns seconds of reading the prompt and the first token, of writing the other tokens, and peak bytes."""
    device = ids.device
    marks: list[float] = []

    def mark(sequences: Any, scores: Any, **keys: Any) -> torch.Tensor:
        if not marks:
            _wait(device)
            marks.append(time.perf_counter())
        return torch.zeros(len(sequences), dtype=torch.bool, device=device)

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _wait(device)
    start = time.perf_counter()
    keys = {} if loop is None else {"custom_generate": loop}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        stopping_criteria=[mark], **keys,
    )  # fmt: skip
    _wait(device)
    end = time.perf_counter()
    assert out.shape[1] == ids.shape[1] + new
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return marks[0] - start, end - marks[0], peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(model: Any, batch: int, prompt: int, new: int, heads: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the result for one batch size."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(3, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    work = arms(model, heads)
    for loop in work.values():
        timed(model, ids[:, :64], 4, loop)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in work}
    for turn in range(rounds):
        for name in list(work)[:: 1 if turn % 2 else -1]:
            found[name].append(timed(model, ids, new, work[name]))
    written = {name: [times[1] for times in runs] for name, runs in found.items()}
    rows = []
    for name, times in written.items():
        against = {
            other: statistics.median(b / a for a, b in zip(times, written[other], strict=True)) for other in written
        }
        rows.append({
            "batch": batch,
            "decoding": name,
            "tokens/s": batch * (new - 1) / statistics.median(times),
            "÷ generate": against["generate"],
            "÷ two streams": against["DeCoRe, two streams"],
            "prompt read in s": statistics.median(run[0] for run in found[name]),
            "peak GiB": max(run[2] for run in found[name]) / 2**30 or None,
        })  # fmt: skip
        print(
            f"batch {batch:3d}  {name:<22}{rows[-1]['tokens/s']:9.1f} tokens/s  {against['generate']:.2f} of generate  "
            f"{against['DeCoRe, two streams']:.2f} of two streams  {rows[-1]['peak GiB'] or 0:.1f} GiB",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=sorted(SHAPES), help="shape of the model: 8b on a GPU, 15m on a CPU")
    parser.add_argument("--batch", type=int, action="append", help="batch sizes; 1, 8 and 32 on a GPU, 1 on a CPU")
    parser.add_argument("--prompt", type=int, help="tokens of prompts: 2,048 on a GPU, 256 on a CPU")
    parser.add_argument("--new", type=int, help="new tokens")
    parser.add_argument("--rounds", type=int, help="rounds instead of the usual number")
    parser.add_argument("--heads", type=int, default=20, help="heads that are off")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    gpu = options.device == "cuda"
    if not gpu:
        torch.set_num_threads(1)
    size = options.size or ("tiny" if options.quick else "8b" if gpu else "15m")
    batches = options.batch or ([1] if options.quick else [1, 8, 32] if gpu else [1, 4])
    prompt = options.prompt or (32 if options.quick else 2048 if gpu else 256)
    new = options.new or (8 if options.quick else 64)
    rounds = options.rounds or (1 if options.quick else 3 if gpu else 7)
    model = build(size, options.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{size}: {parameters / 1e6:,.0f}M parameters, {model.dtype}, prompt {prompt}, {new} new tokens")
    rows: list[dict[str, Any]] = []
    for batch in batches:
        rows += measure(model, batch, prompt, new, options.heads, rounds)
    first = {row["decoding"]: row for row in rows if row["batch"] == batches[0]}
    speed = first["DeCoRe, two rows"]["÷ two streams"]
    reached = {"rows_to_streams_at_first_batch": speed, "time_rows_to_streams": 1 / speed,
               "loop_to_generate": first["plain loop"]["÷ generate"]}  # fmt: skip
    print(", ".join(f"{name} {value:.2f}" for name, value in reached.items()))
    result = {
        "format": 1,
        "benchmark": "decore-gpu" if gpu else "decore",
        "title": f"DeCoRe: what the twin costs ({'GPU' if gpu else 'CPU'})",
        "question": "Are model and twin as rows of one batch faster than two passes, and how far is plain generation?",
        "rows": rows,
        "notes": "Random weights of a Llama's shape; greedy; the same new tokens in every arm. '÷ generate' and '÷ two "
        "streams' are tokens/s over theirs, the median over rounds. Prompts are read before the clock of tokens/s "
        "starts. The floor of the two rows is plain generation at twice the batch.",
        "command": f"python benchmarks/decore.py{' --device cuda' if gpu else ''}",
        "quick": options.quick,
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "size": size,
        "parameters": parameters,
        "dtype": str(model.dtype),
        "prompt": prompt,
        "new_tokens": new,
        "rounds": rounds,
        "heads_off": options.heads,
        "reached": reached,
        "targets": TARGETS,
    }
    write_json(options.output or Path(f"results/benchmarks/decore{'-gpu' if gpu else ''}.json"), result)


if __name__ == "__main__":
    main()
