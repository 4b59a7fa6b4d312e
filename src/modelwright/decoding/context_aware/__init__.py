"""Context-aware decoding: away from what the model would say without the context (arXiv 2305.14739)."""

from modelwright.decoding.context_aware.decoding import ContextAwareDecoding, ContextAwareOptions

__all__ = ["ContextAwareDecoding", "ContextAwareOptions"]
