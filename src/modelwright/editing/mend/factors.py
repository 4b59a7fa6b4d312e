"""A gradient of linear maps as its two factors: what went in, and what came back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from modelwright.editing.mend.network import nonzero_rows
from modelwright.models.roles import Projection


def gradient_factors(
    loss: Callable[[], torch.Tensor], maps: Sequence[Projection]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns x and δ of each map: the gradient of its weight (out, in) is δᵀ x.

    Args:
        loss: Calls the model and returns a scalar; the maps' weights must require gradients.
        maps: Linear maps that the model uses once a call.

    Returns:
        For each map (n, in_features) and (n, out_features), float32 and without the rows that are zero.
    """
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def hook(number: int) -> Callable[..., None]:
        def keep(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[number], outputs[number] = args[0].detach(), output

        return keep

    handles = [m.module.register_forward_hook(hook(i)) for i, m in enumerate(maps)]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), [outputs[i] for i in range(len(maps))])
    finally:
        for handle in handles:
            handle.remove()
    return [nonzero_rows(inputs[i].float(), gradient.float()) for i, gradient in enumerate(gradients)]
