"""Tokens per second of multi-draft decoding against transformers' own assisted generation, and the optimum's time.

    python benchmarks/multi_draft.py [--quick] [--output results/benchmarks/multi-draft.json]

The pair is trained briefly here, on the text of Python's library: random models would draft random tokens. Sampling at
temperature 1, draft temperature 1, one prompt at a time, L drafted tokens; the same target and draft for all. Targets:
ahead of assisted generation with two drafts or more; the optimum for 128,000 tokens in under 30 ms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modelwright.decoding.multi_draft import MultiDraftDecoding, Verifier, optimal_acceptance
from modelwright.files import write_json
from modelwright.models.new import new_config, new_model
from modelwright.models.tokenizers import train_bpe
from modelwright.provenance import machine, versions
from modelwright.worlds.stdlib_text import stdlib_text

MILLISECONDS = 30.0
LENGTH = 4
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {
    # Target of about 15M parameters without its embedding, draft of about 1M.
    "cpu": {"target": (384, 1024, 8, 6), "draft": (128, 344, 4, 4), "steps": 300, "batch": 8, "vocabulary": 2048},
    "gpu": {"target": (2048, 5504, 24, 16), "draft": (256, 688, 4, 4), "steps": 600, "batch": 32, "vocabulary": 8192},
    "quick": {"target": (64, 172, 3, 4), "draft": (32, 86, 1, 2), "steps": 10, "batch": 4, "vocabulary": 400},
}


def trained(shape: tuple[int, ...], size: dict[str, Any], ids: torch.Tensor, tokenizer: Any, device: str) -> Any:
    """A Llama after some steps on the ids; bfloat16 on a GPU."""
    sizes = {**dict(zip(_FIELDS, shape, strict=True)), "max_position_embeddings": 1024}
    model = new_model(new_config("llama", sizes, tokenizer)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if shape[0] > 64 else 4e-3, betas=(0.9, 0.95))
    draws = torch.Generator().manual_seed(0)
    for step in range(size["steps"]):
        for group in optimizer.param_groups:
            group.setdefault("base", group["lr"])
            group["lr"] = group["base"] * min(1, (step + 1) / 30) * (1 - 0.9 * step / size["steps"])
        starts = torch.randint(len(ids) - 129, (size["batch"], 1), generator=draws)
        batch = ids[starts + torch.arange(128)].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, last loss {float(loss.detach()):.2f}")
    model.generation_config.eos_token_id = None
    return model.eval() if device == "cpu" else model.eval().to(torch.bfloat16)


def variants(target: PreTrainedModel, draft: PreTrainedModel) -> dict[str, tuple[dict[str, Any], Any]]:
    """Name to the arguments of ``generate`` and the decoding loop whose statistics count, if there is one."""
    draft.generation_config.num_assistant_tokens = LENGTH
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    found: dict[str, tuple[dict[str, Any], Any]] = {
        "plain generate": ({}, None),
        "transformers, assisted": ({"assistant_model": draft}, None),
    }
    settings = [
        (1, "single"),
        (2, "specinfer"),
        (2, "spectr"),
        (2, "is"),
        (2, "balanced"),
        (3, "balanced"),
        (4, "balanced"),
    ]
    for count, verifier in settings:
        decode = MultiDraftDecoding(draft, num_drafts=count, draft_length=LENGTH, verifier=verifier)
        found[f"K = {count}, {verifier}"] = ({"custom_generate": decode}, decode)
    return found


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def laws(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft and target law over a vocabulary: peaked, and alike."""
    draws = torch.Generator().manual_seed(1)
    base = 3 * torch.randn(size, generator=draws, dtype=torch.float64)
    return (base + torch.randn(size, generator=draws, dtype=torch.float64)).softmax(0), (1.2 * base).softmax(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--rounds", type=int, help="rounds instead of the usual number")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/multi-draft.json"))
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = "quick" if options.quick else "gpu" if device == "cuda" else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    size: dict[str, Any] = SIZES[scale]
    rounds, new = options.rounds or (1 if options.quick else 8), 24 if options.quick else 128
    torch.manual_seed(0)
    chunks = 60 if options.quick else 3000
    texts = [row["text"] for row in stdlib_text(0, pool_chunks=chunks, target_chunks=1, heldout_chunks=1).pool]
    tokenizer = train_bpe(texts[:1500], size["vocabulary"])
    ids = torch.tensor(tokenizer("\n\n".join(texts[: -chunks // 20]), verbose=False)["input_ids"])
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"][:, :48].to(device) for text in texts[-rounds:]]
    target, draft = (trained(size[name], size, ids, tokenizer, device) for name in ("target", "draft"))

    work = variants(target, draft)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn, prompt in enumerate([prompts[0], *prompts]):
        for name in list(work)[:: 1 if turn % 2 else -1]:
            torch.manual_seed(turn)
            keys, decode = work[name]
            if turn == 1 and decode is not None:
                decode.stats.clear()
            start = time.perf_counter()
            out = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, max_new_tokens=new, **keys
            )
            if device == "cuda":
                torch.cuda.synchronize()
            assert out.shape[1] == prompt.shape[1] + new
            if turn:  # the first turn sets things up
                seconds[name].append(time.perf_counter() - start)
    stock = seconds["transformers, assisted"]
    rows = [
        {
            "decoding": name,
            "tokens/s": new / statistics.median(times),
            "÷ assisted": statistics.median(base / own for base, own in zip(stock, times, strict=True)),
            "tokens a call": work[name][1].stats.block_efficiency if work[name][1] else None,
            "kept": work[name][1].stats.acceptance_rate if work[name][1] else None,
        }
        for name, times in seconds.items()
    ]
    vocabulary = 2000 if options.quick else 128_000
    p, q = laws(vocabulary)
    repeats = 3 if options.quick else 25
    timing = {"optimum": median_ms(lambda: optimal_acceptance(p, q, 4), repeats)}
    tokens = p.topk(2).indices.tolist()
    for method in ("balanced", "is", "priority", "spectr", "specinfer", "single"):
        verifier = Verifier(method=method)
        timing[method] = median_ms(lambda verifier=verifier: verifier.verify(tokens, [p, p], q), repeats)
    for row in rows:
        kept = "" if row["kept"] is None else f"{row['tokens a call']:8.2f} tokens a call, {row['kept']:.1%} kept"
        print(f"{row['decoding']:<26}{row['tokens/s']:8.1f} tokens/s  {row['÷ assisted']:6.2f}{kept}")
    print(f"over {vocabulary:,} tokens, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in timing.items()))
    result = {
        "format": 1,
        "benchmark": "multi-draft",
        "title": "Multi-draft decoding: speed against assisted generation",
        "question": "Do several drafts pay, and what does verification cost?",
        "rows": rows,
        "notes": "The pair was trained briefly on the same text; another pair has other gains. '÷ assisted' is the "
        "median over prompts. Assisted generation drafts as many tokens a step, and never stops early.",
        "command": "python benchmarks/multi_draft.py",
        "quick": options.quick,
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "parameters": {
            name: sum(p.numel() for p in m.parameters()) for name, m in (("target", target), ("draft", draft))
        },
        "draft_length": LENGTH,
        "new_tokens": new,
        "prompts": len(prompts),
        "seconds": seconds,
        "verification_ms": timing,
        "vocabulary_of_verification": vocabulary,
        "targets": {"optimum_ms": MILLISECONDS, "ratio_to_assisted_with_two_drafts": 1.0},
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
