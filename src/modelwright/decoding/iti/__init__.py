"""Inference-time intervention: shifts heads along directions of true against false texts (arXiv 2306.03341)."""

from modelwright.decoding.iti.decoding import InterventionDecoding, InterventionOptions
from modelwright.decoding.iti.directions import HeadDirections, fit_directions, head_outputs

__all__ = ["HeadDirections", "InterventionDecoding", "InterventionOptions", "fit_directions", "head_outputs"]
