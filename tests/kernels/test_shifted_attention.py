"""The plain definition of shifted attention against every pair turned by hand."""

import pytest
import torch

from modelwright.kernels.shifted_attention import Turn, shifted_attention


def turn(size, angle=0.7):
    """Halves are pairs; the last two features do not turn."""
    pairs = (size - 2) // 2
    angles = angle ** torch.arange(1, pairs + 1, dtype=torch.float64)
    cos, sin = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    cos[:pairs] = cos[pairs : 2 * pairs] = angles.cos()
    sin[:pairs], sin[pairs : 2 * pairs] = -angles.sin(), angles.sin()
    partner = torch.arange(size)
    partner[:pairs], partner[pairs : 2 * pairs] = torch.arange(pairs, 2 * pairs), torch.arange(pairs)
    return Turn(cos, sin, partner.int())


def draw(batch, heads, kept, rows, keys, size=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, size, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, batch, kept, keys, size, generator=generator, dtype=torch.float64)
    return query, key, value


def test_a_turn_is_a_rotation():
    there = turn(10)
    back = Turn(there.cos, -there.sin, there.partner)
    x = draw(1, 1, 1, 5, 5)[0]
    torch.testing.assert_close(back.of(there.of(x)), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(there.of(x).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(there.of(x)[..., 8:], x[..., 8:])
    assert there.of(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shift", [0, 1, 4, 9, 50])
def test_pair_by_pair(shift):
    query, key, value = draw(2, 4, 2, 6, 9)
    lefts, there = [0, 5], turn(10)
    found = shifted_attention(query, key, value, there, shift, scaling=0.3, lefts=lefts)
    for b in range(2):
        for h in range(4):
            for row in range(6):
                m = 3 + row
                seen = range(lefts[b], m + 1)
                if not seen:
                    assert not found[b, h, row].any()
                    continue
                turned = there.of(query[b, h, row])
                scores = torch.stack(
                    [(turned if m - n >= shift else query[b, h, row]) @ key[b, h // 2, n] for n in seen]
                )
                expected = (0.3 * scores).softmax(0) @ value[b, h // 2, lefts[b] : m + 1]
                torch.testing.assert_close(found[b, h, row], expected, rtol=0, atol=1e-12)
