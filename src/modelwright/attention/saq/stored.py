"""Keys or values that look like a tensor, and are dequantised when they are used by what cannot read them packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from modelwright.kernels import triton_or_none
from modelwright.kernels.packed_attention import Held, packed_attention

#: Queries of a call, times heads of a group, up to which attention reads packed states; a longer one, such as a chunk
#: of a prompt, is better served by dequantising once.
FEW = 64


class StoredStates(Tensor):
    """States of shape (batch, heads, tokens, size) that are held packed.

    ``scaled_dot_product_attention`` of a few queries reads them as they are; whatever else is done with them sees them
    dequantised, so every attention implementation is right with them.

    Attributes:
        held: What they are made of.
    """

    held: Held

    @staticmethod
    def of(held: Held) -> StoredStates:
        """Returns the states of what is held; takes no memory."""
        rest = held.rest
        shape = (*rest.shape[:2], held.tokens, rest.shape[3])
        made: Any = Tensor._make_wrapper_subclass(StoredStates, shape, dtype=rest.dtype, device=rest.device)
        made.held = held
        return made

    def dequantised(self) -> Tensor:
        """Returns them as a plain tensor."""
        return self.held.dequantised()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Says what they are, without dequantising."""
        return f"StoredStates(shape={tuple(self.shape)}, bits={[p.bits for p in self.held.parts]}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answers ``scaled_dot_product_attention``, and lets everything else through."""
        if func is functional.scaled_dot_product_attention:
            found = _attend(*args, **(kwargs or {}))
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Dequantises for every operation."""
        plain = tree_map_only(StoredStates, StoredStates.dequantised, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if not (isinstance(key, StoredStates) and isinstance(value, StoredStates)) or dropout_p or is_causal:
        return None
    if isinstance(query, StoredStates) or query.shape[1] % key.shape[1] or (query.ndim, key.ndim) != (4, 4):
        return None
    return attend(query, key, value, mask=attn_mask, scaling=query.shape[-1] ** -0.5 if scale is None else scale)


def attend(
    query: Tensor, key: StoredStates, value: StoredStates, *, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Attends over packed states, by the Triton kernel where it can; see :func:`packed_attention`.

    Returns:
        (batch, heads, rows, size), or None if the queries are too many.
    """
    if query.shape[2] * query.shape[1] // key.shape[1] > FEW:
        return None
    kernels: Any = triton_or_none("packed_attention_triton") if query.device.type == "cuda" else None
    if kernels is not None and kernels.can_attend(query, key.held, value.held, mask):
        found: Tensor = kernels.packed_attention(query, key.held, value.held, scaling=scaling, mask=mask)
        return found
    return packed_attention(query, key.held, value.held, scaling=scaling, mask=mask)
