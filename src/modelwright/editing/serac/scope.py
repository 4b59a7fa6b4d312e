"""SERAC's scope score and its mixture of two models (arXiv 2206.06520, section 3)."""

from __future__ import annotations

import torch

#: In training, scores are kept this far from 0 and 1, where the mixture's gradient is not finite.
MARGIN = 1e-6


def scope_scores(queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Returns exp(−‖φ(x) − φ(x_e; y_e)‖²): 1 for the same embedding, towards 0 far from it.

    Args:
        queries: (n, d), embeddings of inputs.
        memory: (m, d), embeddings of the edits.

    Returns:
        (n, m) in [0, 1].
    """
    return (-(queries[:, None] - memory[None]).square().sum(-1)).exp()


def log_mixture(base: torch.Tensor, counterfactual: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Returns log((1 − s) p_base + s p_counterfactual).

    Args:
        base: (n, length, vocabulary), log-probabilities of the base model.
        counterfactual: The same, of the small model.
        scores: (n,), each row's scope score s.
    """
    s = scores.clamp(MARGIN, 1 - MARGIN)[:, None, None]
    return torch.logaddexp(torch.log1p(-s) + base, s.log() + counterfactual)
