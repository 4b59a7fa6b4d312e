"""ZIP-FIT: choosing documents that compress well together with target examples (arXiv 2410.18194)."""

from modelwright.curation.zip_fit.aligner import CompressionAligner, dataset_alignment
from modelwright.curation.zip_fit.compressors import Compressor, make_compressor
from modelwright.curation.zip_fit.ncd import alignment, ncd
from modelwright.curation.zip_fit.selector import ZipFitSelector

__all__ = [
    "CompressionAligner",
    "Compressor",
    "ZipFitSelector",
    "alignment",
    "dataset_alignment",
    "make_compressor",
    "ncd",
]
