"""DSIR: importance resampling of documents by hashed n-grams (arXiv 2302.03169)."""

from modelwright.curation.dsir.selector import DsirSelector

__all__ = ["DsirSelector"]
