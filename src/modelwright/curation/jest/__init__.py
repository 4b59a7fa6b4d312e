"""JEST: choosing each training batch jointly, as what the learner can still learn (arXiv 2406.17711)."""
