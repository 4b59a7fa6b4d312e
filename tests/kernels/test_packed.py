"""Packed numbers against the formula in slow loops, and what no number of bits may break."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.kernels.packed import BITS, Packed, pack, quantise, round_down, unpack

ALONG = ("tokens", "channels")


def draw(shape=(2, 3, 4, 16, 8), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_a_bijection_that_fills_its_bytes(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 16, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 16 * bits // 8, 5)
    assert torch.equal(unpack(packed, bits), codes)
    rows = packed.shape[2]
    for token in range(16):  # where the docstring says that it is
        found = packed[:, :, token % rows].int() >> (token // rows * bits) & (2**bits - 1)
        assert torch.equal(found, codes[:, :, token].int())


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("bits", BITS)
def test_against_the_formula_number_by_number(bits, along):
    x, group = draw((1, 2, 2, 8, 8)), 4
    packed = quantise(x, bits, group, along, torch.float32)
    found = packed.dequantised().view(x.shape)
    codes = unpack(packed.codes, bits)
    for head in range(2):
        for segment in range(2):
            for token in range(8):
                for channel in range(8):
                    if along == "tokens":
                        begin = token // group * group
                        near = x[0, head, segment, begin : begin + group, channel]
                    else:
                        begin = channel // group * group
                        near = x[0, head, segment, token, begin : begin + group]
                    low, high = float(near.min()), float(near.max())
                    scale = (high - low) / (2**bits - 1)
                    code = round((float(x[0, head, segment, token, channel]) - low) / scale)
                    assert int(codes[0, head, segment, token, channel]) == code
                    assert math.isclose(
                        float(found[0, head, segment, token, channel]), low + code * scale, abs_tol=2e-6
                    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("along", ALONG)
@settings(max_examples=25)
@given(data=st.data())
def test_no_number_is_more_than_half_a_scale_off(along, dtype, data):
    bits = data.draw(st.sampled_from(BITS))
    shift, spread = data.draw(st.floats(-300, 300)), data.draw(st.floats(1e-3, 100))
    x = (draw(seed=data.draw(st.integers(0, 1000))) * spread + shift).to(dtype)
    packed = quantise(x, bits, 8, along)
    scale = packed.scale.float().repeat_interleave(8, -2 if along == "tokens" else -1).view(x.shape)
    off = (packed.dequantised().view(x.shape) - x.float()).abs()
    assert bool((off <= scale / 2 + 1e-6 * x.float().abs()).all())
    assert packed.bytes == x.numel() * bits // 8 + x.numel() // 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("bits", BITS)
def test_quantising_again_in_the_same_bits_changes_nothing(bits, along, dtype):
    """Of numbers whose minima the metadata can hold."""
    x = draw(dtype=dtype)
    metadata = torch.float32 if dtype == torch.float32 else torch.float16
    once = quantise(x, bits, 8, along, metadata)
    twice = quantise(once.dequantised().view(x.shape), bits, 8, along, metadata)
    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(twice.minimum, once.minimum)
    # Rounding of the sum shows only in so fine a scale as float32's.
    torch.testing.assert_close(twice.scale, once.scale, rtol=1e-5 if dtype == torch.float32 else 0, atol=0)
    assert once.at(bits) is once


@pytest.mark.parametrize("along", ALONG)
def test_going_down_the_levels_costs_no_more_than_their_half_scales(along):
    x = draw()
    packed, bound = None, torch.zeros(x.shape)
    for bits in (8, 4, 2):
        packed = quantise(x, bits, 8, along) if packed is None else packed.at(bits)
        scale = packed.scale.float().repeat_interleave(8, -2 if along == "tokens" else -1).view(x.shape)
        bound += scale / 2
        off = (packed.dequantised().view(x.shape) - x).abs()
        assert bool((off <= bound + 1e-5).all())
    direct = (quantise(x, 2, 8, along).dequantised().view(x.shape) - x).square().mean().sqrt()
    assert float((packed.dequantised().view(x.shape) - x).square().mean().sqrt() / direct) < 1.02


@pytest.mark.parametrize("value", [0.0, 1.5, -0.25, 7.0])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("along", ALONG)
def test_equal_numbers_are_exact(along, bits, value):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.full((1, 1, 2, 8, 8), value, dtype=dtype)
        packed = quantise(x, bits, 4, along)
        assert torch.equal(packed.dequantised(dtype).view(x.shape), x)
        assert bool((packed.scale == 1).all())


def test_equal_numbers_that_float16_does_not_have_are_nearly_exact():
    x = torch.full((1, 1, 1, 8, 8), math.pi * 100)
    for bits in (8, 4, 2):
        off = quantise(x, bits, 8, "tokens", torch.float16).dequantised().view(x.shape) - x
        assert float(off.abs().max()) < 1e-3  # float16 alone would be 0.14 off


def test_rounding_down():
    x = torch.cat((draw((10_000,)) * 10, torch.tensor([0.0, 1e-9, -1e-9, -0.0, 1.0, -1.0, 65504.0])))
    found = round_down(x, torch.float16)
    assert found.dtype == torch.float16
    assert bool((found.float() <= x).all())
    # The next number up is above.
    bits = found.view(torch.int16)
    above = torch.where(found > 0, bits + 1, torch.where(found < 0, bits - 1, torch.ones_like(bits)))
    assert bool((above.view(torch.float16).float() > x)[x != 0].all())
    assert torch.equal(round_down(x, torch.float32), x)


@pytest.mark.parametrize("along", ALONG)
def test_numbers_beyond_float16_are_held_as_its_bounds(along):
    x = draw((1, 1, 1, 8, 8)) * 1e5
    found = quantise(x, 8, 8, along).dequantised().view(x.shape)
    assert bool(torch.isfinite(found).all())
    inside = x.abs().amax(-2 if along == "tokens" else -1, keepdim=True) < 65504
    assert float(((found - x) * inside).abs().max()) < 300
    exact = quantise(x, 8, 8, along, torch.float32).dequantised().view(x.shape)
    assert float((exact - x).abs().max()) < 1e3
    assert bool(torch.isnan(quantise(x * torch.nan, 8, 8, along).dequantised()).all())


def test_segments_are_independent():
    """A segment has the same bits whatever stands beside it: what makes a prompt equal to its tokens one by one."""
    x = draw((1, 2, 5, 16, 8))
    together = quantise(x, 4, 8, "tokens").at(2)
    for segment in range(5):
        alone = quantise(x[:, :, segment : segment + 1], 4, 8, "tokens").at(2)
        part = together.cut(segment, segment + 1)
        assert torch.equal(alone.codes, part.codes)
        assert torch.equal(alone.dequantised(), part.dequantised())


def test_chunks_cover_all_once():
    packed = quantise(draw((1, 2, 6, 16, 8)), 2, 8, "channels")
    assert packed.chunks() == [(0, packed)]
    large = Packed(
        torch.zeros(1, 8, 60, 32, 128, dtype=torch.uint8), torch.ones(1, 8, 60, 128, 4), torch.zeros(1, 8, 60, 128, 4),
        2, 32, "channels",
    )  # fmt: skip
    chunks = large.chunks()
    assert len(chunks) > 1
    assert [at for at, _ in chunks] == [sum(c.tokens for _, c in chunks[:i]) for i in range(len(chunks))]
    assert sum(chunk.tokens for _, chunk in chunks) == large.tokens
