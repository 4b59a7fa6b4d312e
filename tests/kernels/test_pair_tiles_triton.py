"""The Triton kernels: interpreted against the plain sweeps, run where there is a card, compiled where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modelwright.errors import UserError

triton = pytest.importorskip("triton")
CASES = Path(__file__).with_name("pair_tiles_cases.py")


def run_cases(interpret):
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2], check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_the_interpreter():
    run_cases("1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_on_the_card():
    run_cases("0")


# Everything below needs the kernels as Triton compiles them.
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_tensors_on_the_cpu_are_refused():
    from modelwright.kernels import pair_tiles_triton

    with pytest.raises(UserError, match=r"on CUDA, not on cpu: use backend='torch'"):
        pair_tiles_triton.softmax_sweep(torch.zeros(2, 2), torch.zeros(2, 2))


def compile_kernel(name, capability, precision, width, **switches):
    """Compiles a kernel for a generation of cards, which needs no card, and returns what was made."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modelwright.kernels import pair_tiles_kernels, pair_tiles_triton

    kernel = getattr(pair_tiles_kernels, name)
    table = {
        "softmax_kernel": pair_tiles_triton.FORWARD,
        "softmax_weights_kernel": pair_tiles_triton.WEIGHTS,
        "sigmoid_kernel": pair_tiles_triton.SIGMOID,
    }[name]
    options = pair_tiles_triton._options(table[precision], precision, None, width) | switches
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    counts = {"m", "n", "stride", "rows_each", "cols_each", "below_diagonal", "first_col"}
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in options:
            signature[argument] = "constexpr"
        elif argument in counts:
            signature[argument] = "i32"
        elif argument == "labels":
            signature[argument] = "*i64"
        elif argument in ("shift", "fixed_shift"):
            signature[argument] = "fp32"
        else:
            halves = ("q", "q_low", "k", "k_low", "weights", "weights_low")
            signature[argument] = "*fp16" if argument in halves else "*fp32"
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in options.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


KERNELS = [
    ("softmax_kernel", 512, {"COLUMNS": True, "FIXED": True}),
    ("softmax_kernel", 64, {"COLUMNS": True, "FIXED": False}),
    ("softmax_weights_kernel", 512, {"BOTH": True, "COMMON": True, "LABELS": True}),
    ("softmax_weights_kernel", 64, {"BOTH": True, "COMMON": False, "LABELS": False}),
    ("sigmoid_kernel", 512, {"DIAGONAL": True, "GRADIENTS": True}),
]


@compiled
@pytest.mark.parametrize(("name", "width", "switches"), KERNELS, ids=lambda value: str(value))
@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        pytest.param(*case, marks=() if case == (90, "fp16") else pytest.mark.slow, id=f"sm_{case[0]} {case[1]}")
        for case in [(c, p) for c in (80, 90) for p in ("fp16", "fp16x3")]
    ],
)
def test_kernels_compile_without_a_card(tmp_path, monkeypatch, name, width, switches, capability, precision):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # so that it is compiled, not found
    if (capability, precision) != (90, "fp16"):  # what comes after the PTX takes most of the time: no test looks at it
        monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    made = compile_kernel(name, capability, precision, width, **switches)
    # What every card since Ampere, or since Hopper, gives a program.
    assert 0 < made.metadata.shared <= (99 if capability == 80 else 227) * 1024
    assert ("wgmma" if capability == 90 else "mma") in made.asm["ptx"]
    assert "atom" not in made.asm["ptx"]  # nothing is added up in an order that may change
