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


def compile_kernel(name, capability, precision, width, stored="fp32", **switches):
    """Compiles a kernel for a generation of cards, which needs no card, and returns what was made."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modelwright.kernels import pair_tiles_triton

    kernel = getattr(pair_tiles_triton, name)
    table = pair_tiles_triton.FORWARD if name == "_softmax_kernel" else pair_tiles_triton.GRADIENT
    options = pair_tiles_triton._options(table[precision], precision, None, width) | switches
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    counts = {"m", "n", "width", "rows_each", "cols_each"}
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in options:
            signature[argument] = "constexpr"
        else:
            rows = argument in ("q", "k", "own", "other")
            signature[argument] = "i32" if argument in counts else f"*{stored if rows else 'fp32'}"
            if argument not in counts or (argument == "width" and width % 16 == 0):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in options.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


KERNELS = [
    ("_softmax_kernel", 512, {"COLUMNS": True}),
    ("_softmax_gradient_kernel", 512, {"OWN": True, "OTHER": True}),
    ("_softmax_gradient_kernel", 64, {"OWN": True, "OTHER": True}),
    ("_sigmoid_kernel", 512, {"DIAGONAL": True, "SUMS": True, "GRADIENTS": True}),
    ("_sigmoid_kernel", 64, {"DIAGONAL": True, "SUMS": True, "GRADIENTS": True}),
]


@compiled
@pytest.mark.parametrize(("name", "width", "switches"), KERNELS, ids=lambda value: str(value))
@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        pytest.param(*case, marks=() if case == (90, "tf32x3") else pytest.mark.slow, id=f"sm_{case[0]} {case[1]}")
        for case in [(c, p) for c in (80, 90) for p in ("tf32x3", "tf32", "ieee")]
    ],
)
def test_kernels_compile_without_a_card(tmp_path, monkeypatch, name, width, switches, capability, precision):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # so that it is compiled, not found
    made = compile_kernel(name, capability, precision, width, **switches)
    check(made, precision)


@compiled
def test_rows_of_sixteen_bits_and_odd_width_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check(compile_kernel("_softmax_kernel", 90, "tf32", 7, stored="bf16", COLUMNS=False), "tf32")
    check(compile_kernel("_softmax_gradient_kernel", 90, "tf32", 391, stored="fp16", OWN=True, OTHER=False), "tf32")


def check(made, precision):
    # On every card since Ampere a program may have 99 KiB of shared memory.
    assert 0 < made.metadata.shared <= 99 * 1024
    uses_tensor_cores = "mma" in made.asm["ptx"]
    assert uses_tensor_cores == (precision != "ieee")
    assert "atom" not in made.asm["ptx"]  # nothing is added up in an order that may change
