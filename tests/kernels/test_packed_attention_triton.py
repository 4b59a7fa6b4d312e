"""The Triton kernels of packed attention: interpreted, run where there is a card, and compiled where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
CASES = Path(__file__).with_name("packed_attention_cases.py")


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


SHAPE = {
    "SHARED": 4, "BLOCK": 16, "SIZE": 128, "PADDED": 128, "ROWS": 1, "MASKED": False, "WIDE": False,
    "PRECISION": "ieee",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("kind", ["8 bits", "4 bits", "2 bits", "rest", "float32", "masked"])
def test_compiles_without_a_card(tmp_path, monkeypatch, kind):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modelwright.kernels import packed_attention_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # so that it is compiled, not found
    bits = int(kind[0]) if kind[1:] == " bits" else 2
    switches = dict(SHAPE)
    if kind == "rest":
        kernel = kernels._rest_kernel
        switches |= {"TILE": kernels.REST, "MASKED": True}
    else:
        kernel = kernels._part_kernel
        stored = 128 * bits // 8
        switches |= {"BITS": bits, "LENGTH": 128, "STORED": stored, "GROUP": 32, "TILE": min(stored, 32)}
    if kind == "float32":
        switches |= {"WIDE": True, "PRECISION": "tf32x3"}
    if kind == "masked":
        switches |= {"MASKED": True}
    stored_kind = "fp32" if kind == "float32" else "bf16"
    pointers = {"query": stored_kind, "key": stored_kind, "value": stored_kind, "partial": "fp32", "lse": "fp32"}
    pointers |= {"k_codes": "u8", "v_codes": "u8", "seen": "u8" if switches["MASKED"] else stored_kind}
    pointers |= dict.fromkeys(("k_scale", "k_minimum", "v_scale", "v_minimum"), "fp16")
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in switches:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(
        fn=kernel, signature=signature, attrs=aligned,
        constexprs={(kernel.arg_names.index(name),): value for name, value in switches.items()},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert made.metadata.shared <= 227 * 1024  # what a program may have on Hopper
    assert "mma" in made.asm["ptx"]
