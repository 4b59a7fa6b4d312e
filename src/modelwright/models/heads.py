"""Single attention heads: where their outputs and queries pass, in every family that :mod:`.roles` knows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelwright.errors import UserError
from modelwright.models.roles import Projection, roles, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A layer and a query head in it, both from 0.
Head = tuple[int, int]


@dataclass(frozen=True)
class HeadLayer:
    """The attention of one layer.

    Attributes:
        index: Number of the layer.
        heads: Query heads.
        size: Width of a head's output.
        output: Output projection; its input is the heads' outputs side by side, ``(…, heads * size)``.
        query: Query projection, or None where it is not known.
        query_norm: Norm of the queries behind the projection, or None.
    """

    index: int
    heads: int
    size: int
    output: nn.Module
    query: Projection | None = None
    query_norm: nn.Module | None = None

    def columns(self, head: int) -> slice:
        """Where a head's output stands in the input of the output projection."""
        return slice(head * self.size, (head + 1) * self.size)


def head_layers(model: Any, *, like: str | None = None, output: str | None = None) -> dict[int, HeadLayer]:
    """Returns the layers that have attention heads, by number.

    Args:
        model: A causal language model, wrapped or not.
        like: See :func:`~modelwright.models.roles.roles`.
        output: For a family that is not known: dotted name of the output projection with ``{layer}`` in it, such as
            ``model.layers.{layer}.self_attn.o_proj``. Queries are not found that way.

    Raises:
        UserError: No layer has attention heads, or a projection cannot be found.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config()
    count = getattr(config, "num_attention_heads", None)
    found: dict[int, HeadLayer] = {}
    if output is not None:
        pattern = re.compile(re.escape(output).replace(re.escape("{layer}"), r"(\d+)"))
        for name, module in inner.named_modules():
            if (match := pattern.fullmatch(name)) and match.groups():
                found[int(match[1])] = _layer(int(match[1]), count, Projection(name, module))
        if not found:
            raise UserError(f"No module of {type(inner).__name__} is called '{output}', with a number for {{layer}}.")
        return dict(sorted(found.items()))
    for layer in roles(inner, like=like).layers:
        if layer.attention is not None:
            norm = getattr(layer.attention, "q_norm", None)
            found[layer.index] = _layer(layer.index, count, layer.output, layer.query, norm)
    if not found:
        raise UserError(f"{type(inner).__name__} has no attention heads.")
    return found


def _layer(
    index: int, count: Any, output: Projection, query: Projection | None = None, norm: nn.Module | None = None
) -> HeadLayer:
    base = output.base
    # A quantized layer's weight is packed, so the width is asked of the module first.
    width = getattr(base, "in_features", None) or output.weight().shape[1]
    if not isinstance(count, int) or count < 1 or width % count:
        raise UserError(f"{output.name} takes {width} numbers, which {count} heads cannot share evenly.")
    return HeadLayer(index, count, width // count, output.module, query, norm)


def check_heads(heads: Iterable[Sequence[int]], layers: dict[int, HeadLayer]) -> list[Head]:
    """Returns heads as pairs, in order.

    Raises:
        UserError: A head is not in the model, or is there twice.
    """
    found: list[Head] = []
    for head in heads:
        try:
            layer, number = (int(part) for part in head)
        except (TypeError, ValueError) as error:
            raise UserError(f"{head!r} is no head: give pairs of layer and head, counted from 0.") from error
        if layer not in layers:
            raise UserError(f"There is no layer {layer} with attention: the model has {_range(list(layers))}.")
        if not 0 <= number < layers[layer].heads:
            raise UserError(f"Layer {layer} has no head {number}: its heads are 0 to {layers[layer].heads - 1}.")
        if (layer, number) in found:
            raise UserError(f"Head {number} of layer {layer} is given twice.")
        found.append((layer, number))
    return found


def all_heads(model: Any, *, like: str | None = None, output: str | None = None) -> list[Head]:
    """Returns every head of a model; see :func:`head_layers`."""
    found = head_layers(model, like=like, output=output)
    return [(index, head) for index, layer in found.items() for head in range(layer.heads)]


def _range(layers: list[int]) -> str:
    if layers == list(range(len(layers))):
        return f"layers 0 to {len(layers) - 1}"
    return "layers " + ", ".join(map(str, layers))


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Returns what tells a model from others: SHA-256 (hex) over its shapes and a sample of its weights.

    Of each weight up to 16 numbers are read, rounded to bfloat16, so that a model is the same in float32 and bfloat16
    and on every device. (In float16 it may count as another, if its checkpoint is float32: rounding twice differs.)
    Any training changes it, and so does quantization.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(unwrap(model).named_parameters()):
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, min(16, flat.numel()), dtype=torch.float64).long().unique()
        values = flat[at.to(flat.device)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {values.tolist()}\n".encode())
    return digest.hexdigest()
