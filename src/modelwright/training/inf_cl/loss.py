"""Contrastive losses whose memory grows with the batch, not with its square (Inf-CL, sections 3.1 and 3.2).

The b x b matrix of logits is made tile by tile, reduced to the log-sum-exp of its rows and columns, and made once more
for the gradient: the loss and the gradient are those of the full matrix, to rounding. Both directions come from one
sweep; the paper and its code sweep once for each.

Rows are *queries* (images), columns *keys* (texts). Features may be of any floating dtype; they are not normalised
here. Sums are made in float32 (float64 for float64 features), under autocast too, and gradients come back in the
features' dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.errors import UserError
from modelwright.kernels import pair_tiles
from modelwright.training.inf_cl.checks import check_features, check_labels, check_pairs, check_values, scalar

Backend = Literal["auto", "torch", "triton"]
Reduction = Literal["mean", "sum", "none"]

#: Up to here, on a card, launching the kernels takes longer than a single tile of torch's.
_FEW_PAIRS = 4096**2


def tiled_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    block_size: int | None = None,
    backend: Backend = "auto",
    process_group: Any = None,
    reduction: Reduction = "mean",
    symmetric: bool = True,
) -> Tensor:
    """CLIP's loss: the cross-entropy of row i against key i, averaged over both directions.

    Args:
        image_embeds: (b, d), normalised by the caller.
        text_embeds: (b, d); row i belongs to image i.
        logit_scale: Multiplies the products: ``model.logit_scale.exp()``. A number or a tensor of one element.
        block_size: Side of a tile; None chooses one for the device. It changes time and memory, not the result.
        backend: ``torch`` runs anywhere, ``triton`` on CUDA and not in float64; ``auto`` is triton where it
            can and there are more than 4,096 x 4,096 pairs.
        process_group: With a group of more than one process, the loss is over the pairs of all of them: every process
            gives its own rows, equally many, and gets the mean over them. Averaged over the processes (as
            DistributedDataParallel averages the encoder's gradients) this is the loss of one process with all pairs;
            the gradient of ``logit_scale`` is already averaged. None means these rows only, whatever is initialised.
        reduction: ``mean`` or ``sum`` over pairs, or ``none`` for a loss per pair, (b,).
        symmetric: Both directions; otherwise image to text only.

    Returns:
        (), or (b,) with ``reduction="none"``; float32, or float64 if the features are.

    Raises:
        UserError: Shapes do not match, the batch is empty, a dtype is not floating, a value is not finite, or an
            option is unknown.
    """
    names = ("image_embeds", "text_embeds", "logit_scale")
    check_features(image_embeds, text_embeds, names[:2], block_size, _ring(process_group) is None)
    check_pairs(image_embeds, text_embeds)
    return _info_nce(
        image_embeds, text_embeds, logit_scale, None, names, symmetric, block_size, backend, process_group, reduction
    )


def tiled_info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    symmetric: bool = False,
    block_size: int | None = None,
    backend: Backend = "auto",
    process_group: Any = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE: the cross-entropy of each query against all keys, of which one is its own.

    Keys may be more than the queries: hard negatives are further rows of ``keys``.

    Args:
        queries: (m, d), normalised by the caller if cosines are wanted.
        keys: (n, d).
        scale: Multiplies the products (the inverse of the temperature). A number or a tensor of one element.
        labels: (m,) int64, the row of ``keys`` that belongs to each query; None means row i, and then n >= m. With a
            process group they are rows of this process's keys.
        symmetric: Also classify, for each query's key, its query among all queries; the loss is the mean of both. Keys
            that belong to no query are in no such sum.
        block_size: Side of a tile; None chooses one for the device.
        backend: As in :func:`tiled_contrastive_loss`.
        process_group: As in :func:`tiled_contrastive_loss`; every process's keys are negatives of every query.
        reduction: ``mean`` or ``sum`` over queries, or ``none`` for a loss per query, (m,).

    Returns:
        (), or (m,) with ``reduction="none"``; float32, or float64 if the features are.

    Raises:
        UserError: As in :func:`tiled_contrastive_loss`; or labels are out of range, or missing where needed.
    """
    names = ("queries", "keys", "scale")
    check_features(queries, keys, names[:2], block_size, _ring(process_group) is None)
    if labels is None and len(keys) < len(queries):
        raise UserError(
            f"There are {len(queries)} queries but only {len(keys)} keys: give labels, the row of keys that belongs to "
            "each query, or one key for each query."
        )
    return _info_nce(queries, keys, scale, labels, names, symmetric, block_size, backend, process_group, reduction)


def tiled_sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    block_size: int | None = None,
    backend: Backend = "auto",
    process_group: Any = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """SigLIP's loss: every pair is classified as belonging together or not; the sum over all pairs, divided by b.

    There is no sum over a row to wait for, so gradients are made in the forward sweep and nothing is computed twice.

    Args:
        image_embeds: (b, d), normalised by the caller.
        text_embeds: (b, d); row i belongs to image i.
        logit_scale: Multiplies the products: SigLIP's ``logit_scale.exp()``. A number or a tensor of one element.
        logit_bias: Is added to all logits. A number or a tensor of one element.
        block_size: Side of a tile; None chooses one for the device.
        backend: As in :func:`tiled_contrastive_loss`.
        process_group: As in :func:`tiled_contrastive_loss`: local images against all processes' texts.
        reduction: ``mean`` over images (SigLIP's), or ``sum``.

    Returns:
        (); float32, or float64 if the features are.

    Raises:
        UserError: As in :func:`tiled_contrastive_loss`.
    """
    if reduction not in ("mean", "sum"):
        raise UserError(f"reduction={reduction!r} is not known to the sigmoid loss: use 'mean' or 'sum'.")
    dtype = check_features(
        image_embeds, text_embeds, ("image_embeds", "text_embeds"), block_size, _ring(process_group) is None
    )
    check_pairs(image_embeds, text_embeds)
    chosen = _resolve(backend, image_embeds.device, dtype, len(image_embeds) * len(text_embeds))
    scale = scalar(logit_scale, "logit_scale", dtype)
    bias = scalar(logit_bias, "logit_bias", dtype)
    check_values(
        {"image_embeds": image_embeds, "text_embeds": text_embeds, "logit_scale": scale, "logit_bias": bias}, None, 0
    )
    with torch.autocast(image_embeds.device.type, enabled=False):
        if (ring := _ring(process_group)) is not None:
            scale, bias = (
                ring.average_gradient(value, process_group) if value.requires_grad else value for value in (scale, bias)
            )
        q = image_embeds.to(dtype) * scale
        bias = bias.to(image_embeds.device)
        options = {"block_size": block_size, **_narrow(chosen, image_embeds, text_embeds)}
        if ring is None:
            k = text_embeds.to(dtype)
            gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, bias))
            total = _SigmoidSum.apply(q, k, bias, _sweeps(chosen), options, gradients)
        else:
            total = ring.ring_sigmoid(q, text_embeds, bias, process_group, backend=chosen, **options)
        return total / len(image_embeds) if reduction == "mean" else total


