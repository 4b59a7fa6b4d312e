"""Speed and memory of a model pruned to half, beside the dense one and beside rotation at the same parameters.

    python benchmarks/disp_llm.py [--device cuda] [--quick] [--output results/benchmarks/disp-llm.json]

Random weights: speed depends on shapes alone. Selections are drawn at random for each block, every one as wide (71%),
which is what half of the parameters is when nothing is learned. Models are timed turn by turn; ratios are medians over
turns. Target: reading (prefill) at least 1.4 times the dense model's tokens per second on a CPU. On a CPU about 4
minutes on two cores; on a GPU, with blocks as in a 7B model in bfloat16, about 2.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modelwright.compression.measure import decode, prefill, weight_bytes
from modelwright.compression.selections import blocks_of
from modelwright.compression.width_pruning import prune_width
from modelwright.files import write_json
from modelwright.provenance import machine, versions

TARGET = 1.4
RATIO = 0.5
#: Shape; tokens and sequences of the prefill; tokens and sequences of decoding; rounds.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "shape": (1024, 2816, 8, 16), "prefill": ((1, 512), (4, 256)), "decode": ((1, 16), (8, 16)), "rounds": 7,
    },
    "cuda": {
        "shape": (4096, 11008, 8, 32), "prefill": ((1, 2048), (8, 2048)), "decode": ((1, 32), (32, 32)), "rounds": 15,
    },
    "quick": {"shape": (64, 176, 2, 4), "prefill": ((1, 64),), "decode": ((2, 4),), "rounds": 2},
}  # fmt: skip


def dense_model(shape: tuple[int, ...], device: str) -> Any:
    """A Llama with random weights; bfloat16 on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, middle, layers, heads = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=4096, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    return model.to(torch.bfloat16) if device == "cuda" else model


def smaller_models(dense: Any) -> dict[str, Any]:
    """The dense model at half of its blocks' parameters, in several ways."""
    ids = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(0))
    models = {
        # As the command makes them in a model of this size.
        "DISP-LLM": prune_width(dense, "random", RATIO, round_to=8),
        "DISP-LLM, any width": prune_width(dense, "random", RATIO),
        "DISP-LLM, multiples of 64": prune_width(
            dense, "random", RATIO, round_to=min(64, dense.config.hidden_size // 4)
        ),
        "rotation (SliceGPT)": prune_width(dense, "slicegpt", RATIO, batches=[{"input_ids": ids}], round_to=8),
    }
    for model in models.values():
        model.generation_config.eos_token_id = None
    return models


def captured(model: Any, batch: int) -> Callable[[], None] | None:
    """One token through all blocks as a CUDA graph: what a serving engine without launch costs would see.

    None on a CPU.
    """
    if model.device.type != "cuda":
        return None
    size = getattr(model.config, "sliced_size", None) or model.config.hidden_size
    hidden = torch.randn(batch, 1, size, device="cuda", dtype=model.dtype)
    positions = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    rotary = model.model.rotary_emb(hidden, positions)

    @torch.no_grad()
    def once() -> None:
        x = hidden
        for layer in model.model.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph.replay


def timed(works: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each work in each round, turn by turn; the first round, which sets things up, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            works[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows_of(seconds: dict[str, list[float]], tokens: int, said: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table; ratios are medians over rounds."""
    dense = seconds["dense"]
    return [
        {
            "model": name,
            **said,
            "tokens/s": tokens / statistics.median(own),
            "times dense": statistics.median(a / b for a, b in zip(dense, own, strict=True)),
        }
        for name, own in seconds.items()
    ]


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = options.device
    size = SIZES["quick" if options.quick else device]
    name = f"disp-llm{'-gpu' if device == 'cuda' else ''}.json"
    output = options.output or Path("results/benchmarks") / name
    if options.quick and options.output is None:
        output = Path(f"disp-llm{'-gpu' if device == 'cuda' else ''}.quick.json")
    dense = dense_model(size["shape"], device)
    dense.generation_config.eos_token_id = None
    models = {"dense": dense, **smaller_models(dense)}
    total = sum(block.total for block in blocks_of(dense))
    memory = []
    for label, model in models.items():
        pruning = getattr(model.config, "pruning", None) or {"block_parameters": total}
        memory.append(
            {
                "model": label,
                "blocks' parameters": pruning["block_parameters"],
                "share": pruning["block_parameters"] / total,
                "weights MiB": weight_bytes(model) / 2**20,
            }
        )
    tables: dict[str, list[dict[str, Any]]] = {"Reading (prefill)": [], "Writing (decode, with the cache)": []}
    for batch, length in size["prefill"]:
        ids = torch.randint(4096, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)
        works = {label: (lambda model=model, ids=ids: prefill(model, ids)) for label, model in models.items()}
        seconds = timed(works, size["rounds"], device)
        tables["Reading (prefill)"] += rows_of(seconds, batch * length, {"sequences": batch, "tokens": length})
    for batch, new in size["decode"]:
        ids = torch.randint(4096, (batch, 16), generator=torch.Generator().manual_seed(2)).to(device)
        works = {label: (lambda m=model, ids=ids, new=new: decode(m, ids, new)) for label, model in models.items()}
        seconds = timed(works, size["rounds"], device)
        tables["Writing (decode, with the cache)"] += rows_of(seconds, batch * new, {"sequences": batch, "tokens": new})
    if device == "cuda":
        title = "One token through all blocks as a CUDA graph"
        tables[title] = []
        for batch in (1, 32):
            graphs = {label: captured(model, batch) for label, model in models.items()}
            works = {label: graph for label, graph in graphs.items() if graph is not None}
            many = {label: (lambda g=graph: [g() for _ in range(20)]) for label, graph in works.items()}
            seconds = timed(many, size["rounds"], device)
            tables[title] += rows_of(seconds, 20 * batch, {"sequences": batch, "tokens": 1})
    first = next(row for row in tables["Reading (prefill)"] if row["model"] == "DISP-LLM")
    result = {
        "format": 1,
        "benchmark": "disp-llm" + ("-gpu" if device == "cuda" else ""),
        "title": f"A model pruned to half on a {'GPU' if device == 'cuda' else 'CPU'}: speed and memory",
        "question": "Is a model at half of its blocks' parameters faster, not only smaller?",
        "rows": memory,
        "tables": tables,
        "notes": [
            "Random weights and selections; every selection is equally wide. Learned widths differ from block to "
            "block, with the same number of parameters and so nearly the same work. The head and attention over the "
            "cache are not made smaller; the head is computed for the last token only. Widths are multiples of 8, as "
            "the command makes them in models of this size.",
        ],
        "target": {"prefill_times_dense": TARGET, "reached": first["times dense"]},
        "command": f"python benchmarks/disp_llm.py --device {device}",
        "quick": options.quick,
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "shape": dict(zip(("hidden", "middle", "layers", "heads"), size["shape"], strict=True)),
        "dtype": str(dense.dtype).removeprefix("torch."),
    }
    for title, found in {"Parameters and memory": memory, **tables}.items():
        print(title)
        for row in found:
            print("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    print(f"target: {TARGET} times dense in reading; reached {first['times dense']:.2f}")
    write_json(output, result, force=True)


if __name__ == "__main__":
    main()
