"""CEHPO (arXiv 2410.18441): hyperparameter search by the cross-entropy method."""

from modelwright.training.cehpo.search import Round, SearchResult, cross_entropy_search
from modelwright.training.cehpo.space import Choice, Factor, Normal, Space, log_normal

__all__ = ["Choice", "Factor", "Normal", "Round", "SearchResult", "Space", "cross_entropy_search", "log_normal"]