class InfCLLoss(nn.Module):
    """:func:`tiled_contrastive_loss` with the signature of open_clip's ``ClipLoss``.

    Args:
        block_size: Side of a tile; None chooses one for the device.
        backend: ``auto``, ``torch`` or ``triton``.
        process_group: The processes whose pairs are negatives of each other, such as
            ``torch.distributed.group.WORLD``; None for this process's pairs only.
        symmetric: Both directions.
    """

    def __init__(
        self,
        block_size: int | None = None,
        backend: Backend = "auto",
        process_group: Any = None,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"block_size": block_size, "backend": backend, "process_group": process_group}
        self.symmetric = symmetric

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss, (), or ``{"contrastive_loss": loss}``.

        Args:
            image_features: (b, d), normalised.
            text_features: (b, d), normalised.
            logit_scale: Multiplies the cosines.
            output_dict: Return a dictionary, as open_clip's training loop asks for.
            logit_bias: Without effect, since a softmax does not see what is added to all its logits; accepted because
                open_clip's models may return one.
        """
        loss = tiled_contrastive_loss(
            image_features, text_features, logit_scale, symmetric=self.symmetric, **self.options
        )
        return {"contrastive_loss": loss} if output_dict else loss


class InfoNCELoss(nn.Module):
    """:func:`tiled_info_nce_loss` as a module, for bi-encoders and hard negatives.

    Args:
        symmetric: Both directions.
        block_size: Side of a tile; None chooses one for the device.
        backend: ``auto``, ``torch`` or ``triton``.
        process_group: As in :class:`InfCLLoss`.
    """

    def __init__(
        self,
        symmetric: bool = False,
        block_size: int | None = None,
        backend: Backend = "auto",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"block_size": block_size, "backend": backend, "process_group": process_group}
        self.symmetric = symmetric

    def forward(self, queries: Tensor, keys: Tensor, scale: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Returns the loss, (): queries (m, d), keys (n, d), labels (m,) or None for row i."""
        return tiled_info_nce_loss(queries, keys, scale, labels=labels, symmetric=self.symmetric, **self.options)


class SigmoidLoss(nn.Module):
    """:func:`tiled_sigmoid_loss` with the signature of open_clip's ``SigLipLoss``.

    Args:
        block_size: Side of a tile; None chooses one for the device.
        backend: ``auto``, ``torch`` or ``triton``.
        process_group: As in :class:`InfCLLoss`.
    """

    def __init__(self, block_size: int | None = None, backend: Backend = "auto", process_group: Any = None) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"block_size": block_size, "backend": backend, "process_group": process_group}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss, (), or ``{"contrastive_loss": loss}``; features are (b, d), normalised."""
        loss = tiled_sigmoid_loss(image_features, text_features, logit_scale, logit_bias, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss


class _Once(torch.autograd.Function):
    """A gradient whose own gradient is refused.

    ``once_differentiable`` alone lets a second derivative pass, without this function's part in it, when the gradients
    that arrive are constants, as those of a mean are.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("The tiled losses can be differentiated once only: they have no second derivative.")


