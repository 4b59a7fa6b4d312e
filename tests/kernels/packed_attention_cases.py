"""The Triton kernels of packed attention against the plain definition, and that against plain attention in float64.

test_packed_attention_triton.py runs this file in a process of its own: Triton decides at its import whether kernels are
interpreted (on the CPU) or compiled.
"""

import os

import pytest
import torch
from torch.nn import functional

from kernels.test_packed_attention import draw, masks
from modelwright.kernels import packed_attention_triton as kernels
from modelwright.kernels.packed_attention import packed_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# batch, heads, key heads, rows, segments in 2, 4 and 8 bits, rest, size; then segment length, group size and programs
CASES = [
    ((2, 4, 2, 1, (3, 1, 1), 5, 32), 64, 16, None),
    ((1, 8, 1, 1, (5, 0, 0), 70, 64), 128, 32, 3),  # several programs; more of the rest than one tile
    ((1, 6, 2, 2, (0, 2, 1), 0, 48), 64, 16, 1),  # three heads a group, no rest, a size that is no power of two
    ((2, 2, 2, 3, (2, 1, 1), 9, 32), 64, 32, 2),  # segments' rows shorter than groups
    ((1, 2, 1, 1, (0, 0, 0), 9, 32), 64, 16, None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case):
    shape, length, group, splits = case
    query, keys, values = draw(shape, device=DEVICE, length=length, group=group)
    for mask in masks(shape, keys):
        expected = functional.scaled_dot_product_attention(
            query.double(), keys.dequantised().double(), values.dequantised().double(), attn_mask=mask, scale=0.3,
            enable_gqa=True,
        )  # fmt: skip
        found = kernels.packed_attention(query, keys, values, scaling=0.3, mask=mask, splits=splits)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert float((found.double() - expected).abs().max()) < 3e-5


@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
def test_sixteen_bits(dtype):
    for shape, length, group, splits in CASES[:3]:
        query, keys, values = draw(shape, dtype, DEVICE, length=length, group=group)
        expected = packed_attention(query.float(), *(_float(held) for held in (keys, values)), scaling=0.2)
        found = kernels.packed_attention(query, keys, values, scaling=0.2, splits=splits)
        assert found.dtype == dtype
        assert float((found.float() - expected).abs().max()) < 0.03


def _float(held):
    return type(held)(held.parts, held.rest.float())


def test_a_row_that_sees_nothing_is_zero():
    shape, length, group, _ = CASES[0]
    query, keys, values = draw(shape, device=DEVICE, length=length, group=group)
    mask = torch.ones(2, 1, 1, keys.tokens, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    found = kernels.packed_attention(query, keys, values, scaling=0.3, mask=mask)
    assert not found[1].any()
    assert found[0].any()


def test_what_is_taken():
    shape, length, group, _ = CASES[0]
    query, keys, values = draw(shape, device=DEVICE, length=length, group=group)
    assert kernels.can_attend(query, keys, values) == (DEVICE == "cuda")
    mask = torch.ones(2, 1, 1, keys.tokens, dtype=torch.bool, device=DEVICE)
    assert kernels.can_attend(query, keys, values, mask) == (DEVICE == "cuda")
    assert not kernels.can_attend(query, keys, values, mask.float())
    assert not kernels.can_attend(query.requires_grad_(), keys, values)
    with torch.no_grad():
        assert kernels.can_attend(query, keys, values) == (DEVICE == "cuda")
        assert not kernels.can_attend(query.half(), keys, values)
        small = draw(shape, device=DEVICE, length=32, group=16)  # 8 rows in 2 bits
        assert not kernels.can_attend(*small)
        assert not kernels.can_attend(query.repeat(1, 1, 40, 1), keys, values)
