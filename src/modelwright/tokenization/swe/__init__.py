"""SWE (arXiv 2410.18441): sub-word vocabularies by BPE's merges and the likelihood of the text."""

from modelwright.tokenization.swe.measure import Fit, fit
from modelwright.tokenization.swe.trainer import LikelihoodBpeTrainer

__all__ = ["Fit", "LikelihoodBpeTrainer", "fit"]
