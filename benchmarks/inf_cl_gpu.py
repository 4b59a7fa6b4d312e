"""Memory, time and error of contrastive losses on a CUDA device: ours, the plain, open_clip's, the published kernel.

    python benchmarks/inf_cl_gpu.py [--quick | --tune] [--minutes 7] [--peers FOLDER] [--output FILE]

Without a CUDA device it says so and does nothing. The peers are not dependencies. They are measured if they are found,
in the environment or in a folder with ``inf_cl`` (the published kernel) and ``open_clip``, such as one made by
    python -m pip install --no-deps --target FOLDER inf_cl open_clip_torch

Every family of losses runs in a process of its own, so that one that fails leaves the others alone, and what has been
measured is written after each measurement. Both directions, forward and backward, the median of the runs after those
that compile. Memory is the most that torch allocates above the features. Errors are those of the gradient in a batch of
4,096 against float64, as ‖difference‖ / ‖gradient‖. "8 b²c" are the operations of one sweep each way (2 b²c forward,
6 b²c backward); the share is that of the largest rate of a square product at any precision that the loss may use.

``--tune`` times our kernels for several ways of cutting them, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from modelwright.files import write_json
from modelwright.provenance import machine, versions
from modelwright.training.inf_cl import tiled_contrastive_loss, tiled_sigmoid_loss
from modelwright.training.inf_cl.measure import full_matrix, row_chunks

WIDTH = 512
BATCHES = (1024, 4096, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
#: What the page of benchmarks shows of them.
SHOWN = (4096, 16_384, 65_536, 262_144, 1_048_576)
#: torch.set_float32_matmul_precision, which our kernels follow too, and what products of float32 then are.
PRECISIONS = {"highest": "float32", "high": "tf32"}
SCALE, BIAS = 14.3, -10.0

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def published_kernel() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        there = cal_flash_loss(images, texts, scale=scale).mean()
        return (there + cal_flash_loss(texts, images, scale=scale).mean()) / 2

    return loss


def open_clip_loss(name: str) -> Loss:
    # Its module of losses alone: the package imports tokenizers and towers that need not be there.
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    spec = importlib.util.spec_from_file_location("open_clip_loss", f"{found.submodule_search_locations[0]}/loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = getattr(module, name)()
    return (lambda i, t, s: loss(i, t, s, BIAS)) if name == "SigLipLoss" else loss


def full_sigmoid(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * images @ texts.T + BIAS
    signs = 2 * torch.eye(len(images), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def ours(backend: str) -> Loss:
    return partial(tiled_contrastive_loss, backend=backend)


def our_sigmoid(backend: str) -> Loss:
    return lambda i, t, s: tiled_sigmoid_loss(i, t, s, BIAS, backend=backend)


FP32, BF16 = torch.float32, torch.bfloat16
#: Family to its losses: name, how it is made, torch's precision, dtype of the features. A family shares a process.
FAMILIES: dict[str, list[tuple[str, Callable[[], Loss], str, torch.dtype]]] = {
    "ours": [
        ("ours, triton", lambda: ours("triton"), "high", FP32),
        ("ours, triton", lambda: ours("triton"), "high", BF16),
        ("ours, triton", lambda: ours("triton"), "highest", FP32),
    ],
    "published": [("inf_cl, published kernel", published_kernel, "high", FP32)],
    "plain": [
        ("full matrix", lambda: full_matrix, "high", FP32),
        ("full matrix", lambda: full_matrix, "highest", FP32),
        ("row chunks of 4096, checkpointed", lambda: row_chunks(4096), "high", FP32),
    ],
    "open_clip": [
        ("open_clip ClipLoss", lambda: open_clip_loss("ClipLoss"), "high", FP32),
        ("open_clip ClipLoss", lambda: open_clip_loss("ClipLoss"), "high", BF16),
        ("open_clip SigLipLoss", lambda: open_clip_loss("SigLipLoss"), "high", FP32),
    ],
    "ours, sigmoid": [
        ("ours, sigmoid, triton", lambda: our_sigmoid("triton"), "high", FP32),
        ("ours, sigmoid, triton", lambda: our_sigmoid("triton"), "highest", FP32),
    ],
    "ours, torch": [
        ("ours, torch", lambda: ours("torch"), "high", FP32),
        ("ours, torch", lambda: ours("torch"), "highest", FP32),
        ("ours, sigmoid, torch", lambda: our_sigmoid("torch"), "high", FP32),
    ],
}


def features(batch: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    images = F.normalize(torch.randn(batch, width, generator=generator, device="cuda"), dim=1)
    # Pairs have something in common.
    texts = F.normalize(
        torch.randn(batch, width, generator=generator, device="cuda").add_(images, alpha=width**0.5), dim=1
    )
    return [t.to(dtype).requires_grad_() for t in (images, texts)]


def matmul_rate(precision: str, dtype: torch.dtype = FP32) -> float:
    """TFLOP/s of a large square product."""
    torch.set_float32_matmul_precision(precision)
    a, out = torch.randn(8192, 8192, device="cuda", dtype=dtype), torch.empty(8192, 8192, device="cuda", dtype=dtype)
    seconds = timed(lambda: torch.mm(a, a, out=out), 10, 3)
    return 2 * 8192**3 / seconds / 1e12


def timed(action: Callable[[], Any], repeats: int, warm: int) -> float:
    """Median of the seconds of an action, by events of the device."""
    for _ in range(warm):
        action()
    seconds = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)


def step(loss: Loss, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    images.grad = texts.grad = scale.grad = None
    value = loss(images, texts, scale)
    value.backward()
    return value


def error_of_gradient(loss: Loss, dtype: torch.dtype, sigmoid: bool) -> float:
    """Against float64, for the very features that the loss gets."""
    images, texts = features(4096, WIDTH, dtype)
    scale = torch.tensor(SCALE, device="cuda", requires_grad=True)
    step(loss, images, texts, scale)
    found = torch.cat([images.grad, texts.grad]).double()
    exact = [t.detach().double().requires_grad_() for t in (images, texts)]
    (full_sigmoid if sigmoid else full_matrix)(*exact, scale.detach().double()).backward()
    expected = torch.cat([t.grad for t in exact])
    return float((found - expected).norm() / expected.norm())


def measure(loss: Loss, batch: int, width: int, dtype: torch.dtype, expected_seconds: float) -> dict[str, Any]:
    images, texts = features(batch, width, dtype)
    scale = torch.tensor(SCALE, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = step(loss, images, texts, scale)
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    repeats = 1 if expected_seconds > 2 else 3 if expected_seconds > 0.2 else 7
    seconds = timed(lambda: step(loss, images, texts, scale), repeats, 0 if expected_seconds > 2 else 1)
    return {"seconds": seconds, "extra_mib": extra, "loss": float(value.detach())}


def cases(family: str, batches: tuple[int, ...], until: float) -> Iterator[dict[str, Any]]:
    """What the process of a family does."""
    for name, make, precision, dtype in FAMILIES[family]:
        head = {"loss_name": name, "precision": precision, "dtype": str(dtype).removeprefix("torch.")}
        torch.set_float32_matmul_precision(precision)
        try:
            loss = make()
            yield {**head, "error": error_of_gradient(loss, dtype, "sigmoid" in name or "SigLip" in name)}
        except ImportError as problem:
            yield {**head, "failed": f"not installed: {problem.name}"}
            continue
        seconds, previous = 0.0, batches[0]
        for batch in batches:
            expected = seconds * (batch / previous) ** 2
            if expected > 20 or time.time() + 2.5 * expected > until:
                yield {**head, "batch": batch, "failed": f"not run: it would take about {expected:.0f} s a step"}
                break
            try:
                found = measure(loss, batch, WIDTH, dtype, expected)
            except torch.OutOfMemoryError:
                yield {**head, "batch": batch, "failed": "out of memory"}
                break
            finally:
                torch.cuda.empty_cache()
            if not math.isfinite(found["loss"]):
                yield {**head, "batch": batch, "failed": f"the loss is {found['loss']}"}
                break
            seconds, previous = found["seconds"], batch
            yield {**head, "batch": batch, **found}


def run_family(family: str, options: argparse.Namespace, until: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Runs a family in a process of its own and keeps what it finds as it comes."""
    command = [sys.executable, __file__, "--family", family, "--until", str(until)]
    command += ["--quick"] * options.quick + (["--peers", str(options.peers)] if options.peers else [])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    watch = threading.Timer(max(1.0, until - time.time() + 5), process.kill)
    watch.start()
    for line in process.stdout:
        if line.startswith("{"):
            keep(json.loads(line))
    code = process.wait()
    watch.cancel()
    reader.join(5)
    if code:
        said = "".join(errors).strip().splitlines()
        keep({"loss_name": family, "failed": (said or [f"code {code}"])[-1][:300], "stderr": said[-12:]})


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """Returns what the documentation's page of benchmarks shows of the result."""
    rows = [
        {
            "batch": case["batch"],
            "loss": case["loss_name"],
            "features": case["dtype"],
            "torch's products": PRECISIONS[case["precision"]],
            "error of the gradient": result["errors"].get(f"{case['loss_name']}, {case['precision']}, {case['dtype']}"),
            "extra memory (GiB)": case["extra_mib"] / 1024 if "extra_mib" in case else case["failed"],
            "seconds": case.get("seconds"),
            "TFLOP/s at 8 b²c": case.get("tflops"),
            "share of a square product's": case.get("share"),
        }
        for case in sorted((c for c in result["cases"] if "batch" in c), key=lambda c: c["batch"])
        if case["batch"] in SHOWN or "failed" in case
    ]
    return {
        "title": "Inf-CL: memory and time of contrastive losses on a GPU",
        "question": f"What does the loss need beyond its features of width {WIDTH}, forward and backward?",
        "rows": rows,
        "notes": "Square products: "
        + ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in result["matmul_tflops"].items())
        + ". Our kernels multiply float16: once where torch allows tf32, three times otherwise; their share is of that "
        "rate. A loss that ran out of memory, or would take more than 20 s a step, is not tried at larger batches.",
        "command": "python benchmarks/inf_cl_gpu.py --peers FOLDER",
    }


