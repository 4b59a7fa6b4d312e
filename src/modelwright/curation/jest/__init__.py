"""JEST: choosing each training batch jointly, as what the learner can still learn (arXiv 2406.17711)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelwright.curation.jest.reference import cache_reference_embeddings
    from modelwright.curation.jest.sampler import JointSampler
    from modelwright.curation.jest.scores import pairwise_sigmoid_nll, select_from_scores
    from modelwright.curation.jest.selection import JestSelection
    from modelwright.curation.jest.trainer import JestArguments, JestTrainer

# The trainer imports half of transformers, and the sampler needs none of it.
_HOMES = {
    "JestArguments": "trainer",
    "JestSelection": "selection",
    "JestTrainer": "trainer",
    "JointSampler": "sampler",
    "cache_reference_embeddings": "reference",
    "pairwise_sigmoid_nll": "scores",
    "select_from_scores": "scores",
}

__all__ = [
    "JestArguments",
    "JestSelection",
    "JestTrainer",
    "JointSampler",
    "cache_reference_embeddings",
    "pairwise_sigmoid_nll",
    "select_from_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
