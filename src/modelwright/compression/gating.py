"""A model whose gates multiply what its blocks read and write, without a change to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from modelwright.compression.selections import Masks, blocks_of
from modelwright.models.roles import roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gates:
    """The gates that a masked model applies; set ``values`` before each forward.

    Attributes:
        values: For each block, kind to gates, (size,) in any dtype; what is absent is not gated.
    """

    def __init__(self, values: Sequence[Mapping[str, torch.Tensor]] = ()) -> None:
        self.values = values

    def _apply(self, block: int, kind: str, x: torch.Tensor, repeat: int = 1) -> torch.Tensor:
        gate = self.values[block].get(kind) if self.values else None
        if gate is None:
            return x
        return x * (gate.repeat_interleave(repeat) if repeat > 1 else gate).to(x)


@contextlib.contextmanager
def gated(model: PreTrainedModel, gates: Gates) -> Iterator[Gates]:
    """Puts gates on a model while the block lasts: norm, then gate, so that the norm's statistics are the full model's.

    ``attn_out`` and ``mlp_out`` act on all that a part adds to the residual stream, its bias included; ``mlp_middle``
    acts once, on the input of the last map.

    Args:
        model: A model of one of :data:`~modelwright.compression.selections.FAMILIES`.
        gates: The gates; may be changed between forwards.

    Raises:
        UserError: The model cannot be pruned.
    """
    blocks = blocks_of(model)
    handles: list[Any] = []

    def gate(layer: Any) -> None:
        i = layer.index

        def read(kind: str, repeat: int = 1) -> Any:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (gates._apply(i, kind, args[0], repeat), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": gates._apply(i, kind, kwargs["hidden_states"], repeat)}

            return hook

        def written(kind: str) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (gates._apply(i, kind, output[0]), *output[1:])
                return gates._apply(i, kind, output)

            return hook

        for module, kind, repeat in (
            (layer.attention, "attn_in", 1),
            (layer.output.module, "heads", blocks[i].query),
            (layer.mlp, "mlp_in", 1),
            (layer.down.module, "mlp_middle", 1),
        ):
            handles.append(module.register_forward_pre_hook(read(kind, repeat), with_kwargs=True))
        handles.append(layer.attention.register_forward_hook(written("attn_out")))
        handles.append(layer.mlp.register_forward_hook(written("mlp_out")))

    try:
        for layer in roles(model).layers:
            gate(layer)
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def masked(model: PreTrainedModel, masks: Masks) -> contextlib.AbstractContextManager[Gates]:
    """Puts masks on a model while the block lasts: it then computes what the smaller model computes."""
    return gated(model, Gates([{k: v.float() for k, v in own.items()} for own in masks.kept]))
