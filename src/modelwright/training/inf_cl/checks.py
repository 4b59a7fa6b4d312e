"""What the contrastive losses refuse, with the user's own names for what is wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelwright.errors import UserError


def check_features(
    queries: Tensor, keys: Tensor, names: tuple[str, ...], block_size: int | None, alone: bool = True
) -> torch.dtype:
    """Refuses what needs no look at values; returns the dtype to compute in.

    That a process of a group has no rows is for the ring to say, to all of them.
    """
    for name, features in zip(names, (queries, keys)):
        if features.ndim != 2:
            raise UserError(f"{name} must be a matrix (rows, width), not of shape {tuple(features.shape)}.")
        if not features.is_floating_point():
            raise UserError(f"{name} are of dtype {features.dtype}: give floating-point features.")
        if alone and not len(features):
            raise UserError(f"{name} have no rows: a contrastive loss needs at least one pair.")
    if queries.shape[1] != keys.shape[1]:
        raise UserError(
            f"{names[0]} are {queries.shape[1]} wide and {names[1]} {keys.shape[1]}: project both to the same width."
        )
    if queries.device != keys.device:
        raise UserError(f"{names[0]} are on {queries.device} and {names[1]} on {keys.device}: move them to one device.")
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise UserError(f"block_size={block_size!r}: give a whole number of at least 1, or None.")
    return torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)


def check_pairs(images: Tensor, texts: Tensor) -> None:
    """Refuses images and texts of unequal number."""
    if len(images) != len(texts):
        raise UserError(
            f"image_embeds have {len(images)} rows and text_embeds {len(texts)}: row i of one must belong to row i of "
            "the other; for more texts than images use tiled_info_nce_loss."
        )


def check_labels(labels: Tensor, count: int, device: torch.device) -> None:
    """Refuses labels of another number, dtype or device."""
    if labels.dtype != torch.int64 or labels.shape != (count,) or labels.device != device:
        raise UserError(
            f"labels must be {count} int64 rows of keys on {device}, one for each query, not {tuple(labels.shape)} of "
            f"{labels.dtype} on {labels.device}."
        )


def scalar(value: Tensor | float, name: str, dtype: torch.dtype) -> Tensor:
    """Returns a number, or a tensor of one element, as a tensor ()."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise UserError(f"{name} must be one number, not a tensor of shape {tuple(value.shape)}.")
        return value.reshape(()).to(dtype)
    if not math.isfinite(value):
        raise UserError(f"{name} is {value}: it must be a finite number.")
    return torch.tensor(value, dtype=dtype)


def check_values(named: dict[str, Tensor], labels: Tensor | None, keys: int) -> None:
    """Refuses features and scales that are not finite, and labels out of range; asks the device once.

    The largest number of a matrix is not finite if one is not, and bounds every product.
    """
    device = next(iter(named.values())).device
    matrices = [value for value in named.values() if value.ndim]
    with torch.no_grad():
        # A scale on the host needs no question to the device.
        flags = [value.isfinite() for value in named.values() if not value.ndim and value.device == device]
        largest = [_largest(value) for value in matrices]
        scale = next(value for value in named.values() if not value.ndim).abs()
        # A mean over a batch adds up that many losses, of which each may be twice the largest product.
        bound = largest[0] * largest[1] * scale * (4.0 * matrices[0].shape[1] * max(map(len, matrices)))
        flags.append(bound.isfinite())
        if labels is not None:
            flags.append(((labels >= 0) & (labels < keys)).all())
        here = [value.isfinite() for value in named.values() if value.device != device]
        if all(torch.stack(flags).tolist()) and all(here):
            return
        for name, value in named.items():
            wrong = ~value.isfinite()
            if not wrong.any():
                continue
            if not value.ndim:
                raise UserError(f"{name} is {value.item()}: it must be a finite number.")
            rows = wrong.any(1).nonzero().flatten()
            raise UserError(
                f"{name} hold NaN or infinity in {len(rows)} of {len(value)} rows, first in row {int(rows[0])}: look "
                "for rows of length 0 that were normalised, or for an encoder that overflowed."
            )
        if not bound.isfinite():
            names = [name for name, value in named.items() if value.ndim]
            raise UserError(
                f"{names[0]} hold numbers up to {float(largest[0]):.2g} and {names[1]} up to {float(largest[1]):.2g}, "
                f"too large for the products' {str(largest[0].dtype).removeprefix('torch.')}: normalise them."
            )
        if labels is not None and len(outside := ((labels < 0) | (labels >= keys)).nonzero()):
            i = int(outside[0])
            raise UserError(
                f"labels[{i}] is {int(labels[i])}, but there are {keys} keys: give rows from 0 to {keys - 1}."
            )


def _largest(rows: Tensor) -> Tensor:
    """The largest number without its sign; not finite if one is not."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if not rows.numel():
        return rows.new_zeros((), dtype=dtype)
    return torch.linalg.vector_norm(rows, ord=math.inf, dtype=dtype)
