"""ROME: one fact as a rank-one change of one MLP (arXiv 2202.05262), and R-ROME (arXiv 2403.07175)."""

from modelwright.editing.rome.editor import ROME

__all__ = ["ROME"]
