"""Switching attention heads off, by hooks that leave no trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from modelwright.errors import UserError
from modelwright.models.heads import Head, HeadLayer, check_heads, head_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ablation = Literal["zero", "uniform", "mean"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "uniform", "mean")


class HeadAblation:
    """Inside the ``with`` block, chosen heads of a model do not do their work.

    - ``zero``: their output is 0 (the paper's definition; section 2.2 of arXiv 2410.18860).
    - ``uniform``: their query is 0, so that they attend to all visible keys alike and their output is the mean of the
      visible values. The official code's fast path does this. (Its slow path also averages values of the future; that
      leak is not reproduced.)
    - ``mean``: their output is a constant, such as its mean over texts: see :func:`mean_outputs`.

    Hooks stand at the output projection (or at the queries, for ``uniform``), so any attention implementation will
    do. Ablations may be nested.

    Args:
        model: A causal language model.
        heads: Pairs of layer and query head, counted from 0.
        ablation: See above.
        means: For ``mean``: ``(layers, heads, size)``.
        like: See :func:`~modelwright.models.heads.head_layers`.
        output: See there.

    Attributes:
        enabled: Whether the heads are off now.
        where: ``(rows, tokens)`` bool, or with 1 for either: for which tokens of a call they are off; None for all.

    Raises:
        UserError: A head is not in the model or given twice, or a projection cannot be found.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Iterable[Sequence[int]],
        ablation: Ablation = "zero",
        *,
        means: Tensor | None = None,
        like: str | None = None,
        output: str | None = None,
    ) -> None:
        if ablation not in ABLATIONS:
            raise UserError(f"There is no ablation '{ablation}': it is {', '.join(ABLATIONS)}.")
        layers = head_layers(model, like=like, output=output)
        self.heads = check_heads(heads, layers)
        self.ablation = ablation
        if ablation == "mean":
            if means is None:
                raise UserError(
                    "The ablation 'mean' needs the heads' mean outputs: give means=mean_outputs(...), or on the "
                    "command line a safetensors file of them."
                )
            top = max((index for index, _ in self.heads), default=0)
            if means.ndim != 3 or len(means) <= top:
                raise UserError(
                    f"Mean outputs must be (layers, heads, size), and reach up to layer {top}; these are "
                    f"{tuple(means.shape)}."
                )
        self._hooks = [
            _Hook(layers[index], [n for i, n in self.heads if i == index], ablation, means)
            for index in dict.fromkeys(index for index, _ in self.heads)
        ]
        self._handles: list[Any] = []
        self.enabled = True
        self.where = None

    @property
    def where(self) -> Tensor | None:
        """See the class."""
        return self._where

    @where.setter
    def where(self, value: Tensor | None) -> None:
        self._where = value
        for hook in self._hooks:
            hook.blocked = None

    def __enter__(self) -> HeadAblation:
        if self._handles:
            raise RuntimeError("This ablation is open already.")
        for hook in self._hooks:
            self._handles.append(hook.attach(self))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()


class _Hook:
    """What stands in one layer."""

    def __init__(self, layer: HeadLayer, heads: list[int], ablation: Ablation, means: Tensor | None) -> None:
        self.layer = layer
        self.blocked: Tensor | None = None
        self.value: Tensor | None = None
        columns = torch.cat([torch.arange(layer.heads * layer.size)[layer.columns(head)] for head in heads])
        width = layer.heads * layer.size
        if ablation == "uniform":
            if layer.query is None:
                raise UserError(
                    f"The queries of layer {layer.index} cannot be found, so its heads cannot attend uniformly: use "
                    f"the ablation 'zero'."
                )
            norm = layer.query_norm
            scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
            # A norm of all heads together must come first: each head's zeros would change the others' scale.
            together = scale is not None and scale.numel() == width
            if norm is not None and not together and shift is not None:
                raise UserError(
                    f"The queries of layer {layer.index} are normed with a shift, so that they cannot be made zero: "
                    f"use the ablation 'zero'."
                )
            self.module: nn.Module = norm if norm is not None and together else layer.query.module
            if not together and layer.query.rows is not None:
                # A fused projection: the queries are some of its outputs.
                base = layer.query.base
                width = base.nf if layer.query.transposed else base.out_features
                columns = layer.query.rows[columns]
        else:
            self.module = layer.output
        self.before = ablation != "uniform"
        self.features = torch.zeros(width, dtype=torch.bool)
        self.features[columns] = True
        if ablation == "mean" and means is not None:
            own = means[layer.index]
            if own.numel() != width:
                raise UserError(
                    f"Layer {layer.index} has {layer.heads} heads of width {layer.size}, and mean outputs of shape "
                    f"{tuple(own.shape)}: they are another model's."
                )
            self.value = own.reshape(-1)

    def attach(self, owner: HeadAblation) -> Any:
        if self.before:

            def first(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                return (self.change(owner, args[0]), *args[1:]) if owner.enabled else None

            return self.module.register_forward_pre_hook(first)

        def behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return self.change(owner, output) if owner.enabled else None

        return self.module.register_forward_hook(behind)

    def change(self, owner: HeadAblation, x: Tensor) -> Tensor:
        """Replaces the heads' part of x, which is (rows, tokens, width)."""
        if self.blocked is None or self.blocked.device != x.device:
            features = self.features.to(x.device)
            self.blocked = features if owner.where is None else owner.where.to(x.device)[..., None] & features
        if self.value is None:
            return x.masked_fill(self.blocked, 0)
        self.value = self.value.to(x)
        return torch.where(self.blocked, self.value, x)


@torch.no_grad()
def mean_outputs(
    model: PreTrainedModel,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    like: str | None = None,
    output: str | None = None,
) -> Tensor:
    """Returns each head's mean output over all tokens of some texts, ``(layers, heads, size)`` float32.

    Args:
        model: A causal language model.
        batches: Tokens ``(rows, length)`` and their mask or None, as :meth:`HeadAblation` will meet them.
        like: See :func:`~modelwright.models.heads.head_layers`.
        output: See there.

    Raises:
        UserError: There is no text.
    """
    layers = head_layers(model, like=like, output=output)
    sums: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].double()
            total = (x * weights["now"].to(x.device)[..., None]).sum((0, 1))
            sums[index] = sums[index] + total if index in sums else total

        return hook

    handles = [layer.output.register_forward_pre_hook(watch(index)) for index, layer in layers.items()]
    count = 0.0
    try:
        for ids, mask in batches:
            weights["now"] = torch.ones_like(ids) if mask is None else mask
            count += float(weights["now"].sum())
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise UserError("There is no text to take mean outputs of.")
    shape = next(iter(layers.values()))
    means = torch.zeros(max(layers) + 1, shape.heads, shape.size)
    for index, total in sums.items():
        means[index] = (total / count).view(shape.heads, shape.size).float().cpu()
    return means


def random_heads(model: PreTrainedModel, count: int, *, seed: int, exclude: Iterable[Sequence[int]] = ()) -> list[Head]:
    """Draws heads at random: the control of any choice of heads.

    Args:
        model: A causal language model.
        count: How many.
        seed: Seed of the draw.
        exclude: Heads not to draw, such as the retrieval heads themselves.

    Raises:
        UserError: There are not so many heads.
    """
    layers = head_layers(model)
    out = set(check_heads(exclude, layers))
    rest = [(index, head) for index, layer in layers.items() for head in range(layer.heads) if (index, head) not in out]
    if not 0 <= count <= len(rest):
        raise UserError(f"{count} random heads are wanted, but only {len(rest)} heads are left to draw from.")
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rest[place] for place in order[:count]]
