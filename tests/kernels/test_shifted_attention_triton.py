"""The Triton kernels of shifted attention: interpreted, run where there is a card, and compiled where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modelwright.errors import UserError

triton = pytest.importorskip("triton")
CASES = Path(__file__).with_name("shifted_attention_cases.py")


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


compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_tensors_on_the_cpu_are_refused():
    from modelwright.kernels.shifted_attention import Turn
    from modelwright.kernels.shifted_attention_triton import shifted_attention

    x = torch.zeros(1, 1, 2, 16)
    with pytest.raises(UserError, match="run on CUDA, not on cpu: use the plain one"):
        shifted_attention(x, x, x, Turn(x[0, 0, 0], x[0, 0, 0], torch.arange(16).int()), 1, scaling=1.0)


def compile_kernel(name, stored, switches, launch):
    """Compiles a kernel for Hopper, which needs no card."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modelwright.kernels import shifted_attention_triton

    kernel = getattr(shifted_attention_triton, name)
    pointers = dict.fromkeys(("query", "key", "value", "more"), stored)
    pointers |= dict.fromkeys(("lse", "more_lse", "cos", "sin", "partial"), "fp32")
    pointers |= {"partner": "i32", "lefts": "i32", "out": "fp32" if switches.get("SPLIT") else stored}
    signature, aligned = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in switches:
            signature[argument] = "constexpr"
        elif argument in pointers:
            signature[argument] = f"*{pointers[argument]}"
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
            if argument.endswith(("_batch", "_head", "_row")):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in switches.items()},
        attrs=aligned,
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


ATTENTION = {"GROUPS": 4, "SIZE": 128, "PADDED": 128, "LEFT": False, "SPLIT": False, "WIDE": False, "PRECISION": "ieee"}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["many", "few", "float32", "join", "merge"])
def test_compiles_without_a_card(tmp_path, monkeypatch, kind):
    from modelwright.kernels import shifted_attention_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # so that it is compiled, not found
    simple = {"SIZE": 128, "PADDED": 128}
    if kind == "many":
        launch = kernels.MANY[128]
        switches = ATTENTION | {"BLOCK": launch.rows, "KEYS": launch.keys}
        made = compile_kernel("_attention_kernel", "bf16", switches, launch)
        assert "wgmma" in made.asm["ptx"]
    elif kind == "few":
        launch = kernels.FEW[128]
        switches = ATTENTION | {"BLOCK": 16, "KEYS": launch.keys, "SPLIT": True, "LEFT": True}
        made = compile_kernel("_attention_kernel", "bf16", switches, launch)
    elif kind == "float32":
        launch = kernels.FLOAT32[128]
        switches = ATTENTION | {"BLOCK": launch.rows, "KEYS": launch.keys, "WIDE": True, "PRECISION": "tf32x3"}
        made = compile_kernel("_attention_kernel", "fp32", switches, launch)
    elif kind == "join":
        made = compile_kernel("_join_kernel", "bf16", simple | {"SPLITS": 64}, kernels.Launch(0, 0, 4, 3))
    else:
        made = compile_kernel("_merge_kernel", "bf16", simple | {"BLOCK": 32}, kernels.Launch(0, 0, 4, 3))
    assert made.metadata.shared <= 227 * 1024  # what a program may have on Hopper
    assert "atom" not in made.asm["ptx"]  # nothing is added up in an order that may change
