"""Small parts of an encoder of pairs: its towers' parameters, and how hidden states become one vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelwright.training.contrastive.sentence_folder import Pooling, SentenceFolder

#: How the names of a tower's parameters begin, in CLIP, SigLIP and their kin.
_STEMS = {"image": ("vision", "visual", "image"), "text": ("text",)}


def tower_parameters(model: Any, tower: str) -> list[nn.Parameter]:
    """Returns the parameters of the ``image`` or the ``text`` tower of a dual encoder; none if they are not found."""
    return [p for name, p in model.named_parameters() if name.startswith(_STEMS[tower])]


def frozen_tower(model: Any) -> str:
    """Returns the tower of a dual encoder of which nothing is trained: ``image``, ``text``, or an empty string."""
    for tower in _STEMS:
        parameters = tower_parameters(model, tower)
        if parameters and not any(p.requires_grad for p in parameters):
            return tower
    return ""


def upcast(tensor: Tensor) -> Tensor:
    """Returns 16-bit numbers in float32, others as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pools (rows, length, width) to (rows, width); padding is on the right."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        last = mask.sum(1).sub(1).clamp(min=0)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def default_pooling(asked: str, config: Any, sentence: SentenceFolder | None) -> Any:
    """Returns how a text encoder's hidden states become one vector: as asked, or as its kind is used."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if asked != "auto":
        return asked
    if sentence:
        return sentence.pooling
    kind = config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if causal else "mean"
