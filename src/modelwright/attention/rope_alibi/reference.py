"""RoPE × ALiBi from its equation, one pair at a time in float64: short, slow, the definition."""

from __future__ import annotations

import math

import torch


def rope_alibi_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    slopes: torch.Tensor,
    harmonic_distance: bool = False,
    lambda_r: float = 1.0,
    lambda_a: float = 1.0,
    theta: float | None = 10000.0,
) -> torch.Tensor:
    """Attends causally with scores lambda_r (R_i q)·(R_j k) / √d - lambda_a m b(i - j).

    Args:
        query: (heads, tokens, size), not rotated.
        key: (heads, tokens, size), not rotated.
        value: (heads, tokens, value size).
        slopes: (heads,).
        harmonic_distance: Whether b(n) is 1 + 1/2 + … + 1/n, and not n.
        lambda_r: Factor of the rotary score.
        lambda_a: Factor of the penalty.
        theta: Base of the rotation, which turns the halves of a head against each other; None does not rotate.

    Returns:
        (heads, tokens, value size) float64.
    """
    query, key, value = query.double(), key.double(), value.double()
    heads, tokens, size = query.shape

    def rotate(x: torch.Tensor, place: int) -> torch.Tensor:
        if theta is None:
            return x
        half = size // 2
        angle = place * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    out = torch.zeros(heads, tokens, value.shape[-1], dtype=torch.float64)
    for h in range(heads):
        for i in range(tokens):
            scores = []
            for j in range(i + 1):
                far = sum(1 / n for n in range(1, i - j + 1)) if harmonic_distance else i - j
                content = rotate(query[h, i], i) @ rotate(key[h, j], j) / math.sqrt(size)
                scores.append(lambda_r * content - lambda_a * float(slopes[h]) * far)
            out[h, i] = torch.stack(scores).softmax(0) @ value[h, : i + 1]
    return out
