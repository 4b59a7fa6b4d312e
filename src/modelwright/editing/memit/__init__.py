"""MEMIT: many facts at once, spread over several MLPs (arXiv 2210.07229)."""

from modelwright.editing.memit.editor import MEMIT

__all__ = ["MEMIT"]
