"""Claims: what one is, how it is run over seeds, and how its results are kept and compared."""

from modelwright.verify.claim import Bar, Claim, Context, Metric

__all__ = ["Bar", "Claim", "Context", "Metric"]
