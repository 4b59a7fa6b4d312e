"""Flexi-JEST's cheap scoring: a vision transformer that takes larger patches than it was made with (FlexiViT).

Half the patches a side are a quarter of the tokens. The patch-embedding kernel is resized so that patches mean the same
(pseudo-inverse resize, "FlexiViT", arXiv 2212.08013, Section 3.2), position embeddings are interpolated.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from modelwright.errors import UserError


@functools.cache
def _resizing(old: int, new: int) -> Tensor:
    """The matrix (new^2, old^2) that takes a kernel to its resized one, float64.

    Where images are resized by B, ``new = pinv(B^T) old`` keeps the products of kernels with images: exactly when
    enlarging, where B has full column rank, and in least squares otherwise. Bilinear, without antialiasing.
    """
    basis = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    enlarged = interpolate(basis, size=(new, new), mode="bilinear", align_corners=False)
    return torch.linalg.pinv(enlarged.flatten(1))


def resize_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """Returns a patch-embedding kernel for another patch size, by pseudo-inverse resize; gradient flows to the old one.

    Args:
        kernel: (out, channels, p, p).
        patch_size: The new p; equal to the old one, the kernel itself is returned.

    Returns:
        (out, channels, patch_size, patch_size), of the kernel's dtype.
    """
    old = kernel.shape[-1]
    if patch_size == old:
        return kernel
    matrix = _resizing(old, patch_size).to(kernel.device, torch.promote_types(kernel.dtype, torch.float32))
    resized = kernel.flatten(2).to(matrix.dtype) @ matrix.T
    return resized.unflatten(-1, (patch_size, patch_size)).to(kernel.dtype)


def resize_positions(positions: Tensor, height: int, width: int, special: int = 0) -> Tensor:
    """Returns position embeddings for another grid: bicubic, as transformers' ``interpolate_pos_encoding``.

    Args:
        positions: (special + n, d), a square grid of n after ``special`` class tokens.
        height: Rows of the new grid.
        width: Columns of the new grid.
        special: Positions of class tokens, which stay.

    Returns:
        (special + height * width, d).
    """
    grid = positions[special:]
    side = round(len(grid) ** 0.5)
    if (side, side) == (height, width):
        return positions
    image = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = interpolate(image.float(), size=(height, width), mode="bicubic", align_corners=False)
    flat = resized.permute(0, 2, 3, 1).reshape(height * width, -1).to(positions.dtype)
    return torch.cat([positions[:special], flat])


def vision_embeddings(model: nn.Module) -> Any:
    """Returns the module of a CLIP or SigLIP model that makes tokens of pictures.

    Raises:
        UserError: There is none with a convolution for patches and a learned position for each, or several.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "patch_embedding", None), nn.Conv2d)
        and isinstance(getattr(module, "position_embedding", None), nn.Embedding)
    ]
    if len(found) != 1:
        raise UserError(
            f"Patches of another size need a vision tower such as CLIP's or SigLIP's (a patch convolution and learned "
            f"positions), and {type(model).__name__} has {len(found)}: leave scoring_patch_size out."
        )
    return found[0]


def check_patch_size(model: nn.Module, size: int) -> None:
    """Checks that a model's pictures can be cut into patches of this size.

    Raises:
        UserError: They cannot, or the model has no such vision tower.
    """
    embeddings = vision_embeddings(model)
    if size < 1 or embeddings.image_size % size:
        raise UserError(
            f"Pictures of {embeddings.image_size} x {embeddings.image_size} cannot be cut into patches of {size}: "
            f"choose a divisor of {embeddings.image_size}, such as {2 * embeddings.patch_size}."
        )


