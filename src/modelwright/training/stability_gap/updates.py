"""How far the weights of the lowest and the highest layers have moved: the paper's sign of a stability gap."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from modelwright.errors import UserError
from modelwright.models.roles import roles, unwrap

Form = Literal["ratio_of_means", "mean_of_ratios"]
_EPSILON = 1e-8


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model in order; for an unknown family, its longest list of modules.

    Raises:
        UserError: It has none.
    """
    try:
        return [layer.block for layer in roles(model).layers]
    except UserError:
        lists = [m for m in unwrap(model).modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise
        return list(max(lists, key=lambda found: len(list(found))))


def effective_weights(block: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights that a block computes with, by name: a LoRA layer counts as one merged matrix."""
    merged: dict[str, torch.Tensor] = {}
    inside: list[str] = []
    for name, module in block.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            layer: Any = module
            weight = layer.base_layer.weight.detach()
            if not layer.merged:
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_A:
                        weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
            merged[f"{name}.weight"] = weight
            inside.append(f"{name}.")
    plain = {
        name: p.detach()
        for name, p in block.named_parameters()
        if not any(name.startswith(prefix) for prefix in inside)
    }
    return {**plain, **merged}


class LayerUpdates:
    """Remembers the weights of the lowest and the highest layers, and says how much they have changed since.

    Args:
        model: The model as it is before training, wrapped or not.
        groups: Layers in each of the two groups; the paper has 5. A model with fewer than twice as many has half of its
            layers in each, one with a single layer has it in both.
        form: ``ratio_of_means``: mean of ``|w_t - w_0|`` over mean of ``|w_0|``, which zeros do not hurt;
            ``mean_of_ratios``: mean of ``|w_t - w_0| / (|w_0| + 1e-8)``. The paper does not say how it treats zeros.

    Raises:
        UserError: The groups are not positive, or the model has no layers.
    """

    def __init__(self, model: nn.Module, groups: int = 5, form: Form = "ratio_of_means") -> None:
        if groups < 1:
            raise UserError(f"The number of layers in a group must be at least 1, not {groups}.")
        layers = len(decoder_layers(model))
        size = max(1, min(groups, layers // 2))
        self.form = form
        self.bottom, self.top = list(range(size)), list(range(layers - size, layers))
        blocks = decoder_layers(model)
        self._first = {
            i: {name: w.to("cpu", copy=True) for name, w in effective_weights(blocks[i]).items()}
            for i in {*self.bottom, *self.top}
        }

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Returns ``update_bottom``, ``update_top`` and their ``update_ratio``; nan where nothing has moved yet."""
        blocks = decoder_layers(model)
        bottom, top = self._group(blocks, self.bottom), self._group(blocks, self.top)
        return {"update_bottom": bottom, "update_top": top, "update_ratio": bottom / top if top > 0 else math.nan}

    def _group(self, blocks: list[nn.Module], layers: list[int]) -> float:
        moved = size = ratios = 0.0
        count = 0
        for i in layers:
            for name, weight in effective_weights(blocks[i]).items():
                first = self._first[i][name].to(weight.device)
                change = (weight.float() - first.float()).abs()
                if self.form == "mean_of_ratios":
                    ratios += float((change / (first.float().abs() + _EPSILON)).sum(dtype=torch.float64))
                else:
                    moved += float(change.sum(dtype=torch.float64))
                    size += float(first.abs().sum(dtype=torch.float64))
                count += weight.numel()
        if self.form == "mean_of_ratios":
            return ratios / count
        return moved / size if size > 0 else math.nan