class _Logits(torch.autograd.Function):
    """Rows' and columns' log-sum-exp of ``q @ k.T``, and each row's own logit, that of its label.

    The last is made here because its gradient nearly cancels that of the log-sum-exps: apart, each would be rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        labels: Tensor | None,
        sweeps: ModuleType,
        options: dict[str, Any],
        columns: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        row_lse, col_lse = sweeps.softmax_sweep(q, k, columns=columns, **options)
        ctx.save_for_backward(q, k, row_lse, col_lse, labels)
        ctx.sweeps, ctx.options = sweeps, options
        return row_lse, col_lse, _own_logits(q, k, labels)

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor, col_grad: Tensor | None, own_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, row_lse, col_lse, labels = ctx.saved_tensors
        with torch.no_grad():
            if col_lse is None:
                col_grad = None
            if labels is None:
                labels = torch.arange(len(q), device=q.device)
            more = {"labels": labels, "label_grad": own_grad, **ctx.options}
            gradients = ctx.sweeps.softmax_sweep_backward(q, k, row_lse, row_grad, col_lse, col_grad, **more)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = (_Once.apply(gradient, row_grad, own_grad, q, k) for gradient in gradients)
        return *gradients, None, None, None, None


class _SigmoidSum(torch.autograd.Function):
    """Sum of the sigmoid loss over all pairs; its gradient is already there when the sum is."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, bias: Tensor, sweeps: ModuleType, options: dict[str, Any], gradients: bool
    ) -> Tensor:
        total, *parts = sweeps.sigmoid_sweep(q, k, bias, diagonal=True, gradients=gradients, **options)
        ctx.save_for_backward(*parts, q, k, bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = [grad * part for part in ctx.saved_tensors[:3]]
        if torch.is_grad_enabled():
            gradients = [_Once.apply(gradient, grad, *ctx.saved_tensors[3:]) for gradient in gradients]
        return *gradients, None, None, None


def _info_nce(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    labels: Tensor | None,
    names: tuple[str, str, str],
    symmetric: bool,
    block_size: int | None,
    backend: str,
    group: Any,
    reduction: str,
) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"reduction={reduction!r} is not known: use 'mean', 'sum' or 'none'.")
    dtype = check_features(queries, keys, names[:2], block_size, _ring(group) is None)
    backend = _resolve(backend, queries.device, dtype, len(queries) * len(keys))
    if labels is not None:
        check_labels(labels, len(queries), queries.device)
    scale = scalar(scale, names[2], dtype)
    check_values(dict(zip(names, (queries, keys, scale))), labels, len(keys))
    with torch.autocast(queries.device.type, enabled=False):
        if (ring := _ring(group)) is not None and scale.requires_grad:
            scale = ring.average_gradient(scale, group)
        q, k = queries.to(dtype) * scale, keys.to(dtype)
        options = {"block_size": block_size, **_narrow(backend, queries, keys)}
        if ring is None:
            rows, columns, positives = _Logits.apply(q, k, labels, _sweeps(backend), options, symmetric)
        else:
            # Keys travel in their own dtype, which may be half as wide.
            rows, columns = ring.ring_softmax(q, keys, group, backend=backend, columns=symmetric, **options)
            positives = _own_logits(q, k, labels)
        losses = rows - positives
        if symmetric:
            own = columns[: len(q)] if labels is None else columns[labels]
            losses = (losses + own - positives) / 2
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()


def _own_logits(q: Tensor, k: Tensor, labels: Tensor | None) -> Tensor:
    """Products of each query with its own key, (m,)."""
    own = k[: len(q)] if labels is None else k[labels]
    return torch.bmm(q[:, None], own[:, :, None]).reshape(-1)


def _resolve(backend: str, device: torch.device, dtype: torch.dtype, pairs: int) -> str:
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        large = pairs > _FEW_PAIRS
        return "triton" if large and installed and device.type == "cuda" and dtype == torch.float32 else "torch"
    if backend == "triton":
        if not installed:
            raise UserError("backend='triton' needs the package 'triton', which is not installed: use backend='torch'.")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError("backend='triton' cannot run on CPU tensors: move them to CUDA or use backend='torch'.")
    elif backend != "torch":
        raise UserError(f"backend={backend!r} is not known: use 'auto', 'torch' or 'triton'.")
    return backend


def _narrow(backend: str, queries: Tensor, keys: Tensor) -> dict[str, str]:
    """What the kernels are told of features of 16 bits, which they get widened: more digits would be for nothing."""
    return (
        {"precision": "fp16"} if backend == "triton" and max(queries.element_size(), keys.element_size()) == 2 else {}
    )


def _sweeps(backend: str) -> ModuleType:
    return pair_tiles if backend == "torch" else importlib.import_module("modelwright.kernels.pair_tiles_triton")


def _ring(group: Any) -> ModuleType | None:
    """The ring over processes, or None for a single one."""
    if group is None:
        return None
    ring = importlib.import_module("modelwright.training.inf_cl.ring")
    return ring if ring.group_size(group) > 1 else None
