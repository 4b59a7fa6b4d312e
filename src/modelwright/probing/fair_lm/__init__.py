"""The Fair Language Model Paradox: loss by token type, and what weight decay does to the rare ones."""

from modelwright.probing.fair_lm.bins import FrequencyBins, frequency_bins
from modelwright.probing.fair_lm.callback import TokenFairnessCallback
from modelwright.probing.fair_lm.chunks import ChunkedModel
from modelwright.probing.fair_lm.counts import TokenCounts, count_tokens, tokenizer_fingerprint
from modelwright.probing.fair_lm.decay import decay_groups, decay_over_run, split_decay_groups
from modelwright.probing.fair_lm.features import FeatureSolution, solve_features
from modelwright.probing.fair_lm.measure import measure_blocks, measure_documents, measure_rows
from modelwright.probing.fair_lm.report import BinRow, TokenLossReport
from modelwright.probing.fair_lm.speed import LearningSpeed, learning_speed
from modelwright.probing.fair_lm.tracker import TokenLossTracker
from modelwright.probing.fair_lm.vocabulary import RareTypes, by_vocabulary_size, rare_types

__all__ = [
    "BinRow",
    "ChunkedModel",
    "FeatureSolution",
    "FrequencyBins",
    "LearningSpeed",
    "RareTypes",
    "TokenCounts",
    "TokenFairnessCallback",
    "TokenLossReport",
    "TokenLossTracker",
    "by_vocabulary_size",
    "count_tokens",
    "decay_groups",
    "decay_over_run",
    "frequency_bins",
    "learning_speed",
    "measure_blocks",
    "measure_documents",
    "measure_rows",
    "rare_types",
    "solve_features",
    "split_decay_groups",
    "tokenizer_fingerprint",
]
