"""Knowing a model by its weights, so that an edit or statistics of another one are refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from modelwright.models.roles import unwrap

_CHUNK = 1 << 20


def checksum(tensor: torch.Tensor) -> str:
    """Returns a hash (hex) of a tensor's shape and values.

    It is computed where the tensor lies, in integers, so that it is the same on every device. Values are compared as
    float32: a bfloat16 checkpoint has the same hash however it is loaded.
    """
    flat = tensor.detach().reshape(-1)
    places = torch.arange(min(_CHUNK, max(1, flat.numel())), device=flat.device, dtype=torch.int64)
    weights = (places * 2654435761 + 12345) % (1 << 31) | 1
    sums = []
    for chunk in flat.split(_CHUNK):
        bits = chunk.float().view(torch.int32) if chunk.is_floating_point() else chunk
        sums.append((bits.to(torch.int64) * weights[: len(bits)]).sum())  # wraps modulo 2^64
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def model_fingerprint(model: Any, *, instead: Iterable[tuple[str, torch.Tensor]] = ()) -> str:
    """Returns a hash (hex) of a model's type and of the names, shapes and values of all its parameters.

    Args:
        model: A model, wrapped or not. Reads every weight once.
        instead: Values to take for some parameters, by name, instead of the model's.
    """
    inner = unwrap(model)
    replaced = dict(instead)
    digest = hashlib.sha256(str(getattr(getattr(inner, "config", None), "model_type", type(inner).__name__)).encode())
    for name, parameter in inner.named_parameters():
        digest.update(f"{name} {checksum(replaced.get(name, parameter))}".encode())
    return digest.hexdigest()[:32]
