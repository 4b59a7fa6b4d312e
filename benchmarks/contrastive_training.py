"""What GradCache costs in time and saves in memory, and one optimizer step of a CLIP-shaped model at batch 65,536.

    python benchmarks/contrastive_training.py [--quick] [--output results/benchmarks/contrastive-training.json]

Time: the gradient of one batch of a small CLIP by GradCache, in mini-batches, against one plain backward pass through
the whole batch, with the same tiled loss, in turn in one process; the gradients are compared. The floor is the one
forward pass more that GradCache makes: (2 F + B) / (F + B), with F and F + B measured in the same rounds; 4/3 where
B = 2 F. Mini-batches may fit the processor's cache where the whole batch does not, so a ratio below it is possible.

Memory: peak of resident memory above that before, each measurement in a process of its own: one gradient, plain (to
batch 4,096) and by GradCache; and a whole step of the trainer at batch 65,536 of a tiny CLIP, with pictures of 32 x 32
pixels made and prepared on the way.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modelwright.files import write_json
from modelwright.models.new_pairs import new_pair_model
from modelwright.models.tokenizers import byte_tokenizer
from modelwright.provenance import machine, versions
from modelwright.training.contrastive.arguments import ContrastiveTrainingArguments
from modelwright.training.contrastive.encoders import PairEncoder, pair_encoder
from modelwright.training.contrastive.grad_cache import cached
from modelwright.training.contrastive.trainer import ContrastiveTrainer, default_loss
from modelwright.training.inf_cl.measure import peak_memory

SHOWPIECE = 65_536


class NoisyPictures:
    """Pictures of noise with captions, made from their number: nothing is stored."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns some pairs."""
        return [{"query": self._picture(int(i)), "key": f"picture {i}, of noise"} for i in indices]

    def _picture(self, i: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8))


def make_encoder(hidden: int = 32) -> PairEncoder:
    """A CLIP of two layers a tower, for pictures of 32 x 32 pixels in patches of 8."""
    settings = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 16,
        "projection_dim": 64,
        "max_position_embeddings": 32,
        "vision_config.image_size": 32,
        "vision_config.patch_size": 8,
    }
    return pair_encoder(*new_pair_model("clip", settings, byte_tokenizer())).train()


def batch_of(encoder: PairEncoder, size: int) -> dict[str, Tensor]:
    """Model inputs of a batch."""
    return encoder.collator(NoisyPictures(size).rows(range(size)))


def gradient(encoder: PairEncoder, batch: dict[str, Tensor], mini: int | None) -> list[Tensor]:
    """The gradient of the loss of a batch; ``mini`` None is the plain way."""
    encoder.zero_grad()
    size = len(batch["pixel_values"])
    step = mini or size
    parts = [{k: v[i : i + step] for k, v in batch.items()} for i in range(0, size, step)]
    encoded = cached(encoder, parts)
    default_loss(encoder)(encoded.queries, encoded.keys, encoded.scale).backward()
    return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