def ceiling(case: dict[str, Any], rates: dict[str, float]) -> float:
    if "triton" in case["loss_name"] or case["dtype"] == "bfloat16":
        return rates["float16"]
    return rates["tf32" if case["precision"] == "high" else "float32"]


def tune(until: float) -> None:
    """Seconds of each of our kernels at batch 65,536, for several ways of cutting it."""
    from modelwright.kernels import pair_tiles_triton as kernels

    batch, width = 65_536, WIDTH
    q, k = (t.detach() for t in features(batch, width, FP32))
    q = q * SCALE
    pairs = batch**2 * width
    ways = [
        (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3),
        (128, 256, 64, 8, 4), (128, 128, 128, 8, 2), (64, 256, 64, 4, 3), (64, 128, 64, 4, 4), (128, 256, 32, 8, 4),
    ]  # fmt: skip

    def show(what: str, operations: float, action: Callable[[], Any]) -> None:
        try:
            seconds = timed(action, 3, 1)
            print(f"{what}: {seconds * 1000:.2f} ms, {operations / seconds / 1e12:.0f} TFLOP/s", flush=True)
        except Exception as problem:  # a way that the card cannot take must not end the others
            print(f"{what}: {type(problem).__name__} {str(problem)[:120]}", flush=True)

    show("operands", 0, lambda: kernels._operands(q, "fp16"))
    rows, cols = kernels.softmax_sweep(q, k, precision="fp16")
    grads = torch.full((batch,), 1 / batch, device="cuda")
    backward = partial(kernels.softmax_sweep_backward, q, k, rows, grads, cols, grads)
    usual = kernels.TILE
    for side in (2048, 4096, 8192, 16_384):
        a = torch.randn(side, side, device="cuda").half()
        b, out = torch.randn(side, width, device="cuda").half(), torch.zeros(side, width, device="cuda")
        show(f"weights @ keys, {side}", 2 * side**2 * width, partial(kernels._add_product, out, a, b))
        show(f"weights.T @ queries, {side}", 2 * side**2 * width, partial(kernels._add_product, out, a.T, b))
        kernels.TILE = side
        show(f"backward, tiles of {side}", 6 * pairs, partial(backward, precision="fp16"))
    kernels.TILE = usual
    original = kernels._add_product
    for precision, programs in itertools.product(("fp16", "fp16x3"), (1, 2)):
        kernels.PROGRAMS = programs
        for way in ways if precision == "fp16" else [(*w[:2], 32, *w[3:]) for w in ways[:5]]:
            if time.time() > until:
                return
            times = 1 if precision == "fp16" else 3
            kernels.FORWARD[precision] = kernels.WEIGHTS[precision] = kernels.Launch(*way)
            forward = partial(kernels.softmax_sweep, q, k, precision=precision)
            show(f"forward {precision} {way} x{programs}", 2 * times * pairs, forward)
            if programs == 1:
                kernels._add_product = lambda *_: None
                show(f"weights {precision} {way}", 2 * times * pairs, partial(backward, precision=precision))
                kernels._add_product = original
    kernels._add_product = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three smallest batches only")
    parser.add_argument("--tune", action="store_true", help="time our kernels' launches; writes nothing")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing new is begun")
    parser.add_argument("--peers", type=Path, help="folder with the published packages")
    parser.add_argument(
        "--families", default="", help="separated by semicolons; all by default: " + "; ".join(FAMILIES)
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/inf-cl-gpu.json"))
    parser.add_argument("--family", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # The benchmark beside this one has the published package's name, and must not be found in its place.
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    if options.peers:
        sys.path.insert(0, str(options.peers))
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none here: nothing was measured.")
        return
    batches = BATCHES[:3] if options.quick else BATCHES
    if options.family:
        for case in cases(options.family, batches, options.until):
            print(json.dumps(case), flush=True)
        return
    until = time.time() + 60 * options.minutes
    if options.tune:
        tune(until)
        return

    rates = {PRECISIONS[p]: matmul_rate(p) for p in PRECISIONS} | {"float16": matmul_rate("high", torch.float16)}
    torch.cuda.empty_cache()
    result: dict[str, Any] = {
        "format": 1, "benchmark": "inf-cl-gpu", "card": torch.cuda.get_device_name(), "width": WIDTH,
        "matmul_tflops": rates, "errors": {}, "cases": [],
    }  # fmt: skip

    def keep(case: dict[str, Any]) -> None:
        if "error" in case:
            result["errors"][f"{case['loss_name']}, {case['precision']}, {case['dtype']}"] = case["error"]
        else:
            if "seconds" in case:
                case["tflops"] = 8 * case["batch"] ** 2 * WIDTH / case["seconds"] / 1e12
                case["share"] = case["tflops"] / ceiling(case, rates)
            result["cases"].append(case)
        print(case, flush=True)
        write_json(options.output, {**result, **tables(result), "machine": machine(), "versions": versions()})

    families = [name.strip() for name in options.families.split(";")] if options.families else list(FAMILIES)
    for number, family in enumerate(families):
        left = until - time.time()
        if left < 5:
            keep({"loss_name": family, "failed": "no time was left"})
            continue
        # A family may use the time that earlier ones left, but not all of that of the later ones.
        run_family(family, options, time.time() + left * max(0.4, 1 / (len(families) - number)), keep)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
