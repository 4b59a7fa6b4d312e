"""What JEST costs: the sampler with running sums against the matrix of scores, and scoring against training.

    python benchmarks/jest.py [--quick] [--output results/benchmarks/jest.json]

Sampler: both draw the same batch from the same embeddings; time is the best of interleaved rounds, memory the most
bytes alive at once beyond the embeddings. Scoring: a SigLIP model of a ViT's shape; one training step on b pairs beside
the scoring pass over 5b, whole and in patches of twice the size (Flexi-JEST), and the sampler.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from modelwright.curation.jest.flexi import patch_size, relative_cost
from modelwright.curation.jest.sampler import JointSampler
from modelwright.curation.jest.scores import chunk_sizes, draw_chunk, pairwise_sigmoid_nll, select_from_scores
from modelwright.curation.jest.selection import flop_ratio
from modelwright.files import write_json
from modelwright.kernels.largest_tensor import LargestTensor
from modelwright.provenance import machine, versions
from modelwright.training.contrastive.encoded import Encoded

CHUNKS, RATIO = 16, 5


def embeddings(count: int, width: int, seed: int, device: str) -> Encoded:
    rows = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed)).to(device)
    queries, keys = normalize(rows, dim=-1)
    return Encoded(queries, keys, None, torch.tensor(10.0, device=device), torch.tensor(-10.0, device=device))


def with_matrix(learner: Encoded, reference: Encoded, size: int) -> torch.Tensor:
    scores = pairwise_sigmoid_nll(learner.queries, learner.keys, learner.scale, learner.bias)
    scores -= pairwise_sigmoid_nll(reference.queries, reference.keys, reference.scale, reference.bias)
    return select_from_scores(scores, size, CHUNKS, torch.Generator().manual_seed(0))


def with_matrix_and_sums(learner: Encoded, reference: Encoded, size: int) -> torch.Tensor:
    """The matrix too, but each of its entries is added once, as a careful writer would."""
    scores = pairwise_sigmoid_nll(learner.queries, learner.keys, learner.scale, learner.bias)
    scores -= pairwise_sigmoid_nll(reference.queries, reference.keys, reference.scale, reference.bias)
    logits = scores.diagonal().double()
    taken = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    generator, chosen = torch.Generator().manual_seed(0), []
    for wanted in chunk_sizes(size, CHUNKS):
        new = draw_chunk(logits, taken, wanted, generator, 1.0)
        taken[new] = True
        chosen.append(new)
        logits = logits + scores[:, new].sum(1) + scores[new].sum(0)
    return torch.cat(chosen)


def with_sums(learner: Encoded, reference: Encoded, size: int) -> torch.Tensor:
    return JointSampler(n_chunks=CHUNKS).select(learner, reference, size, torch.Generator().manual_seed(0))


def seconds_of(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of the fastest round of each, rounds interleaved; processor time of one thread on a CPU."""

    def clock() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    best: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first is for warming up, and is beaten by the others
        for name, run in runs.items():
            started = clock()
            run()
            took = clock() - started
            best[name] = min(best.get(name, took), took)
    return best


