"""Editing by fine-tuning one matrix: FT-L and FT-M."""

from modelwright.editing.fine_tune.editor import FTL, FTM

__all__ = ["FTL", "FTM"]
