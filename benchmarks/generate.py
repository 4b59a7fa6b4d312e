"""What generating through `modelwright generate`'s loop costs beside transformers' own `generate`, no method and plain.

    python benchmarks/generate.py [--device cuda] [--quick] [--output results/benchmarks/generate.json]

A Llama with random weights and no end token, the same prompts, greedy; both are timed with tokenizing and decoding, in
turn, and the ratio is the median over rounds. What the loop adds: prompts are checked, scores looked at for NaN, each
row ends by itself. Target: at least 0.95 of stock. Made for about 1 minute on one core that is free.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modelwright.decoding.generate import Sampling, generate, left_pad
from modelwright.decoding.parts import read_parts
from modelwright.files import write_json
from modelwright.models.new import new_config, new_model
from modelwright.models.tokenizers import byte_tokenizer
from modelwright.provenance import machine, versions

TARGET = 0.95
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"shape": (384, 1024, 8, 6), "new": 96, "rounds": 5, "batches": (1, 8)},
    "cuda": {"shape": (2048, 5632, 24, 16), "new": 128, "rounds": 7, "batches": (1, 8, 32)},
    "quick": {"shape": (64, 172, 2, 4), "new": 16, "rounds": 2, "batches": (1, 2)},
}


def stock(model: Any, tokenizer: Any, prompts: list[str], new: int) -> list[str]:
    """What anybody would write."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    ids, mask = (tensor.to(model.device) for tensor in left_pad(rows, tokenizer.pad_token_id))
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return list(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))


def ours(model: Any, tokenizer: Any, prompts: list[str], new: int, method: str | None) -> list[str]:
    """The same through the loop of `modelwright generate`."""
    with read_parts([method] if method else []).on(model, tokenizer) as applied:
        found = generate(
            model, tokenizer, prompts, Sampling(max_new_tokens=new), batch_size=len(prompts),
            generate_with=applied.generate,
        )  # fmt: skip
        return [completions[0].text for completions in found]


def seconds(run: Callable[[], list[str]], device: str) -> tuple[float, list[str]]:
    """Times one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    texts = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, texts


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    suffix = "-gpu" if options.device == "cuda" else ""
    output = options.output or Path(f"results/benchmarks/generate{suffix}.json")
    size = SIZES["quick" if options.quick else options.device]
    tokenizer = byte_tokenizer()
    sizes = {**dict(zip(_FIELDS, size["shape"], strict=True)), "max_position_embeddings": 2048}
    model = new_model(new_config("llama", sizes, tokenizer), seed=0).eval().to(options.device)
    if options.device == "cuda":
        model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    ways: dict[str, Callable[[list[str]], list[str]]] = {
        "transformers": lambda prompts: stock(model, tokenizer, prompts, size["new"]),
        "no method": lambda prompts: ours(model, tokenizer, prompts, size["new"], None),
        "method 'plain'": lambda prompts: ours(model, tokenizer, prompts, size["new"], "plain"),
    }
    rows = []
    for batch in size["batches"]:
        prompts = [f"Prompt {i}, with words of its own. " * (1 + i % 3) for i in range(batch)]
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(size["rounds"] + 1):  # the first round warms up
            texts = {}
            for name in [*ways][:: 1 if number % 2 else -1]:
                spent, texts[name] = seconds(partial(ways[name], prompts), options.device)
                if number:
                    taken[name].append(spent)
            assert options.device == "cuda" or len(set(map(tuple, texts.values()))) == 1, "they must write the same"
        for name, times in taken.items():
            ratios = [a / b for a, b in zip(taken["transformers"], times, strict=True)]
            rows.append(
                {
                    "batch": batch,
                    "through": name,
                    "tokens per second": batch * size["new"] / statistics.median(times),
                    "ratio to transformers": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                }
            )
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    worst = min(row["ratio to transformers"] for row in rows if row["through"] == "no method")
    result = {
        "format": 1,
        "benchmark": f"generate{suffix}",
        "title": f"Generation through our loop beside transformers' own on a {'GPU' if suffix else 'CPU'}",
        "question": "What does generating through modelwright cost where no method is on?",
        "rows": rows,
        "notes": [
            f"Greedy, {size['new']} new tokens, tokenizing included on both sides. The target, at least {TARGET} of "
            f"transformers' rate with no method, is {'met' if worst >= TARGET else 'not met'} here ({worst:.3f})."
        ],
        "command": f"python benchmarks/generate.py --device {options.device}",
        "quick": options.quick,
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "size": size,
        "targets": {"ratio": TARGET},
    }
    write_json(output, result, force=True)


if __name__ == "__main__":
    main()
