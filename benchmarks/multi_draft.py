"""What several drafts gain: tokens a call, acceptance, and tokens per second beside transformers' assisted generation.

    python benchmarks/multi_draft.py [--device cuda] [--quick] [--output results/benchmarks/multi-draft.json]

A pair of Llamas is trained briefly on the text of Python's library, held-out files aside: random models would draft
random tokens. Sampling at temperature 1, one prompt at a time for the speed, prompts from held-out files. Targets:
ahead of assisted generation with two drafts or more; the optimum for 128,000 tokens in under 30 ms. Made for about 3
minutes on an H100, 20 on one core of a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modelwright.decoding.generate import Sampling
from modelwright.decoding.multi_draft import MultiDraftDecoding, Verifier, optimal_acceptance
from modelwright.decoding.multi_draft.analyse import laws_along
from modelwright.files import write_json
from modelwright.models.new import new_config, new_model
from modelwright.models.tokenizers import train_bpe
from modelwright.provenance import machine, versions
from modelwright.worlds.stdlib_text import stdlib_text

MILLISECONDS = 30.0
LENGTH = 4
PROMPT = 48
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
#: Shapes of target and draft, their steps of training, sequences a step, vocabulary, chunks of text; then rounds of the
#: speed, new tokens in each, blocks of each verifier, prompts at once for these, places of which acceptance is known.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        # About 15M and 1M parameters.
        "target": (384, 1024, 8, 6), "draft": (128, 344, 4, 4), "steps": (400, 300), "batch": 8, "vocabulary": 2048,
        "chunks": 3000, "rounds": 8, "new": 128, "blocks": 3000, "rows": 40, "places": 400,
    },
    "cuda": {
        "target": (1024, 2816, 24, 16), "draft": (512, 1376, 4, 8), "steps": (500, 300), "batch": 48,
        "vocabulary": 8192, "chunks": 6000, "rounds": 5, "new": 128, "blocks": 3000, "rows": 100, "places": 300,
    },
    "quick": {
        "target": (64, 172, 3, 4), "draft": (32, 86, 1, 2), "steps": (10, 10), "batch": 4, "vocabulary": 400,
        "chunks": 60, "rounds": 1, "new": 24, "blocks": 20, "rows": 4, "places": 6,
    },
}  # fmt: skip
#: Verifiers of the tables, with the optimum last.
METHODS = ("single", "specinfer", "spectr", "is", "priority", "balanced")


def trained(shape: tuple[int, ...], steps: int, size: dict[str, Any], ids: torch.Tensor, tokenizer: Any) -> Any:
    """A Llama after some steps on the ids; bfloat16 on a GPU."""
    sizes = {**dict(zip(_FIELDS, shape, strict=True)), "max_position_embeddings": 1024}
    device = ids.device.type
    model = new_model(new_config("llama", sizes, tokenizer)).to(device).train()
    rate = 4e-3 if shape[0] <= 64 else 2e-3 if shape[0] <= 128 else 1e-3 if shape[0] <= 512 else 6e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    draws = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 30) * (1 - 0.9 * step / steps)
        starts = torch.randint(len(ids) - 129, (size["batch"], 1), generator=draws)
        batch = ids[(starts + torch.arange(128)).to(device)]
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, last loss {float(loss.detach()):.2f}, "
        f"{time.perf_counter() - began:.0f} s of training", flush=True,
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    return model.eval() if device == "cpu" else model.eval().to(torch.bfloat16)


def speed(target: PreTrainedModel, draft: PreTrainedModel, prompts: list[torch.Tensor], new: int) -> dict[str, Any]:
    """Seconds of every way to generate, prompt by prompt and interleaved; rows for the table."""
    settings = [(1, "single"), *((2, m) for m in ("specinfer", "spectr", "is", "balanced"))]
    settings += [(3, "balanced"), (4, "balanced")]
    decodings = {
        f"K = {count}, {verifier}": MultiDraftDecoding(draft, num_drafts=count, draft_length=LENGTH, verifier=verifier)
        for count, verifier in settings
    }
    stock = ("transformers, assisted", "transformers, assisted, as it comes")
    names = ["plain generate", *stock, *decodings]
    fixed = {
        "num_assistant_tokens": LENGTH,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    usual = {name: getattr(draft.generation_config, name, None) for name in fixed}
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def run(name: str, prompt: torch.Tensor, seed: int) -> float:
        torch.manual_seed(seed)
        keys: dict[str, Any] = {"custom_generate": decodings[name]} if name in decodings else {}
        if name in stock:
            keys = {"assistant_model": draft}
            for option, value in (fixed if name == stock[0] else usual).items():
                setattr(draft.generation_config, option, value)
        start = time.perf_counter()
        out = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, max_new_tokens=new, **keys
        )
        if prompt.device.type == "cuda":
            torch.cuda.synchronize()
        assert out.shape[1] == prompt.shape[1] + new
        return time.perf_counter() - start

    for name in names:  # what the first call sets up
        run(name, prompts[0], 0)
    for decode in decodings.values():
        decode.stats.clear()
    for turn, prompt in enumerate(prompts):
        for name in names[:: 1 if turn % 2 else -1]:
            seconds[name].append(run(name, prompt, turn + 1))
    best = min(stock, key=lambda name: statistics.median(seconds[name]))
    rows = []
    for name, times in seconds.items():
        stats = decodings[name].stats if name in decodings else None
        rows.append(
            {
                "decoding": name,
                "tokens/s": new / statistics.median(times),
                "÷ plain": statistics.median(a / b for a, b in zip(seconds[names[0]], times, strict=True)),
                "÷ the faster assisted": statistics.median(a / b for a, b in zip(seconds[best], times, strict=True)),
                "tokens a call": stats.block_efficiency if stats else None,
                "ms a call": 1e3 * sum(times) / stats.blocks if stats else None,
            }
        )
    found = {"rows": rows, "seconds": seconds, "faster_assisted": best}
    if target.device.type == "cuda":
        decode = decodings["K = 2, balanced"]
        decode.stats.clear()
        work = {
            "K = 2, balanced": lambda: run("K = 2, balanced", prompts[0], 1),
            best: lambda: run(best, prompts[0], 1),
        }
        found["device_calls_a_token"] = {name: _calls(once, new) for name, once in work.items()}
        found["blocks_of_it"] = decode.stats.blocks
    return found


def _calls(work: Callable[[], Any], tokens: int) -> dict[str, float]:
    """Kernel launches and waits for the device, a token."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as p:
        work()
    counts = {"launches": 0, "waits": 0}
    for event in p.key_averages():
        counts["launches"] += event.count * event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
        counts["waits"] += event.count * (event.key == "cudaStreamSynchronize")
    return {name: count / tokens for name, count in counts.items()}


