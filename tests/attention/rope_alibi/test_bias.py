"""Slopes and distances: those of ALiBi where they are geometric, a harmonic series where they are not."""

import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from modelwright.attention.rope_alibi import RopeAlibiConfig, harmonic_numbers, head_slopes, penalty
from modelwright.errors import UserError


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 16, 32])
def test_geometric_slopes_are_alibis(heads):
    found = head_slopes("geometric", heads)
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(found, bloom, rtol=1e-6, atol=0)
    mpt = build_mpt_alibi_tensor(heads, 2)[:, 0]
    torch.testing.assert_close(found, mpt[:, 1] - mpt[:, 0], rtol=1e-6, atol=1e-7)


def test_harmonic_slopes():
    assert head_slopes("harmonic", 4).tolist() == pytest.approx([1 / 4, 1 / 8, 1 / 12, 1 / 16])
    assert head_slopes("harmonic", 2, 3.0).tolist() == [3.0, 1.5]


def test_harmonic_numbers():
    assert harmonic_numbers(5)[:5].tolist() == pytest.approx([0, 1, 1.5, 11 / 6, 25 / 12])
    # About a logarithm, as the brief says, out to any context.
    assert float(harmonic_numbers(100_001)[100_000]) == pytest.approx(math.log(100_000) + 0.5772157 + 5e-6, abs=1e-5)


def test_penalty_of_hidden_keys_is_nothing():
    distance = torch.tensor([[-1, 0, 3]])
    assert penalty(distance, "linear").tolist() == [[0, 0, 3]]
    assert penalty(distance, "harmonic").tolist()[0] == pytest.approx([0, 0, 11 / 6])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambda_r": 1.5}, "lambda_r is 1.5"),
        ({"lambda_a": -0.1}, "lambda_a is -0.1"),
        ({"lambda_a": math.nan}, "lambda_a is nan"),
        ({"first_slope": 0.0}, "first_slope is 0.0"),
    ],
)
def test_values_out_of_range(options, words):
    with pytest.raises(UserError, match=words):
        RopeAlibiConfig(**options)
