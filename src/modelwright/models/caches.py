"""Kinds of cache layers, under names that hold in every supported version of transformers."""

from __future__ import annotations

from transformers import cache_utils

#: What every quantised cache layer is; older versions have no base above ``QuantizedLayer``.
BaseQuantizedLayer: type = getattr(cache_utils, "BaseQuantizedLayer", None) or cache_utils.QuantizedLayer

__all__ = ["BaseQuantizedLayer"]
