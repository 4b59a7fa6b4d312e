"""Knowledge neurons: find the units that hold a fact, and rewrite what they write."""

from modelwright.editing.kn.attribution import integrated_gradients
from modelwright.editing.kn.editor import KN

__all__ = ["KN", "integrated_gradients"]
