"""The definition: magnitudes of outputs, and which rows they keep. Everything else is bookkeeping."""

from __future__ import annotations

import torch


def magnitude(output: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the sum over tokens of the absolute outputs of a linear layer (paper section 3.1).

    The paper divides by the sum over the outputs (L1 normalisation) and takes a mean over tokens; neither changes the
    order of the outputs, which is all that the mask looks at.

    Args:
        output: (…, d_out), any floating dtype.
        tokens: (…,) weights of the tokens, such as 0 at padding; None counts all alike.

    Returns:
        (d_out,) float32, or float64 for float64 outputs: sums in 16 bits would saturate.
    """
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    rows = output.detach().flatten(0, -2)
    if tokens is not None:
        rows = rows * tokens.reshape(-1, 1).to(rows.dtype)
    # One pass without a copy of the absolute values.
    return torch.linalg.vector_norm(rows, ord=1, dim=0, dtype=dtype)


def kept_rows(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Returns which rows are updated: those at or above the quantile (paper equations 4 and 5).

    The prose of equation 5 reads as if T were the share that is updated; the official code and the appendix ("5%
    (T=0.95) updated") fix it as the share that is frozen. The quantile is interpolated linearly, as in the official
    code; the paper's ``floor(T d)`` frozen rows differ from it by at most one. All rows that tie with the quantile
    are kept.

    Args:
        scores: (d_out,) floating.
        threshold: T in [0, 1): the share of frozen rows.

    Returns:
        (d_out,) bool.
    """
    if scores.dtype not in (torch.float32, torch.float64):  # torch.quantile takes no others
        scores = scores.float()
    return scores >= torch.quantile(scores, threshold)