def blocks(
    target: PreTrainedModel, draft: PreTrainedModel, prompts: torch.Tensor, size: dict[str, Any], top_k: int
) -> dict[str, float]:
    """Tokens a call of every verifier with two drafts, over at least so many blocks."""
    found = {}
    for method in (*METHODS, "optimal") if top_k else METHODS:
        decode = MultiDraftDecoding(
            draft, num_drafts=1 if method == "single" else 2, draft_length=LENGTH, verifier=method
        )
        torch.manual_seed(0)
        while decode.stats.blocks < size["blocks"]:
            target.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=top_k,
                max_new_tokens=size["new"], custom_generate=decode,
            )  # fmt: skip
        found[method] = decode.stats.block_efficiency
        print(f"{method}: {found[method]:.3f} tokens a call over {decode.stats.blocks} blocks", flush=True)
    return found


def acceptance(
    target: PreTrainedModel, draft: PreTrainedModel, texts: torch.Tensor, places: int, top_k: int
) -> Iterator[tuple[int, str, float]]:
    """Mean probability of keeping a drafted token, over places of text that the target itself wrote."""
    sampling = Sampling(temperature=1.0, top_k=top_k)
    every = max(1, texts.shape[0] * (texts.shape[1] - PROMPT) // places)
    laws = [pair for ids in texts for pair in laws_along(target, draft, ids, PROMPT, sampling)][::every]
    laws = [(p.cpu(), q.cpu()) for p, q in laws]
    for count in (1, 2, 4):
        for method in METHODS:
            verifier = Verifier(method=method)
            yield count, method, statistics.mean(verifier.prepare([p] * count, q).acceptance() for p, q in laws)
        yield count, "optimum", statistics.mean(optimal_acceptance(p, q, count) for p, q in laws)


def tables(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: torch.Tensor,
    size: dict[str, Any],
    limits: tuple[int, ...],
) -> dict[str, list[dict[str, Any]]]:
    """A table for each top-k: verifiers with their acceptance by number of drafts, and their tokens a call."""
    found: dict[str, list[dict[str, Any]]] = {}
    for top_k in limits:
        written = target.generate(
            prompts[:8], attention_mask=torch.ones_like(prompts[:8]), do_sample=True, top_k=top_k,
            max_new_tokens=size["new"],
        )  # fmt: skip
        rows = {method: {"verifier": method} for method in (*METHODS, "optimum")}
        for count, method, value in acceptance(target, draft, written, size["places"], top_k):
            rows[method][f"kept, K = {count}"] = value
        for method, value in blocks(target, draft, prompts, size, top_k).items():
            rows["optimum" if method == "optimal" else method]["tokens a call, K = 2"] = value
        what = f"top-k {top_k}" if top_k else "the whole vocabulary"
        found[f"Acceptance over {what}, L = {LENGTH}"] = list(rows.values())
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


def verification(vocabulary: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Milliseconds of the optimum and of verifying two tokens, over a large vocabulary."""
    p, q = (law.to(device) for law in laws(vocabulary))
    rows = [{"what": "optimum, K = 4", "ms": median_ms(lambda: optimal_acceptance(p, q, 4), repeats)}]
    tokens = p.topk(2).indices.tolist()
    for method in METHODS:
        verifier = Verifier(method=method)
        work = lambda verifier=verifier: verifier.verify(tokens, [p, p], q, lambda: 0.5)  # noqa: E731
        rows.append({"what": method, "ms": median_ms(work, repeats)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--rounds", type=int, help="rounds of the speed instead of the usual number")
    parser.add_argument("--top-k", type=int, action="append", help="tables for these; 0 is the whole vocabulary")
    parser.add_argument("--output", type=Path, help="default: results/benchmarks/multi-draft[-gpu].json")
    options = parser.parse_args()
    device = options.device
    output = options.output or Path(f"results/benchmarks/multi-draft{'-gpu' if device == 'cuda' else ''}.json")
    if device == "cpu":
        torch.set_num_threads(1)
    size = SIZES["quick" if options.quick else device]
    torch.manual_seed(0)
    rows = stdlib_text(0, pool_chunks=size["chunks"], target_chunks=1, heldout_chunks=1).pool
    # Every twelfth file or topic is held out: chunks of one file are too alike to be on both sides.
    heldout = set(sorted({row["name"] for row in rows})[::12])
    read = [row["text"] for row in rows if row["name"] not in heldout]
    tokenizer = train_bpe(read[:1500], size["vocabulary"])
    ids = torch.tensor(tokenizer("\n\n".join(read), verbose=False)["input_ids"]).to(device)
    starts = [tokenizer(row["text"])["input_ids"][:PROMPT] for row in rows if row["name"] in heldout]
    starts = [start for start in starts if len(start) == PROMPT]
    print(f"{len(ids)} tokens, {len(starts)} prompts", flush=True)
    target, draft = (
        trained(size[name], steps, size, ids, tokenizer)
        for name, steps in zip(("target", "draft"), size["steps"], strict=True)
    )
    rounds = options.rounds or size["rounds"]
    fast = speed(target, draft, [torch.tensor([start]).to(device) for start in starts[:rounds]], size["new"])
    for row in fast["rows"]:
        call = "" if row["ms a call"] is None else f", {row['tokens a call']:.2f} tokens in {row['ms a call']:.1f} ms"
        print(
            f"{row['decoding']:<38}{row['tokens/s']:8.1f} tokens/s  {row['÷ the faster assisted']:6.2f}{call}",
            flush=True,
        )
    prompts = torch.tensor((starts * size["rows"])[rounds : rounds + size["rows"]]).to(device)
    # On a GPU the programs of two tables would take longer than all the rest.
    limits = tuple(options.top_k or ((0,) if device == "cuda" else (0, 10)))
    vocabulary = 2000 if options.quick else 128_000
    result = {
        "format": 1,
        "benchmark": "multi-draft",
        "title": f"Multi-draft decoding on a {'GPU' if device == 'cuda' else 'CPU'}: speed against assisted generation",
        "question": "Do several drafts pay, how near the optimum are the verifiers, and what does verification cost?",
        "rows": fast.pop("rows"),
        "tables": {
            **tables(target, draft, prompts, size, limits),
            f"Verifying two tokens of {vocabulary:,}": verification(vocabulary, 3 if options.quick else 15, device),
        },
        "notes": [
            "The pair was trained briefly on the same text; another pair has other gains. Ratios are medians over "
            "prompts, one at a time. 'transformers, assisted' drafts as many tokens a step as the others, 'as it "
            "comes' as many as its own schedule says; ratios are to the faster. All sample at temperature 1.",
            "'kept' is the mean probability of keeping a drafted token, computed from both laws along text the target "
            f"wrote; tokens a call are counted over at least {size['blocks']:,} blocks, and end with a prompt's last.",
        ],
        "command": f"python benchmarks/multi_draft.py --device {device}",
        "quick": options.quick,
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "parameters": {
            name: sum(p.numel() for p in m.parameters()) for name, m in (("target", target), ("draft", draft))
        },
        "size": size,
        "speed": fast,
        "targets": {"optimum_ms": MILLISECONDS, "ratio_to_assisted_with_two_drafts": 1.0},
    }
    for title, found in result["tables"].items():
        print(title)
        for row in found:
            print("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    write_json(output, result, force=True)


if __name__ == "__main__":
    main()
