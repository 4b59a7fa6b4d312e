"""Drawing gates that are 0 or 1, and passing gradients through the draw.

For a gate ``s`` with logit ``l`` and ``p = sigmoid(l)``, each estimator replaces ``d/dl E f(s)``:

- straight-through: ``f'(s) p (1 - p)``, exact where ``f`` is linear.
- ReinMax (Liu et al., arXiv 2304.08612): ``f'(s) [2 q (1 - q) - p (1 - p) / 2]`` with ``q = (p + s) / 2``: the
  trapezoid rule, exact where ``f`` is quadratic. It simplifies to ``f'(s) (1 - p) / 2`` at ``s = 1`` and
  ``f'(s) p / 2`` at 0.
- Gumbel-sigmoid: ``s = round(u)`` with ``u = sigmoid((l + noise) / T)``, and the gradient of ``u``.
"""

from __future__ import annotations

from typing import Any

import torch


def draw(logits: torch.Tensor, uniform: torch.Tensor, estimator: str, noise: str, temperature: float) -> torch.Tensor:
    """Draws gates.

    Args:
        logits: (n,) float32, the offset included.
        uniform: (n,) float32 in [0, 1): the randomness.
        estimator: ``reinmax``, ``straight_through`` or ``gumbel_sigmoid``.
        noise: Of the Gumbel-sigmoid: ``logistic`` or ``gumbel``.
        temperature: Of the Gumbel-sigmoid: smooths the gradient; the law of the gates does not depend on it.

    Returns:
        (n,) of zeros and ones, with a gradient with respect to the logits.
    """
    if estimator == "gumbel_sigmoid":
        uniform = uniform.clamp(1e-7, 1 - 1e-7)
        drawn = uniform.log() - (-uniform).log1p() if noise == "logistic" else -(-uniform.log()).log()
        soft = ((logits + drawn) / temperature).sigmoid()
        hard = (logits + drawn > 0).to(soft)
        return hard + (soft - soft.detach())
    function = {"reinmax": _ReinMax, "straight_through": _StraightThrough}[estimator]
    return function.apply(logits, (uniform < logits.sigmoid()).to(logits))


def on_probability(logits: torch.Tensor, estimator: str, noise: str) -> torch.Tensor:
    """Returns P(on): ``sigmoid(l)``, or ``1 - exp(-exp(l))`` where the noise is a single Gumbel draw."""
    if estimator == "gumbel_sigmoid" and noise == "gumbel":
        return -torch.expm1(-logits.exp())
    return logits.sigmoid()


class _ReinMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, gates)
        return gates.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, gates = ctx.saved_tensors
        p = logits.sigmoid()
        return gradients[0] * torch.where(gates > 0.5, (1 - p) / 2, p / 2), None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return gates.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        p = logits.sigmoid()
        return gradients[0] * p * (1 - p), None
