"""ZIP-FIT as a selector: for `modelwright select`, recipes and datasets."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np

from modelwright.curation.selector import SelectorMixin
from modelwright.curation.zip_fit.aligner import CompressionAligner
from modelwright.curation.zip_fit.compressors import CompressorName, make_compressor
from modelwright.errors import UserError
from modelwright.options import Arg


@dataclass(kw_only=True)
class ZipFitSelector(SelectorMixin):
    """Ranks documents by how well they compress together with the target examples.

    The score is the mean over the targets of 1 - NCD: 1 minus the compressed size that source and target have
    together beyond the smaller one, over the larger one. It favours documents about as long as the targets; use a token
    budget, chunk_bytes or length buckets where lengths differ.
    """

    compressor: Annotated[CompressorName, Arg("Compressor.")] = "zlib"
    level: Annotated[int | None, Arg("Its level; by default the lightest that compresses.")] = None
    max_bytes: Annotated[int | None, Arg("Use only this many bytes from the beginning of every text.")] = None
    chunk_bytes: Annotated[
        int | None, Arg("Cut documents into equal parts of at most this many bytes and average their scores.")
    ] = None
    subtract_header: Annotated[bool, Arg("Take the size of an empty stream off every size.")] = False
    target_sample: Annotated[int | None, Arg("Use a random sample of this many targets.")] = None
    approximate: Annotated[
        Literal["none", "dictionary"],
        Arg("dictionary: one compression per document, with a dictionary of all targets (not ZIP-FIT's score)."),
    ] = "none"
    engine: Annotated[
        Literal["auto", "library", "compiled"], Arg("Who counts the bytes; never changes a score.", kind="run")
    ] = "auto"
    seed: Annotated[int, Arg("Seed of the sample of targets.")] = 0

    score_name: ClassVar[str] = "alignment"

    def __post_init__(self) -> None:
        # Faulty options are refused before any work: an aligner for one short target checks them all.
        self._make(["x"])
        self._aligner: CompressionAligner | None = None

    def _make(self, target: Sequence[str]) -> CompressionAligner:
        return CompressionAligner(
            target,
            self.compressor,
            self.level,
            max_bytes=self.max_bytes,
            chunk_bytes=self.chunk_bytes,
            subtract_header=self.subtract_header,
            target_sample=self.target_sample,
            seed=self.seed,
            approximate=None if self.approximate == "none" else "dictionary",
            engine=self.engine,
        )

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> Self:
        """Takes the target examples.

        Raises:
            UserError: There are none, or one is empty.
        """
        self._aligner = self._make(target)
        return self

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Returns the alignment of each text: float64, shape ``(len(texts),)``, NaN for empty texts.

        Raises:
            UserError: ``fit`` was not called, or a text is not text.
        """
        if self._aligner is None:
            raise UserError("ZIP-FIT has no target yet: call fit with target examples first.")
        with warnings.catch_warnings():
            # Whoever selects counts and reports the documents without a score.
            warnings.filterwarnings("ignore", message=".*get no score")
            return self._aligner.score(texts, workers)

    def details(self) -> dict[str, Any]:
        """Returns compressor, level and library version: other builds may give other sizes."""
        compressor = make_compressor(self.compressor, self.level)
        return {
            "compressor": compressor.name,
            "level": compressor.level,
            "version": compressor.version,
            "approximate": self.approximate != "none",
        }
