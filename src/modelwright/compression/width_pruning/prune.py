"""Narrower models from scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from modelwright.compression.budget import by_rank, choose
from modelwright.compression.selections import Layout, Masks, blocks_of
from modelwright.compression.shrink import shrink
from modelwright.compression.width_pruning.scores import (
    gather,
    input_norms,
    magnitude_scores,
    random_scores,
    wanda_scores,
)
from modelwright.compression.width_pruning.slicing import slice_model
from modelwright.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("magnitude", "wanda", "slicegpt", "random")


def width_masks(
    model: PreTrainedModel,
    method: str,
    ratio: float,
    *,
    batches: Iterable[dict[str, torch.Tensor]] | None = None,
    mode: str = "independent",
    balance: float = 0.0,
    round_to: int = 1,
    seed: int = 0,
) -> Masks:
    """Chooses gates by score. Within each selection the best stay, and every selection keeps the same share.

    Args:
        model: The model.
        method: ``magnitude``, ``wanda`` or ``random``.
        ratio: Share of the blocks' parameters to keep.
        batches: Calibration text, finite, with ``input_ids``; for ``wanda`` only.
        mode: Which gates there are: see :class:`~modelwright.compression.selections.Layout`.
        balance: Keeps this share more of the MLP's units, and so fewer residual dimensions; may be negative.
        round_to: Widths are multiples of this.
        seed: Of ``random``.

    Raises:
        UserError: The model cannot be pruned, there is no such method, no calibration text where it is needed, or the
            balance is no share.
    """
    layout = Layout.of(blocks_of(model), mode)
    if not -1 <= balance <= 1:
        raise UserError(f"The balance is a share, from -1 to 1, not {balance:g}.")
    if method == "random":
        scores = random_scores(layout, seed)
    elif method == "magnitude":
        scores = gather(layout, magnitude_scores(model, layout.blocks))
    elif method == "wanda":
        if batches is None:
            raise UserError("Wanda weighs weights by activations, so it needs calibration text: give --data.")
        scores = gather(layout, wanda_scores(model, layout.blocks, input_norms(model, batches)))
    else:
        raise UserError(f"There is no method '{method}' by scores: {did_you_mean(method, METHODS)}")
    ranked = [
        own + balance * any(kind == "mlp_middle" for _, kind in selection.uses)
        for own, selection in zip(by_rank(scores), layout.selections, strict=True)
    ]
    return choose(layout, ranked, ratio, round_to)


def prune_width(
    model: PreTrainedModel,
    method: str,
    ratio: float,
    *,
    batches: Iterable[dict[str, torch.Tensor]] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Returns a narrower model; see :func:`width_masks` and :func:`~modelwright.compression.width_pruning.slice_model`.

    Raises:
        UserError: See there.
    """
    if method == "slicegpt":
        if batches is None:
            raise UserError("Principal components are those of activations: give calibration text with --data.")
        return slice_model(model, ratio, batches, round_to=options.get("round_to", 1))
    masks = width_masks(model, method, ratio, batches=batches, **options)
    pruning = {
        "method": method, "ratio": masks.ratio, "block_parameters": masks.parameters,
        "block_parameters_before": sum(b.total for b in masks.blocks), "settings": options,
    }  # fmt: skip
    return shrink(model, masks, pruning)
