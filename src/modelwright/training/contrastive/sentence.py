"""The tiled loss for ``SentenceTransformerTrainer``: any batch size, without the square matrix of scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.errors import UserError
from modelwright.training.contrastive.grad_cache import cached
from modelwright.training.inf_cl.loss import tiled_info_nce_loss


class InfCLSentenceLoss(nn.Module):
    """``MultipleNegativesRankingLoss`` at any batch size, for the ``loss`` of ``SentenceTransformerTrainer``.

    The same loss and the same gradient as that class and ``CachedMultipleNegativesRankingLoss``. The encoder holds the
    activations of ``mini_batch_size`` texts (GradCache), as the cached class does; the loss holds tiles, where they
    hold scores of all pairs, or of rows of them.

    Columns are (anchor, positive) or (anchor, positive, negative_1, …); positives and negatives of other rows are
    negatives too. Only cosine similarity and the directions named here; ``MatryoshkaLoss`` may be put around it.

    Args:
        model: A ``SentenceTransformer``.
        scale: Multiplier of the cosines, the inverse of the temperature.
        mini_batch_size: Texts in the encoder at once.
        symmetric: Also classify each positive's anchor among all anchors; the loss is the mean of both. It is
            ``directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"`` of the other classes.
        gather_across_devices: With several processes, texts of all of them are negatives. They travel round a ring, so
            memory stays that of one process. Otherwise each process's loss is its own.
        block_size: Side of a tile; None chooses one for the device.
        backend: ``auto``, ``torch`` or ``triton``.

    Raises:
        UserError: An argument is out of range, or the model cannot be split into mini-batches.
    """

    #: By which wrappers of sentence-transformers know that the encoder runs again in the backward pass.
    uses_gradient_cache = True

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        mini_batch_size: int = 32,
        *,
        symmetric: bool = False,
        gather_across_devices: bool = False,
        block_size: int | None = None,
        backend: Any = "auto",
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise UserError(f"The scale must be positive, not {scale}.")
        if mini_batch_size < 1:
            raise UserError(f"mini_batch_size must be at least 1, not {mini_batch_size}.")
        self.model = model
        self.scale = scale
        self.mini_batch_size = mini_batch_size
        self.symmetric = symmetric
        self.gather_across_devices = gather_across_devices
        self.block_size = block_size
        self.backend = backend

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Returns the loss of a batch, (); its backward pass encodes each mini-batch again.

        Args:
            sentence_features: The tokenised columns, (rows, length) each.
            labels: Not used: row i of the second column belongs to row i of the first.

        Raises:
            UserError: There are fewer than two columns, or they differ in length.
        """
        columns = [dict(column) for column in sentence_features]
        sizes = [_rows(column) for column in columns]
        if len(sizes) < 2 or len(set(sizes)) > 1:
            raise UserError(f"Columns of {sizes} rows: expected an anchor, a positive and any negatives, equally many.")
        batches = (part for column in columns for part in _parts(column, self.mini_batch_size))
        (vectors,) = cached(_Encode(self.model), batches, module=self.model)
        graph = torch.is_grad_enabled() and vectors.requires_grad
        # The loss runs backward at once, to a copy of the embeddings: MatryoshkaLoss counts on that, for it runs
        # backward through each of its widths itself. Before a GradScaler has scaled anything, so not in float16.
        leaf = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32)).requires_grad_(graph)
        loss = self.calculate_loss([[column] for column in leaf.split(sizes[0])], labels, with_backward=graph)
        return _Attached.apply(vectors, loss, leaf.grad) if graph else loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Returns the loss of embeddings, a list of parts for each column; what ``MatryoshkaLoss`` calls.

        Args:
            reps: Embeddings, (rows, width) in parts, anchors first.
            labels: Not used.
            with_backward: Also run the backward pass of the loss.
        """
        anchors, *others = (nn.functional.normalize(torch.cat(parts), dim=-1) for parts in reps)
        group = None
        if self.gather_across_devices and torch.distributed.is_available() and torch.distributed.is_initialized():
            group = torch.distributed.group.WORLD
        loss = tiled_info_nce_loss(
            anchors,
            torch.cat(others),
            self.scale,
            symmetric=self.symmetric,
            block_size=self.block_size,
            backend=self.backend,
            process_group=group,
        )
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Returns what the model card says of the loss."""
        return {
            "scale": self.scale,
            "mini_batch_size": self.mini_batch_size,
            "symmetric": self.symmetric,
            "gather_across_devices": self.gather_across_devices,
        }


class _Attached(torch.autograd.Function):
    """A loss whose gradient by some vectors is known already."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return above[0] * gradient, None, None


class _Encode:
    """Calls the model as GradCache wants it, with the ``no_sync`` of DDP where the model has one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.no_sync = getattr(model, "no_sync", contextlib.nullcontext)

    def __call__(self, features: Mapping[str, Any]) -> tuple[Tensor]:
        # The modules add their outputs to the dictionary they are given.
        return (self.model(dict(features))["sentence_embedding"],)


def _rows(features: Mapping[str, Any]) -> int:
    ids = features.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or "cu_seq_lens_q" in features or "offsets" in features:
        raise UserError(
            "InfCLSentenceLoss needs a model whose texts are rows of tokens that can be split into mini-batches, not "
            "static embeddings, flattened inputs or images."
        )
    return len(ids)


def _parts(features: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Yields rows of a column, without the padding on the right that none of them needs."""
    rows, width = features["input_ids"].shape
    mask = features.get("attention_mask")
    for start in range(0, rows, size):
        stop = width
        if isinstance(mask, Tensor) and mask.shape == (rows, width):
            used = mask[start : start + size].any(0).nonzero()
            stop = int(used.max()) + 1 if len(used) else 1
        yield {
            name: _cut(value, start, start + size, stop, (rows, width)) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }


def _cut(value: Tensor, start: int, end: int, stop: int, shape: tuple[int, int]) -> Tensor:
    if not value.ndim or len(value) != shape[0]:
        return value
    return value[start:end, :stop] if value.shape[:2] == shape else value[start:end]
