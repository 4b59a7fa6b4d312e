"""The change of a weight that maps given keys to given values and does least to what other keys give.

MEMIT (arXiv 2210.07229, equation 14): Δ = R Kᵀ (λ C + K Kᵀ)⁻¹ minimises λ tr(Δ C Δᵀ) + ‖Δ K − R‖².
"""

from __future__ import annotations

import torch

from modelwright.editing.deltas import Delta, Dense, LowRank
from modelwright.editing.examples import check_keys
from modelwright.editing.statistics import KeyStatistics
from modelwright.errors import UserError


def least_squares(
    statistics: KeyStatistics,
    layer: int,
    keys: torch.Tensor,
    residuals: torch.Tensor,
    *,
    weight: float,
    ridge: float = 0.0,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factors of Δ = R Kᵀ (λ C + K Kᵀ)⁻¹, computed in float64.

    With fewer keys than dimensions the equal form R (λ I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹ is solved: C is factorised once and for
    all edits, and the rest is as small as the number of keys.

    Args:
        statistics: C of the layer.
        layer: Which layer.
        keys: K, (d_ff, n).
        residuals: R, (d, n).
        weight: λ, how much C counts; 0 fits the keys alone.
        ridge: Added to C's diagonal, as a share of its mean.
        device: Where to solve; that of the keys by default.

    Returns:
        U (d, n) and V (n, d_ff), float64, on the device; Δ is U V.

    Raises:
        UserError: C is singular, λ is negative, or λ is 0 and the keys depend on each other.
    """
    if weight < 0:
        raise UserError(f"The weight of the covariance is {weight}: give 0 or more.")
    device = torch.device(device or keys.device)
    k, r = keys.to(device, torch.float64), residuals.to(device, torch.float64)
    d_ff, n = k.shape
    if n < d_ff:
        z = statistics.solve(layer, k, ridge=ridge, device=device)
        gram = k.T @ z
        gram = (gram + gram.T) / 2
        gram.diagonal().add_(weight)
        return _solved(gram, r), z.T
    c = statistics.covariance(layer).to(device, torch.float64)
    c.diagonal().add_(ridge * c.diagonal().mean())
    gram = weight * c + k @ k.T
    return r, _solved(gram, k.T)


def as_delta(u: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, *, transposed: bool) -> Delta:
    """Returns U V as a delta of a weight, in float32 or better: as factors, unless the whole matrix is smaller.

    Args:
        u: (out, n).
        v: (n, in).
        weight: The parameter.
        transposed: Whether the parameter is kept as (in, out).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if u.shape[1] * (u.shape[0] + v.shape[1]) < weight.numel():
        return LowRank(u.to(weight.device, wide).contiguous(), v.to(weight.device, wide).contiguous(), transposed)
    whole = u @ v
    return Dense((whole.T if transposed else whole).to(weight.device, wide).contiguous())


def _solved(gram: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Returns rhs · gram⁻¹ for a symmetric positive definite matrix."""
    check_keys(gram)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise UserError(
            "The edits' keys depend on each other (two requests with one subject and context?): give the covariance a "
            "weight above 0, or edit one at a time."
        )
    return torch.cholesky_solve(rhs.T, factor).T
