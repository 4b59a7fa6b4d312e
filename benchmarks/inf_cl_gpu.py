"""Memory and time of contrastive losses on a CUDA device: ours, the plain ones, open_clip's, and the published kernel.

    python benchmarks/inf_cl_gpu.py [--quick] [--peers FOLDER] [--output results/benchmarks/inf-cl-gpu.json]

Without a CUDA device it says so and does nothing. The peers are not dependencies. They are measured if they can be
imported, from the environment or from a folder made by
    python -m pip install --no-deps --target FOLDER inf_cl open_clip_torch

Every measurement is a process of its own: both directions, forward and backward, the best of some runs after one that
compiles. Memory is the most that torch allocates above the features. "8 b²c" are the operations of one sweep each way
(2 b²c forward, 6 b²c backward); the share is that of a large square product at the same precision on the same device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modelwright.files import write_json
from modelwright.provenance import machine, versions
from modelwright.training.inf_cl import tiled_contrastive_loss, tiled_sigmoid_loss
from modelwright.training.inf_cl.measure import full_matrix, measure, row_chunks

WIDTH = 512
BATCHES = (16_384, 32_768, 65_536, 131_072, 262_144, 1_048_576)
#: torch.set_float32_matmul_precision, which our kernels follow too: "highest" is tf32x3 in them, "high" is tf32.
PRECISIONS = {"highest": "float32", "high": "tf32"}
BIAS = -10.0


def published_kernel(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from inf_cl import cal_flash_loss

    directions = (cal_flash_loss(images, texts, scale=scale), cal_flash_loss(texts, images, scale=scale))
    return sum(d.mean() for d in directions) / 2


def open_clip_loss(name: str, **options: Any) -> Callable:
    from open_clip import loss

    module = getattr(loss, name)(**options)
    return lambda i, t, s: module(i, t, s, BIAS) if name == "SigLipLoss" else module(i, t, s)


#: Name, the loss (made when it is needed), precisions, largest batch that is tried: the smallest at which it must fail.
LOSSES: dict[str, tuple[Callable[[], Callable], tuple[str, ...], int]] = {
    "full matrix": (lambda: full_matrix, ("highest", "high"), 262_144),
    "row chunks of 4096, checkpointed": (lambda: row_chunks(4096), ("high",), 262_144),
    "open_clip ClipLoss": (lambda: open_clip_loss("ClipLoss"), ("high",), 262_144),
    "inf_cl, published kernel": (lambda: published_kernel, ("high",), 1_048_576),
    "ours, torch": (lambda: partial(tiled_contrastive_loss, backend="torch"), ("highest", "high"), 1_048_576),
    "ours, triton": (lambda: partial(tiled_contrastive_loss, backend="triton"), ("highest", "high"), 1_048_576),
    "ours, triton, bfloat16 features": (
        lambda: partial(tiled_contrastive_loss, backend="triton"), ("high",), 1_048_576,
    ),
    "open_clip SigLipLoss": (lambda: open_clip_loss("SigLipLoss"), ("high",), 262_144),
    "ours, sigmoid, torch": (
        lambda: lambda i, t, s: tiled_sigmoid_loss(i, t, s, BIAS, backend="torch"), ("high",), 1_048_576,
    ),
    "ours, sigmoid, triton": (
        lambda: lambda i, t, s: tiled_sigmoid_loss(i, t, s, BIAS, backend="triton"), ("high",), 1_048_576,
    ),
}  # fmt: skip


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in name else torch.float32


def matmul_rate(precision: str) -> float:
    """TFLOP/s of a large square product."""
    torch.set_float32_matmul_precision(precision)
    a, out = torch.randn(8192, 8192, device="cuda"), torch.empty(8192, 8192, device="cuda")
    best = float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, a, out=out)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return 2 * 8192**3 / best / 1e12


def one_case(name: str, precision: str, batch: int, repeats: int) -> None:
    """What the process of one measurement does; prints JSON, also of its failure."""
    torch.set_float32_matmul_precision(precision)
    try:
        loss = LOSSES[name][0]()
        found: dict[str, Any] = measure(loss, batch, WIDTH, repeats=repeats, device="cuda", dtype=dtype_of(name))
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    except ImportError as error:
        found = {"failed": f"not installed: {error.name}"}
    print(json.dumps(found))


def in_process(arguments: list[str], peers: Path | None) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, *(["--peers", str(peers)] if peers else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return {"failed": "more than 15 minutes"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    rows = [
        {
            "batch": case["batch"],
            "loss": case["loss_name"],
            "products": PRECISIONS[case["precision"]],
            "extra memory (GiB)": case.get("extra_mib", 0) / 1024 if "extra_mib" in case else case["failed"],
            "seconds": case.get("seconds"),
            "TFLOP/s at 8 b²c": case.get("tflops"),
            "share of a square product's": case.get("share"),
        }
        for case in result["cases"]
    ]
    return {
        "title": "Inf-CL: memory and time of contrastive losses on a GPU",
        "question": f"What does the loss need beyond its features of width {WIDTH}, forward and backward?",
        "rows": rows,
        "notes": "Square products: "
        + ", ".join(f"{PRECISIONS[p]} {rate:.0f} TFLOP/s" for p, rate in result["matmul_tflops"].items())
        + ". A loss that ran out of memory is not tried at larger batches.",
        "command": "python benchmarks/inf_cl_gpu.py --peers FOLDER",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest batch only; no result is written")
    parser.add_argument("--peers", type=Path, help="folder with the published packages")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/inf-cl-gpu.json"))
    parser.add_argument("--case", nargs=4, metavar=("LOSS", "PRECISION", "BATCH", "REPEATS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    # The benchmark beside this one has the published package's name, and must not be found in its place.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    if options.peers:
        sys.path.insert(0, str(options.peers))
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none here: nothing was measured.")
        return
    if options.case:
        name, precision, batch, repeats = options.case
        one_case(name, precision, int(batch), int(repeats))
        return

    rates = {precision: matmul_rate(precision) for precision in PRECISIONS}
    torch.cuda.empty_cache()
    cases: list[dict[str, Any]] = []
    failed: set[tuple[str, str]] = set()
    for batch in BATCHES[:1] if options.quick else BATCHES:
        for name, (_, precisions, largest) in LOSSES.items():
            for precision in precisions:
                if batch > largest or (name, precision) in failed:
                    continue
                repeats = 3 if batch <= 131_072 else 1
                found = in_process(["--case", name, precision, str(batch), str(repeats)], options.peers)
                if "seconds" in found:
                    tflops = 8 * batch**2 * WIDTH / found["seconds"] / 1e12
                    found |= {"tflops": tflops, "share": tflops / rates[precision]}
                else:
                    failed.add((name, precision))
                cases.append({"batch": batch, "loss_name": name, "precision": precision, **found})
                print(cases[-1], flush=True)
    result: dict[str, Any] = {
        "format": 1, "benchmark": "inf-cl-gpu", "width": WIDTH, "matmul_tflops": rates, "cases": cases,
    }  # fmt: skip
    result |= {**tables(result), "machine": machine(), "versions": versions()}
    if not options.quick:
        write_json(options.output, result)
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
