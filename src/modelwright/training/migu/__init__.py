"""MIGU: each step updates only those output rows of a linear layer whose outputs were large (arXiv 2406.17245)."""

from modelwright.training.migu.config import MIGUConfig
from modelwright.training.migu.definition import kept_rows, magnitude
from modelwright.training.migu.mask import LayerStats, MIGUMask
from modelwright.training.migu.similarity import row_overlap, top_rows
from modelwright.training.migu.trainer import MIGUTrainer, MIGUTrainerMixin

__all__ = [
    "LayerStats",
    "MIGUConfig",
    "MIGUMask",
    "MIGUTrainer",
    "MIGUTrainerMixin",
    "kept_rows",
    "magnitude",
    "row_overlap",
    "top_rows",
]