def bytes_of(run: Callable[[], Any], device: str) -> int:
    """Most bytes alive at once, beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with LargestTensor() as seen:
        run()
    return seen.peak_bytes


def sampler(counts: list[int], width: int, most_for_matrix: int, rounds: int, device: str) -> list[dict[str, Any]]:
    rows = []
    for count in counts:
        learner, reference = embeddings(count, width, 0, device), embeddings(count, width, 1, device)
        size = count // RATIO
        runs: dict[str, Callable[[], Any]] = {
            "sums": lambda a=learner, b=reference, n=size: with_sums(a, b, n)  # type: ignore[misc]
        }
        if count <= most_for_matrix:
            runs["matrix"] = lambda a=learner, b=reference, n=size: with_matrix_and_sums(a, b, n)  # type: ignore[misc]
            runs["plain"] = lambda a=learner, b=reference, n=size: with_matrix(a, b, n)  # type: ignore[misc]
        seconds = seconds_of(runs, rounds if count <= 10_240 else 1, device)
        memory = {name: bytes_of(run, device) for name, run in runs.items()}
        chosen = {name: run().cpu() for name, run in runs.items()}
        row: dict[str, Any] = {
            "super_batch": count,
            "batch": size,
            "width": width,
            "sums_seconds": seconds["sums"],
            "sums_mib": memory["sums"] / 2**20,
            "matrix_mib": 4 * count**2 / 2**20,  # one of float32, by arithmetic
        }
        if "matrix" in runs:
            both = set(chosen["sums"].tolist()) & set(chosen["matrix"].tolist())
            row |= {
                "matrix_seconds": seconds["matrix"],
                "plain_seconds": seconds["plain"],
                "matrix_way_mib": memory["matrix"] / 2**20,
                "speed_ratio": seconds["matrix"] / seconds["sums"],
                "memory_ratio": memory["matrix"] / memory["sums"],
                "shared_rows": len(both) / size,  # float32 rounds differently, so a late draw may differ
            }
        rows.append(row)
        print(f"sampler, B = {count:,}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
    return rows


def vit(shape: dict[str, int], image_size: int) -> Any:
    from transformers import SiglipConfig, SiglipModel

    text = {**shape, "vocab_size": 1024, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
    config = SiglipConfig(
        text_config={**text, "eos_token_id": 2}, vision_config={**shape, "image_size": image_size, "patch_size": 16}
    )
    torch.manual_seed(0)
    return SiglipModel(config)


def scoring(shapes: dict[str, dict[str, int]], image_size: int, batch: int, rounds: int, device: str) -> list[dict]:
    """Seconds of the parts of a step; the reference's embeddings are cached, as they should be."""
    rows = []
    for name, shape in shapes.items():
        model = vit(shape, image_size).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        pixels = torch.randn(RATIO * batch, 3, image_size, image_size, device=device)
        ids = torch.randint(3, 1024, (RATIO * batch, 32), device=device)
        reference = embeddings(RATIO * batch, shape["hidden_size"], 1, device)

        def encode(count: int, model: Any = model, pixels: Any = pixels, ids: Any = ids) -> Encoded:
            images = normalize(model.get_image_features(pixel_values=pixels[:count]).pooler_output, dim=-1)
            texts = normalize(model.get_text_features(input_ids=ids[:count]).pooler_output, dim=-1)
            return Encoded(images, texts, None, model.logit_scale.exp().reshape(()), model.logit_bias.reshape(()))

        def train(encode: Any = encode, optimizer: Any = optimizer) -> None:
            out = encode(batch)
            (pairwise_sigmoid_nll(out.queries, out.keys, out.scale, out.bias).sum() / batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def score(encode: Any = encode) -> Encoded:
            with torch.no_grad():
                return encode(RATIO * batch)

        def score_coarse(model: Any = model, score: Any = score) -> Encoded:
            with patch_size(model, 32):
                return score()

        learner = score()
        runs: dict[str, Callable[[], Any]] = {
            "train": train,
            "score": score,
            "score_coarse": score_coarse,
            "sample": lambda a=learner, b=reference: with_sums(a, b, batch),  # type: ignore[misc]
        }
        seconds = seconds_of(runs, rounds, device)
        whole = seconds["train"] + seconds["score"] + seconds["sample"]
        rows.append(
            {
                "model": name,
                "batch": batch,
                **{f"{part}_seconds": value for part, value in seconds.items()},
                "step_ratio": whole / seconds["train"],
                "step_ratio_coarse": (whole - seconds["score"] + seconds["score_coarse"]) / seconds["train"],
                "sampler_share": seconds["sample"] / whole,
                "coarse_ratio": seconds["score_coarse"] / seconds["score"],
                "coarse_ratio_flops": relative_cost(model, 32, 32),
                "step_ratio_flops": flop_ratio(RATIO),
                "step_ratio_flops_coarse": flop_ratio(RATIO, scoring=relative_cost(model, 32, 32)),
            }
        )
        print(f"scoring, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in list(rows[-1].items())[2:]))
        del model, optimizer
    return rows


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    sampling = [
        {
            "super-batch": row["super_batch"],
            "running sums (s)": row["sums_seconds"],
            "matrix (s)": row.get("matrix_seconds"),
            "the plain definition (s)": row.get("plain_seconds"),
            "matrix ÷ sums, time": row.get("speed_ratio"),
            "running sums (MiB)": row["sums_mib"],
            "one B × B float32 matrix (MiB)": row["matrix_mib"],
            "matrix ÷ sums, memory": row.get("memory_ratio"),
        }
        for row in result["sampler"]
    ]
    steps = [
        {
            "model": row["model"],
            "training step (s)": row["train_seconds"],
            "scoring 5b (s)": row["score_seconds"],
            "in patches of 32 (s)": row["score_coarse_seconds"],
            "sampler (s)": row["sample_seconds"],
            "JEST's step ÷ plain": row["step_ratio"],
            "in FLOPs": row["step_ratio_flops"],
            "Flexi-scored ÷ plain": row["step_ratio_coarse"],
            "in FLOPs, Flexi": row["step_ratio_flops_coarse"],
        }
        for row in result["scoring"]
    ]
    return {
        "title": "JEST: the sampler and the cost of scoring",
        "question": "What does choosing a fifth of each super-batch cost, in time and memory?",
        "tables": {"Sampler, a fifth chosen in 16 rounds": sampling, "A step, reference cached": steps},
        "notes": "Memory beyond the embeddings. Scores in float32 round differently in the two ways, so late draws may "
        "differ; in float64 they are the same (tested).",
        "command": "python benchmarks/jest.py",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; numbers mean little")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/jest.json"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}
    base = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    if options.quick:
        counts, width, most, image_size, batch, rounds = [320, 640], 32, 640, 64, 8, 1
        shapes = {"2 layers of 64": small}
    elif device == "cpu":
        counts, width, most, image_size, batch, rounds = [640, 2560, 10_240, 20_480], 64, 10_240, 128, 32, 3
        shapes = {"2 layers of 64": small, "ViT-Ti/16": tiny}
    else:
        counts, width, most, image_size, batch, rounds = [640, 10_240, 40_960, 163_840], 512, 40_960, 224, 256, 5
        shapes = {"ViT-Ti/16": tiny, "ViT-S/16": base}
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "jest",
        "quick": options.quick,
        "sampler": sampler(counts, width, most, rounds, device),
        "scoring": scoring(shapes, image_size, batch, rounds, device),
        "clock": "wall" if device == "cuda" else "processor time of one thread",
        "machine": machine(),
        "versions": versions(),
    }
    write_json(options.output, result | tables(result))


if __name__ == "__main__":
    main()
