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


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's values along its diagonal, which goes round until it has met every row and every column.

    An edit changes a whole matrix, or whole columns or rows of one; whichever it is, some of these values change.
    Vectors are returned whole.
    """
    if tensor.ndim < 2 or not tensor.numel():
        return tensor.detach().reshape(-1)
    matrix = tensor.detach().reshape(-1, tensor.shape[-1])
    at = torch.arange(max(matrix.shape), device=tensor.device)
    return matrix[at % matrix.shape[0], at % matrix.shape[1]]


def model_fingerprint(
    model: Any, *, whole: Iterable[str] = (), instead: Iterable[tuple[str, torch.Tensor]] = ()
) -> str:
    """Returns a hash (hex) of a model's type and of the names, shapes and values of all its parameters.

    Of most parameters a :func:`sample` is read, some ten thousand values of a matrix, so that it costs little however
    large the model is. That tells other weights, any training, and every edit that is on the model; single numbers that
    were changed off the diagonal it does not see, unless the parameter is read whole.

    Args:
        model: A model, wrapped or not.
        whole: Names of parameters of which every value counts: those that an edit touches.
        instead: Values to take for some parameters, by name, instead of the model's.
    """
    inner = unwrap(model)
    replaced, entire = dict(instead), set(whole)
    digest = hashlib.sha256(str(getattr(getattr(inner, "config", None), "model_type", type(inner).__name__)).encode())
    for name, parameter in inner.named_parameters():
        value = replaced.get(name, parameter)
        read = checksum(value if name in entire else sample(value))
        digest.update(f"{name} {tuple(value.shape)} {name in entire} {read}\n".encode())
    return digest.hexdigest()[:32]
