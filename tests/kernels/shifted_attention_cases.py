"""The Triton kernels of shifted attention against the plain definition in float64.

test_shifted_attention_triton.py runs this file in a process of its own: Triton decides at its import whether kernels
are interpreted (on the CPU) or compiled.
"""

import os

import pytest
import torch

from kernels.test_shifted_attention import draw, turn
from modelwright.errors import UserError
from modelwright.kernels import shifted_attention_triton as kernels
from modelwright.kernels.shifted_attention import Turn, shifted_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = kernels.Launch(32, 16, 4, 2)

# batch, heads, key heads, rows, keys, size, shift, padding, cuts
CASES = [
    (2, 4, 2, 70, 70, 16, 20, None, None),
    (1, 4, 4, 70, 133, 24, 64, None, None),
    (2, 6, 2, 33, 90, 64, 7, [0, 31], None),  # three heads a group; a shift within a block
    (2, 4, 1, 50, 50, 16, 1, [50, 3], None),  # a row of the batch that is padding alone
    (1, 2, 2, 64, 64, 16, 0, None, None),
    (1, 2, 2, 64, 64, 16, 64, None, None),  # no far key
    (1, 2, 2, 64, 64, 16, 63, None, None),  # one
    (2, 8, 2, 1, 300, 40, 100, None, 3),
    (2, 8, 2, 1, 300, 40, 100, [120, 299], 5),  # cuts that hold nothing
    (1, 4, 2, 3, 131, 80, 40, None, 4),
    (1, 1, 1, 1, 1, 16, 0, None, 2),
    (1, 14, 2, 2, 40, 16, 41, None, 2),  # seven heads a group
]


def tables(size):
    made = turn(size)
    return made, Turn(made.cos.float().to(DEVICE), made.sin.float().to(DEVICE), made.partner.to(DEVICE))


def close(found, expected, bound):
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert float((found.double().cpu() - expected).abs().max()) < bound


@pytest.mark.parametrize("launch", [SMALL, None], ids=["small", "usual"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case, launch):
    batch, heads, kept, rows, keys, size, shift, lefts, splits = case
    query, key, value = draw(batch, heads, kept, rows, keys, size)
    exact, rounded = tables(size)
    expected = shifted_attention(query, key, value, exact, shift, scaling=0.4, lefts=lefts)
    found = kernels.shifted_attention(
        *(t.float().to(DEVICE) for t in (query, key, value)), rounded, shift,
        scaling=0.4, lefts=lefts, launch=launch, splits=splits,
    )  # fmt: skip
    assert found.dtype == torch.float32
    close(found, expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize("rows", [1, 90])
def test_sixteen_bits_and_strides_of_a_model(rows, dtype):
    """Queries come as (batch, rows, heads, size), keys as a part of a longer cache."""
    query, key, value = (t.to(dtype) for t in draw(1, 4, 2, rows, 120, 64))
    exact, rounded = tables(64)
    expected = shifted_attention(query.double(), key.double(), value.double(), exact, 33, scaling=0.1)
    query = query.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE)
    longer = torch.nn.functional.pad(key, (0, 0, 0, 9)).to(DEVICE)[:, :, :120]
    found = kernels.shifted_attention(query, longer, value.to(DEVICE), rounded, 33, scaling=0.1)
    assert found.dtype == dtype
    close(found, expected, 1e-2 if dtype == torch.float16 else 3e-2)


def test_decoding_steps_follow_each_other():
    """A growing cache, a card's short way to launch, and again the first length: each step is right."""
    exact, rounded = tables(64)
    query, key, value = (t.half() for t in draw(1, 4, 2, 1, 640, 64))
    for keys in (600, 601, 608, 609, 640, 600):
        wanted = shifted_attention(
            query.double(), key[:, :, :keys].double(), value[:, :, :keys].double(), exact, 33, scaling=0.1
        )
        part = [t[:, :, :keys].contiguous().to(DEVICE) for t in (key, value)]
        found = kernels.shifted_attention(query.to(DEVICE), *part, rounded, 33, scaling=0.1, splits=3)
        close(found, wanted, 1e-2)
        # Pointers and strides that no wide load can be made of, by the way of old.
        odd = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in part]
        found = kernels.shifted_attention(query.to(DEVICE), *odd, rounded, 33, scaling=0.1, splits=3)
        close(found, wanted, 1e-2)


def test_merging():
    """Softmaxes over two halves of the keys, merged, are the softmax over all."""
    query, key, value = draw(2, 3, 3, 40, 40, 24)
    parts = []
    for half in (slice(0, 15), slice(15, 40)):
        scores = query @ key[:, :, half].mT
        parts.append((scores.softmax(-1) @ value[:, :, half], scores.logsumexp(-1)))
    (out, lse), (more, more_lse) = ([t.float().to(DEVICE) for t in part] for part in parts)
    whole = query @ key.mT
    wide = torch.zeros(2, 40, 3, 24, device=DEVICE).transpose(1, 2)
    wide.copy_(out)
    kernels.merge(wide, lse, more, more_lse)
    close(wide, whole.softmax(-1) @ value, 2e-5)
    close(lse, whole.logsumexp(-1), 2e-5)


def test_what_is_taken():
    query, key, value = (t.float().to(DEVICE) for t in draw(1, 2, 1, 4, 4, 16))
    _, rounded = tables(16)
    with pytest.raises(UserError, match="scaling is -1"):
        kernels.shifted_attention(query, key, value, rounded, 2, scaling=-1.0)
    assert kernels.can_shift(query, key, value) == (DEVICE == "cuda")
    assert not kernels.can_shift(query.requires_grad_(), key, value)
    with torch.no_grad():
        assert kernels.can_shift(query, key, value) == (DEVICE == "cuda")
        assert not kernels.can_shift(query, key.half(), value)
        assert not kernels.can_shift(query, key, value[..., :8])
