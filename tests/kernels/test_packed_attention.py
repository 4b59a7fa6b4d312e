"""Attention over packed states against plain attention over the same states, dequantised."""

import pytest
import torch
from torch.nn import functional

from modelwright.kernels.packed import quantise
from modelwright.kernels.packed_attention import Held, packed_attention

# batch, heads, key heads, rows, segments in 2, 4 and 8 bits, rest, size
CASES = [
    (2, 4, 2, 1, (3, 1, 1), 5, 32),
    (1, 4, 4, 3, (2, 0, 1), 0, 32),
    (2, 8, 1, 1, (0, 0, 2), 7, 64),
    (1, 6, 2, 2, (5, 0, 0), 1, 32),
    (1, 2, 2, 1, (0, 0, 0), 9, 32),
    (1, 2, 1, 1, (40, 1, 1), 31, 32),
]


def held(batch, kept, segments, rest, size, *, along, seed, length=32, group=16, dtype=torch.float32, device="cpu"):
    """States of packed segments and a rest."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for bits, number in zip((2, 4, 8), segments, strict=True):
        x = torch.randn(batch, kept, number, length, size, generator=generator).to(dtype)
        if number:
            part = quantise(x, bits, group, along)
            parts.append(part.map(lambda t: t.to(device)))
    return Held(tuple(parts), torch.randn(batch, kept, rest, size, generator=generator).to(device, dtype))


def draw(case, dtype=torch.float32, device="cpu", **options):
    batch, heads, kept, rows, segments, rest, size = case
    query = torch.randn(batch, heads, rows, size, generator=torch.Generator().manual_seed(9)).to(device, dtype)
    options |= {"dtype": dtype, "device": device}
    keys = held(batch, kept, segments, rest, size, along="tokens", seed=1, **options)
    values = held(batch, kept, segments, rest, size, along="channels", seed=2, **options)
    return query, keys, values


def masks(case, keys):
    """No mask, padding on the left, and one of a row's own; all leave something to see."""
    batch, _, _, rows, *_ = case
    tokens = keys.tokens
    left = torch.arange(tokens) >= torch.tensor([tokens // 3, 0][:batch])[:, None]
    causal = torch.arange(tokens) <= torch.arange(tokens - rows, tokens)[:, None]
    device = keys.rest.device
    return None, left[:, None, None].to(device), (left[:, None, None] & causal).to(device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_plain_attention(case):
    query, keys, values = draw(case)
    for mask in masks(case, keys):
        expected = functional.scaled_dot_product_attention(
            query.double(), keys.dequantised().double(), values.dequantised().double(), attn_mask=mask, scale=0.3,
            enable_gqa=True,
        )  # fmt: skip
        found = packed_attention(query, keys, values, scaling=0.3, mask=mask)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
        if mask is not None:
            added = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
            torch.testing.assert_close(packed_attention(query, keys, values, scaling=0.3, mask=added), found)


def test_sixteen_bits():
    for dtype in (torch.bfloat16, torch.float16):
        query, keys, values = draw(CASES[0], dtype)
        expected = functional.scaled_dot_product_attention(
            query.float(), keys.dequantised().float(), values.dequantised().float(), enable_gqa=True, scale=0.2
        )
        found = packed_attention(query, keys, values, scaling=0.2)
        assert found.dtype == dtype
        assert float((found.float() - expected).abs().max()) < 0.02


def test_a_row_that_sees_nothing_is_zero():
    query, keys, values = draw(CASES[0])
    mask = torch.ones(2, 1, 1, keys.tokens, dtype=torch.bool)
    mask[1] = False
    found = packed_attention(query, keys, values, scaling=0.3, mask=mask)
    assert not found[1].any()
    assert found[0].any()


def test_what_is_held_is_joined_in_order():
    _, keys, _ = draw(CASES[0])
    whole = keys.dequantised()
    assert whole.shape == (2, 2, keys.tokens, 32)
    begin = 0
    for part in keys.parts:
        assert torch.equal(whole[:, :, begin : begin + part.tokens], part.dequantised())
        begin += part.tokens
    assert torch.equal(whole[:, :, begin:], keys.rest)
