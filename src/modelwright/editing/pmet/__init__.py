"""PMET: MEMIT with targets of the MLP alone, learnt beside the attention's (arXiv 2308.08742)."""

from modelwright.editing.pmet.editor import PMET

__all__ = ["PMET"]
