"""Tokens per second of `modelwright train`'s loop as a ratio to a bare torch loop on the same model, in one run.

    python benchmarks/training.py [--quick] [--output results/benchmarks/training.json]

Both loops train the same model from the same weights on the same batches with the same optimizer; their weights at the
end are compared. Target: at least 95% of the bare loop. The floor is 100%: a loop around the model costs something.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from modelwright.files import write_json
from modelwright.models.new import new_config, new_model
from modelwright.provenance import machine, versions
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.packing import PackedBlocks
from modelwright.training.resume import decayed_parameters
from modelwright.training.trainer import rate

TARGET = 0.95
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
#: Name to the config, tokens a block, steps.
SHAPES: dict[str, tuple[dict[str, int], int, int]] = {
    "quickstart (0.3 M)": (dict(zip(_FIELDS, (64, 172, 4, 2, 2048), strict=True)), 64, 100),
    "1 M": (dict(zip(_FIELDS, (128, 344, 5, 4, 512), strict=True)), 256, 20),
}


def bare_loop(model: PreTrainedModel, tokens: np.ndarray, options: TrainingOptions) -> float:
    """Wall seconds of the shortest loop that does the same: batches, forward, backward, clip, AdamW, schedule."""
    steps = options.total_steps(len(tokens))
    data = PackedBlocks(tokens, options.block_size, steps * options.batch_size, options.seed)
    decayed = set(decayed_parameters(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is flag], "weight_decay": decay}
        for flag, decay in ((True, options.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, options))
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        batch = data.__getitems__(range(step * options.batch_size, (step + 1) * options.batch_size))
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % options.log_every == 0:
            loss.item()
    return time.perf_counter() - start


def measure(shape: dict[str, int], block_size: int, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of both loops, in turn and in alternating order, so that drift of the machine hits both alike."""
    tokens = np.random.default_rng(0).integers(3, shape["vocab_size"], 200_000).astype(np.uint16)
    options = TrainingOptions(steps=steps, batch_size=8, block_size=block_size, device="cpu", precision="float32")
    seconds: dict[str, list[float]] = {"bare": [], "modelwright": []}
    cpu: dict[str, list[float]] = {"bare": [], "modelwright": []}
    same = True
    for repeat in range(-1, repeats):  # the first is a warm-up
        weights = {}
        for name in list(seconds)[:: 1 if repeat % 2 else -1]:
            model = new_model(new_config("llama", {**shape, "tie_word_embeddings": True}))
            start = time.process_time()
            if name == "bare":
                spent = bare_loop(model, tokens, options)
            else:
                spent = train(model, tokens, options).train_seconds
            weights[name] = [p.detach() for p in model.parameters()]
            if repeat >= 0:
                seconds[name].append(spent)
                cpu[name].append(time.process_time() - start)
        same &= all(torch.equal(a, b) for a, b in zip(*weights.values(), strict=True))
    ratios = [b / m for b, m in zip(seconds["bare"], seconds["modelwright"], strict=True)]
    total = steps * options.batch_size * block_size
    return {
        "shape": shape,
        "block_size": block_size,
        "steps": steps,
        "tokens_per_second": {name: round(total / statistics.median(s), 1) for name, s in seconds.items()},
        "ratio": round(statistics.median(ratios), 4),
        # Of processor time, which other processes disturb less; here the Trainer's one-off preparation counts as well.
        "cpu_ratio": round(statistics.median(b / m for b, m in zip(*cpu.values(), strict=True)), 4),
        "ratios": [round(r, 4) for r in ratios],
        "milliseconds_per_step_over_bare": round(
            1000 * statistics.median(m - b for b, m in zip(*seconds.values(), strict=True)) / steps, 3
        ),
        "target": TARGET,
        "met": statistics.median(ratios) >= TARGET,
        "same_weights": same,
    }


def tables(found: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    rows = [
        {
            "model": name,
            "bare loop (tokens/s)": case["tokens_per_second"]["bare"],
            "modelwright train (tokens/s)": case["tokens_per_second"]["modelwright"],
            "ratio, median": case["ratio"],
            "lowest": min(case["ratios"]),
            "highest": max(case["ratios"]),
            "asked": case["target"],
            "ratio of processor time": case["cpu_ratio"],
            "same weights at the end": case["same_weights"],
        }
        for name, case in found.items()
    ]
    return {
        "title": "Training: modelwright train against a bare torch loop",
        "question": "What does the loop around the model cost?",
        "rows": rows,
        "command": "python benchmarks/training.py",
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/training.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for name, shape in SHAPES.items():
        found[name] = measure(*shape, repeats=2 if options.quick else 9)
        print(
            f"{name}: {found[name]['ratio']:.3f} of a bare loop (target {TARGET}; CPU seconds: "
            f"{found[name]['cpu_ratio']:.3f}), {found[name]['tokens_per_second']['modelwright']:,.0f} tokens/s, "
            f"same weights: {found[name]['same_weights']}"
        )
    result = {
        "benchmark": "training",
        "threads": options.threads,
        "results": found,
        **tables(found),
        "machine": machine(),
        "versions": versions(),
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
