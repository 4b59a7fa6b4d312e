"""In-context editing: the new facts stand before each question, alone (ICE) or after examples (IKE)."""

from modelwright.editing.ice.edit import ContextEdit
from modelwright.editing.ice.editor import ICE, IKE

__all__ = ["ICE", "IKE", "ContextEdit"]