def overhead(size: int, minis: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of plain and GradCache, in turn, and of one forward pass without a graph."""
    encoder = make_encoder(hidden=128)
    batch = batch_of(encoder, size)
    ways: dict[str, int | None] = {"plain": None, **{f"mini-batch {m}": m for m in minis}}
    wall: dict[str, list[float]] = {name: [] for name in (*ways, "forward")}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    expected = gradient(encoder, batch, None)
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    difference = dict.fromkeys(ways, 0.0)
    for turn in range(-1, rounds):  # the first is a warm-up
        for name in list(wall)[:: 1 if turn % 2 else -1]:
            started, used = time.perf_counter(), time.process_time()
            if name == "forward":
                with torch.no_grad():
                    encoder(batch)
                found = None
            else:
                found = gradient(encoder, batch, ways[name])
            if turn >= 0:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
            if found is not None:
                apart = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm().item()
                difference[name] = max(difference[name], apart / norm)
    floor = 1 + statistics.median(f / p for f, p in zip(wall["forward"], wall["plain"], strict=True))
    return [
        {
            "way": name,
            "batch": size,
            "seconds": round(statistics.median(wall[name]), 4),
            "÷ plain": round(statistics.median(a / b for a, b in zip(wall[name], wall["plain"], strict=True)), 4),
            "÷ plain, processor time": round(
                statistics.median(a / b for a, b in zip(cpu[name], cpu["plain"], strict=True)), 4
            ),
            "floor": 1.0 if name == "plain" else round(floor, 4),
            "4/3": 1.0 if name == "plain" else round(4 / 3, 4),
            "gradient differs by (relative)": float(f"{difference[name]:.2g}"),
        }
        for name in ways
    ]


def memory(size: int, mini: int | None) -> dict[str, Any]:
    """Extra memory and seconds of one gradient, in this process."""
    encoder = make_encoder()
    batch = batch_of(encoder, size)
    gradient(encoder, {k: v[:64] for k, v in batch.items()}, 32)
    # What making the inputs left free would hide what the gradient takes.
    ctypes.CDLL(None).malloc_trim(0)
    started = time.perf_counter()
    with peak_memory() as peak:
        gradient(encoder, batch, mini)
    return {"extra_mib": peak.mib, "seconds": time.perf_counter() - started}


def one_step(size: int, mini: int) -> dict[str, Any]:
    """Extra memory and seconds of one optimizer step of the trainer, reading included, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastiveTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            mini_batch_size=mini,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            optim="adamw_torch",
        )
        small = ContrastiveTrainingArguments(**{**args.to_dict(), "per_device_train_batch_size": 64})
        ContrastiveTrainer(make_encoder(), small, train_dataset=NoisyPictures(64)).train()
        trainer = ContrastiveTrainer(make_encoder(), args, train_dataset=NoisyPictures(size))
        with peak_memory() as peak:
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
    log = trainer.state.log_history[0]
    high = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return {
        "extra_mib": peak.mib,
        "process_mib": high,
        "seconds": seconds,
        "loss": log["loss"],
        "loss_of_chance": float(np.log(size)),
        "parameters": sum(p.numel() for p in trainer.encoder.parameters()),
    }


def in_fresh_process(work: str, threads: int, *arguments: int | None) -> dict[str, Any]:
    """Runs one of the functions above in a process of its own."""
    command = [sys.executable, __file__, "--work", json.dumps([work, threads, arguments])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{work}{arguments} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller batches")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="batch of the whole step")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/contrastive-training.json"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, threads, arguments = json.loads(options.work)
        torch.set_num_threads(threads)
        print(json.dumps({"memory": memory, "one_step": one_step}[name](*arguments)))
        return
    torch.set_num_threads(options.threads)
    times = []
    for size in (256,) if options.quick else (512, 1024):
        times += overhead(size, (32, 128), 2 if options.quick else 5)
        for row in times[-3:]:
            print(f"batch {size}, {row['way']}: {row['seconds']:.3f} s, {row['÷ plain']:.3f} of plain")
    grown = []
    for size in (256, 512) if options.quick else (1024, 2048, 4096, 8192, 16384):
        row: dict[str, Any] = {"batch": size}
        for way, mini in (("plain", None), ("GradCache, mini-batch 128", 128)):
            if mini or size <= 4096:
                row[f"{way} (MiB)"] = round(in_fresh_process("memory", options.threads, size, mini)["extra_mib"], 1)
        grown.append(row)
        print(row)
    size = options.batch or (1024 if options.quick else SHOWPIECE)
    step = in_fresh_process("one_step", options.threads, size, 128)
    whole = {
        "batch": size,
        "mini-batch": 128,
        "parameters": step["parameters"],
        "seconds": round(step["seconds"], 1),
        "extra memory of the step (GiB)": round(step["extra_mib"] / 1024, 3),
        "whole process at its peak (GiB)": round(step["process_mib"] / 1024, 3),
        "b x b logits alone would be (GiB)": round(4 * size**2 / 2**30, 3),
        "loss": round(step["loss"], 4),
        "loss of chance, log b": round(step["loss_of_chance"], 4),
    }
    print(whole)
    write_json(
        options.output,
        {
            "benchmark": "contrastive-training",
            "title": "Contrastive training: what GradCache costs and saves",
            "question": "How long does a gradient take in mini-batches, and how much memory does a large batch need?",
            "threads": options.threads,
            "tables": {
                "Time of one gradient": times,
                "Memory of one gradient, above the inputs": grown,
                "One optimizer step of the whole trainer": [whole],
            },
            "command": "python benchmarks/contrastive_training.py",
            "machine": machine(),
            "versions": versions(),
        },
    )


if __name__ == "__main__":
    main()
