"""Fused and plain softmax attention with a bias are the same."""

import pytest
import torch

from modelwright.attention.softmax import attend


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_two_ways_agree(kept, dtype):
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 7, 8, generator=g).to(dtype) for h in (4, kept, kept))
    bias = torch.randn(1, 4, 7, 7, generator=g)
    fused, none = attend(query, key, value, bias, scaling=0.3)
    plain, weights = attend(query, key, value, bias, scaling=0.3, weights=True)
    assert none is None
    assert fused.dtype == plain.dtype == weights.dtype == dtype
    torch.testing.assert_close(fused, plain, rtol=0, atol=5e-2 if dtype == torch.bfloat16 else 1e-6)
    wide = value.repeat_interleave(4 // kept, 1)
    scores = query.double() @ key.double().repeat_interleave(4 // kept, 1).mT * 0.3 + bias.double()
    torch.testing.assert_close(
        plain.double(), scores.softmax(-1) @ wide.double(), rtol=0, atol=5e-2 if dtype == torch.bfloat16 else 1e-6
    )


def test_scores_are_capped_before_the_bias():
    query = key = torch.full((1, 1, 1, 4), 100.0)
    key = torch.cat((key, -key), dim=2)
    value = torch.tensor([[[[1.0], [0.0]]]])
    bias = torch.tensor([[[[0.0, 4.0]]]])
    out, _ = attend(query, key, value, bias, scaling=1.0, softcap=1.5)
    torch.testing.assert_close(out.squeeze(), torch.sigmoid(torch.tensor(3.0 - 4.0)))


def test_dropout_scales_what_stays():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 400, 4, generator=g) for _ in range(3))
    torch.manual_seed(0)
    kept, dropped = (
        attend(query, key, value, torch.zeros(1, 1, 400, 400), scaling=0.3, dropout=p)[0] for p in (0.0, 0.5)
    )
    assert not torch.allclose(kept, dropped, atol=1e-2)
    torch.testing.assert_close(kept, dropped, rtol=0, atol=0.5)
