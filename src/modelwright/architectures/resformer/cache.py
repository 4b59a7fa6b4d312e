"""A cache that keeps values only where the model computes them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache

from modelwright.errors import UserError


def kv_cache_bytes(cache: Cache) -> int:
    """Returns the bytes of keys and values that a cache holds, over all layers."""
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
    return sum(t.numel() * t.element_size() for t in tensors)


class SharedValueCache(DynamicCache):
    """Keys of every layer, values of the anchor layers only: SVFormer's cache.

    At any length it takes ``(N + 1) / (2 N)`` of the bytes of a plain cache with one anchor in N layers. Everything
    that ``generate`` asks of a cache (crop, reorder, select, repeat, reset) is there.

    Args:
        config: Configuration of the model (:class:`SVFormerConfig`).

    Raises:
        UserError: The configuration is of a model that does not share values.
    """

    def __init__(self, config: Any) -> None:
        anchors = getattr(config, "value_layers", None)
        if anchors is None:
            raise UserError(
                f"SharedValueCache is for models whose layers share values; '{config.model_type}' needs a DynamicCache."
            )
        super().__init__(config=config)
        self.value_layers: tuple[int, ...] = tuple(anchors)
        self._anchor_of = [max(a for a in anchors if a <= layer) for layer in range(config.num_hidden_layers)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new keys, and values if the layer is an anchor.

        Args:
            key_states: ``(batch, kv_heads, new tokens, head_dim)``.
            value_states: Likewise at an anchor layer; None elsewhere.
            layer_idx: Layer, counted from 0. An anchor comes before the layers that use it.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            All keys of this layer and all values of its anchor, ``(batch, kv_heads, tokens, head_dim)``.

        Raises:
            ValueError: Values are given at a layer that is not an anchor, or are missing at one that is.
        """
        # Plain branches: torch.compile(dynamic=True) makes layer_idx symbolic, and stumbles over cleverer conditions.
        if self._anchor_of[layer_idx] == layer_idx:
            if value_states is None:
                raise ValueError(f"layer {layer_idx} is an anchor of this cache, so it must bring values")
        elif value_states is not None:
            raise ValueError(f"layer {layer_idx} is no anchor of this cache, so it must not bring values")
        else:
            # Values of width 0: every operation on them works, and they take no memory.
            value_states = key_states.new_empty((*key_states.shape[:-1], 0))
        keys, _ = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # With a device map, an anchor and a layer that uses it may be on two devices.
        return keys, self.values_of(layer_idx).to(keys.device)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens.

        Args:
            tokens_to_remove: Minus their number, as in every cache of transformers 5.
        """
        for layer in self.layers:
            if layer.is_initialized:  # transformers before 5.20 stumbles over a layer that stores nothing
                layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Drops everything; transformers before 5.20 would keep zeros of the same length instead."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def values_of(self, layer_idx: int) -> torch.Tensor:
        """Returns the values that a layer attends over, ``(batch, kv_heads, tokens, head_dim)``."""
        return self.layers[self._anchor_of[layer_idx]].values

    def get_kv_bytes(self) -> int:
        """Returns the bytes of keys and values held."""
        return kv_cache_bytes(self)
