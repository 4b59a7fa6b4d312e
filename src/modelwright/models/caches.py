"""Kinds of cache layers, under names that hold in every supported version of transformers."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils

#: What every quantised cache layer is; older versions have no base above ``QuantizedLayer``.
BaseQuantizedLayer: type = getattr(cache_utils, "BaseQuantizedLayer", None) or cache_utils.QuantizedLayer

__all__ = ["BaseQuantizedLayer", "copies_rows"]


def copies_rows(layer: Any) -> bool:
    """Returns whether a cache layer can repeat, select and reorder the rows of its batch exactly.

    A dynamic layer can, and one of ours that says so by a method ``change_rows``; transformers' quantized ones cannot.
    """
    if hasattr(layer, "change_rows"):
        return True
    return isinstance(layer, cache_utils.DynamicLayer) and not isinstance(layer, BaseQuantizedLayer)
