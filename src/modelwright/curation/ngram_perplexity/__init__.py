"""Ranking documents by their perplexity under an n-gram model of a reference, as CCNet and others do with KenLM."""

from modelwright.curation.ngram_perplexity.selector import PerplexitySelector, select_lowest_perplexity
from modelwright.models.ngram_scorer import NGramScorer

__all__ = ["NGramScorer", "PerplexitySelector", "select_lowest_perplexity"]