@contextlib.contextmanager
def patch_size(model: nn.Module, size: int | None) -> Iterator[None]:
    """Lets a CLIP or SigLIP vision tower work with another patch size inside the block.

    Weights are neither changed nor copied: the kernel is resized in each forward pass, and gradient flows to it. Pass
    no ``interpolate_pos_encoding`` meanwhile.

    Args:
        model: Model with such a tower.
        size: Patch size in pixels; None or the model's own leaves it alone.

    Raises:
        UserError: Pictures cannot be cut into such patches, or the model has no such tower.
    """
    if size is None or size == vision_embeddings(model).patch_size:
        yield
        return
    check_patch_size(model, size)
    embeddings = vision_embeddings(model)

    def forward(pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        convolution = embeddings.patch_embedding
        kernel = resize_kernel(convolution.weight, size)
        patches = conv2d(pixel_values.to(kernel.dtype), kernel, convolution.bias, stride=size)
        tokens = patches.flatten(2).transpose(1, 2)
        positions = embeddings.position_embedding.weight
        special = len(positions) - embeddings.num_patches
        if special:
            tokens = torch.cat([embeddings.class_embedding.expand(len(tokens), 1, -1), tokens], dim=1)
        return tokens + resize_positions(positions, patches.shape[-2], patches.shape[-1], special)

    # An attribute of the instance hides the class's method, and taking it away leaves nothing behind.
    before = embeddings.__dict__.get("forward")
    embeddings.forward = forward
    try:
        yield
    finally:
        if before is None:
            del embeddings.forward
        else:
            embeddings.forward = before


def mixed_patch_sizes(model: Any, size: int) -> None:
    """Makes a model in training mode encode a random half of every (sub-)batch of pictures with another patch size.

    Flexi-JEST's training, so that scores at the larger patch size keep their meaning: both halves stand in one loss. In
    evaluation mode, and so in scoring and in what is saved, the model is as before. The halves are drawn from torch's
    CPU generator, whose state GradCache repeats.

    Args:
        model: CLIP or SigLIP model; its ``get_image_features`` is replaced.
        size: Patch size of the one half in pixels.

    Raises:
        UserError: Pictures cannot be cut into such patches.
    """
    check_patch_size(model, size)
    # Not a closure: a copy of the model must not go on calling the original.
    model.get_image_features = functools.partial(_mixed_features, model, size)


def _mixed_features(model: Any, size: int, pixel_values: Tensor, **keys: Any) -> Any:
    plain = type(model).get_image_features
    if not model.training:
        return plain(model, pixel_values=pixel_values, **keys)
    # Half of them; of an odd one out, half of the time.
    order = torch.randperm(len(pixel_values))
    count = (len(order) + int(torch.randint(2, ()))) // 2
    coarse, fine = (part.to(pixel_values.device) for part in (order[:count], order[count:]))
    parts = []
    if len(coarse):
        with patch_size(model, size):
            parts.append(plain(model, pixel_values=pixel_values[coarse], **keys))
    if len(fine):
        parts.append(plain(model, pixel_values=pixel_values[fine], **keys))
    back = torch.cat([coarse, fine]).argsort()
    result = parts[0]
    result.pooler_output = torch.cat([part.pooler_output for part in parts])[back]
    result.last_hidden_state = None  # of two lengths
    return result


def relative_cost(model: nn.Module, size: int | None, text_tokens: int = 0) -> float:
    """FLOPs of encoding a pair with another patch size, over those with the model's own: matrix products only.

    Args:
        model: CLIP or SigLIP model.
        size: Patch size in pixels; None: the model's own.
        text_tokens: Tokens of a text; 0 counts the vision tower alone. (The paper's 28% at twice the patch size is, as
            far as we can tell, of the vision tower; with its texts of 64 tokens the pair would cost 40%.)
    """
    embeddings: Any = vision_embeddings(model)
    config: Any = embeddings.config
    whole: Any = getattr(model, "config", None)

    def tower(shape: Any, tokens: int) -> float:
        width = shape.hidden_size
        a_token = 8 * width**2 + 4 * width * shape.intermediate_size + 4 * tokens * width
        return float(shape.num_hidden_layers * tokens * a_token)

    def pair(patch: int) -> float:
        grid = (config.image_size // patch) ** 2
        special = embeddings.position_embedding.num_embeddings - embeddings.num_patches
        patches = 2 * grid * config.num_channels * patch**2 * config.hidden_size
        text = tower(whole.text_config, text_tokens) if text_tokens else 0.0
        return tower(config, grid + special) + patches + text

    return pair(size or embeddings.patch_size) / pair(embeddings.patch_size)
