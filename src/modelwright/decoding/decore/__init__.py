"""DeCoRe: decoding by contrasting a model with itself without its retrieval heads (arXiv 2410.18860)."""

from modelwright.decoding.decore.ablation import HeadAblation, mean_outputs, random_heads
from modelwright.decoding.decore.decoding import DeCoRe, DeCoReConfig, decore_generate
from modelwright.decoding.decore.detection import Needle, RetrievalHeadScorer
from modelwright.decoding.decore.heads import HeadScores

__all__ = [
    "DeCoRe",
    "DeCoReConfig",
    "HeadAblation",
    "HeadScores",
    "Needle",
    "RetrievalHeadScorer",
    "decore_generate",
    "mean_outputs",
    "random_heads",
]
