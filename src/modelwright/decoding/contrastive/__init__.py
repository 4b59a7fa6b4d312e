"""Contrastive decoding: an expert against an amateur (arXiv 2210.15097)."""

from modelwright.decoding.contrastive.decoding import ContrastiveDecoding, ContrastiveOptions

__all__ = ["ContrastiveDecoding", "ContrastiveOptions"]
