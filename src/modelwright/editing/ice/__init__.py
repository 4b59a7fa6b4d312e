"""ICE: the facts are put before every question."""

from modelwright.editing.ice.editor import ICE, ContextEdit

__all__ = ["ICE", "ContextEdit"]
