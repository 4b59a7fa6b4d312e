"""Do tasks use the same rows? The overlap of paper figures 3 and 4."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from modelwright.errors import UserError
from modelwright.training.migu.config import MIGUConfig
from modelwright.training.migu.definition import kept_rows
from modelwright.training.migu.mask import MIGUMask


def top_rows(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], config: MIGUConfig | None = None
) -> dict[str, torch.Tensor]:
    """Returns the rows of each layer with the largest magnitudes on some batches, without training on them.

    Args:
        model: The model; its mode and gradients are left as they were, and dropout is off.
        batches: Keyword arguments of the model's call, such as 100 samples of a task.
        config: ``threshold`` and ``target_modules``.

    Returns:
        Layer to (d_out,) bool.

    Raises:
        UserError: No batches, or no target layer.
    """
    config = config or MIGUConfig()
    with MIGUMask(model, config) as mask, _watched(model):
        mask.active = mask.in_evaluation = True
        for batch in batches:
            model(**batch)
        found = {name: kept_rows(total, config.threshold) for name, total in mask.magnitudes().items()}
    if not found:
        raise UserError("No layer gave an output: give at least one batch.")
    return found


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on, which is when a mask looks; no graph is kept beyond a batch."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


def row_overlap(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns the share of the first's rows that are the second's too, ``|A and B| / |A|``, by layer.

    Args:
        first: Layer to (d_out,) bool, of :func:`top_rows`.
        second: The same of other batches.
    """
    return {
        name: float((rows & second[name]).sum() / rows.sum().clamp(min=1))
        for name, rows in first.items()
        if name in second
    }
