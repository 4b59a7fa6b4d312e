"""Which parameters weight decay shrinks, by how much in all, and how to give parts of a model decays of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

from modelwright.errors import UserError
from modelwright.models.roles import unwrap
from modelwright.training.resume import decayed_parameters

#: Parts of a model that a sweep can decay alone: ``all`` is every parameter, ``matrices`` leaves out norms and biases.
DecayOn = Literal["matrices", "all", "body", "embeddings", "head"]


def split_decay_groups(
    model: Any, body: float = 0.1, embeddings: float = 0.0, head: float = 0.0, exempt_norms: bool = True
) -> list[dict[str, Any]]:
    """Returns parameter groups for AdamW, with a weight decay for each part of a model.

    Args:
        model: A causal language model, wrapped or not. Every trainable parameter is in exactly one group; a weight that
            embedding and head share is there once, with the embeddings.
        body: Decay of the matrices of the blocks.
        embeddings: Decay of the embeddings of tokens and positions.
        head: Decay of the output projection.
        exempt_norms: Whether norms, biases and other vectors have none; otherwise they have the body's.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``name`` (embeddings, head, body, rest); empty ones are left out.

    Raises:
        UserError: A decay is negative, or embedding and head share a weight but not a decay.
    """
    for name, value in (("body", body), ("embeddings", embeddings), ("head", head)):
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"The weight decay of the {name} must be 0 or more, not {value}.")
    inner = unwrap(model)
    tables = {id(m.weight) for m in inner.modules() if isinstance(m, nn.Embedding)}
    top = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    top_weight = None if top is None else getattr(getattr(top, "base_layer", top), "weight", None)
    if top_weight is not None and id(top_weight) in tables and embeddings != head:
        raise UserError(
            f"The model's embedding and head are one weight, so it cannot decay by {embeddings} and {head}: give both "
            f"the same."
        )
    matrices = set(decayed_parameters(model))
    groups: dict[str, dict[str, Any]] = {
        "embeddings": {"params": [], "weight_decay": embeddings},
        "head": {"params": [], "weight_decay": head},
        "body": {"params": [], "weight_decay": body},
        "rest": {"params": [], "weight_decay": 0.0 if exempt_norms else body},
    }
    for name, parameter in model.named_parameters():  # a shared weight comes once
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            part = "embeddings"
        elif parameter is top_weight:
            part = "head"
        else:
            part = "body" if name in matrices else "rest"
        groups[part]["params"].append(parameter)
    return [{**group, "name": name} for name, group in groups.items() if group["params"]]


def decay_groups(model: Any, decay: float, on: DecayOn = "matrices") -> list[dict[str, Any]]:
    """Returns the groups of :func:`split_decay_groups` with one decay on some parts and none on the others.

    Raises:
        UserError: There is no such part, or it is the head or the embeddings of a model in which they are one.
    """
    if on not in get_args(DecayOn):
        raise UserError(f"Weight decay cannot act on '{on}': known: {', '.join(get_args(DecayOn))}.")
    if on in ("matrices", "all"):
        return split_decay_groups(model, decay, decay, decay, exempt_norms=on == "matrices")
    body, embeddings, head = (decay if on == part else 0.0 for part in ("body", "embeddings", "head"))
    return split_decay_groups(model, body, embeddings, head)


def describe_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for each group its name, its decay, and how many tensors and numbers it has."""
    return [
        {
            "part": group["name"],
            "weight_decay": group["weight_decay"],
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
        }
        for group in groups
    ]


def decay_over_run(rates: Iterable[float], decay: float) -> tuple[float, float]:
    """Returns what decides how much AdamW's decoupled decay shrinks weights in a run: lambda alone says nothing.

    Args:
        rates: Learning rate of each step.
        decay: lambda.

    Returns:
        ``sum lr_t * lambda``, and ``prod (1 - lr_t * lambda)``: what is left of a weight that gets no gradient.
    """
    rates = list(rates)
    return decay * math.fsum(rates), math.prod(1 - rate * decay for rate in rates)
