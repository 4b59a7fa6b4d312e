"""Plain ways to make a model narrower: at random, by weights, by weights and activations, by principal components."""

from modelwright.compression.width_pruning.prune import METHODS, prune_width, width_masks
from modelwright.compression.width_pruning.slicing import slice_model

__all__ = ["METHODS", "prune_width", "slice_model", "width_masks"]
