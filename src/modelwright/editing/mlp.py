"""The matrix that most editors work on: an MLP's map from its intermediate units back to the hidden size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelwright.editing.editor import check_layer, layer_for
from modelwright.errors import UserError
from modelwright.models.roles import Projection, roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def down_projection(model: PreTrainedModel, layer: int) -> Projection:
    """Returns a layer's down projection.

    Raises:
        UserError: There is no such layer, or the family's layers have no MLP.
    """
    parts = roles(model)
    projection = parts.layers[check_layer(layer, len(parts.layers))].down
    if projection is None:
        raise UserError(f"The layers of a '{parts.family}' model have no MLP that could be edited.")
    return projection


def chosen_layer(model: PreTrainedModel, layer: int | None, paper_layer: int) -> int:
    """Returns a layer's number: the one that was asked for, or the one as deep as the paper's of 32.

    Raises:
        UserError: There is no such layer.
    """
    depth = len(roles(model).layers)
    return layer_for(depth, paper_layer) if layer is None else check_layer(layer, depth)
