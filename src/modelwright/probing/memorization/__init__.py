"""Recite, reconstruct, recollect: what a model has memorised, and of which kind it is."""

from modelwright.probing.memorization.comparison import compare, expected_calibration_error, scores
from modelwright.probing.memorization.corpus import TokenCorpus, tokenize_corpus
from modelwright.probing.memorization.dependence import dependence_tests, sign_flips, xi_test
from modelwright.probing.memorization.duplicates import count_duplicates, token_frequencies
from modelwright.probing.memorization.extraction import extractability, part_perplexities
from modelwright.probing.memorization.features import FeatureTable, build_features
from modelwright.probing.memorization.neighbours import (
    ModelEmbedder,
    NgramEmbedder,
    semantic_matches,
    sentence_embedder,
    textual_matches,
)
from modelwright.probing.memorization.partition import Partition
from modelwright.probing.memorization.predictive import TaxonomicMemorizationModel
from modelwright.probing.memorization.search import search_partition
from modelwright.probing.memorization.splits import train_test_split
from modelwright.probing.memorization.taxonomy import categorize, category_shares, divergence_by_duplicates
from modelwright.probing.memorization.templating import shannon_code_length, templating

__all__ = [
    "FeatureTable",
    "ModelEmbedder",
    "NgramEmbedder",
    "Partition",
    "TaxonomicMemorizationModel",
    "TokenCorpus",
    "build_features",
    "categorize",
    "category_shares",
    "compare",
    "count_duplicates",
    "dependence_tests",
    "divergence_by_duplicates",
    "expected_calibration_error",
    "extractability",
    "part_perplexities",
    "scores",
    "search_partition",
    "semantic_matches",
    "sentence_embedder",
    "shannon_code_length",
    "sign_flips",
    "templating",
    "textual_matches",
    "token_frequencies",
    "tokenize_corpus",
    "train_test_split",
    "xi_test",
]
