"""Perplexity of documents under an n-gram model of a reference: our own model, or KenLM's library as the reader."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from modelwright.errors import UserError, did_you_mean, require
from modelwright.models.ngram import FALLBACK, NGramModel, estimate, read_arpa
from modelwright.models.ngram_scoring import Engine, Lookup, Scores

Backend = Literal["python", "kenlm"]
#: Files of KenLM, which both backends or only its own can read.
_ARPA, _BINARY = (".arpa", ".gz"), (".bin", ".binary", ".klm", ".mmap")


class NGramScorer:
    """Scores texts by an n-gram model with modified Kneser-Ney smoothing (see :mod:`modelwright.models.ngram`).

    Perplexity is ``10 ** (-log10 p(document) / tokens)`` over the words and the end of the document, as KenLM's
    ``Model.perplexity`` has it: low means close to the reference.

    Args:
        order: Length of the longest n-grams, 2 to 6.
        backend: Who looks the probabilities up: ``python`` (this package) or ``kenlm`` (its Python package, which needs
            an extra). The estimate is ours in both cases, since KenLM's package brings no ``lmplz``; the two agree to
            float32.
        engine: Of the backend ``python``: ``compiled`` (numba), ``numpy``, or whichever is there.
        fallback: Discounts where a text is too small to give them; None refuses it.

    Raises:
        UserError: An option makes no sense, or a package is missing.
    """

    def __init__(
        self,
        order: int = 5,
        backend: Backend = "python",
        *,
        engine: Engine = "auto",
        fallback: Sequence[float] | None = FALLBACK,
    ) -> None:
        if backend not in ("python", "kenlm"):
            raise UserError(f"There is no backend '{backend}': {did_you_mean(backend, ('python', 'kenlm'))}")
        if backend == "kenlm":
            require("kenlm", "kenlm", "the backend 'kenlm'")
        self.order, self.backend, self.engine, self.fallback = order, backend, engine, fallback
        self.model: NGramModel | None = None
        self._lookup: Lookup | None = None
        self._kenlm: Any = None

    def fit(self, texts: Iterable[str]) -> Self:
        """Estimates the model from reference texts, read once, and returns itself.

        Raises:
            UserError: No text has a word.
        """
        return self._take(estimate(texts, self.order, fallback=self.fallback))

    def scores(self, texts: Sequence[str], workers: int = 1) -> Scores:
        """Returns log10 probabilities, numbers of tokens and of unknown words; needs :meth:`fit`.

        Args:
            texts: Documents.
            workers: Threads (of the backend ``python``).
        """
        if self._kenlm is not None:
            return self._by_kenlm(texts)
        if self._lookup is None:
            raise UserError("The n-gram model has no reference yet: call fit first.")
        return self._lookup.score(texts, workers)

    def perplexity(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Returns perplexities: float64, shape ``(len(texts),)``; NaN for a text without a word."""
        return self.scores(texts, workers).perplexity

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes the model: as ARPA if the name ends so, else as one safetensors file.

        Raises:
            UserError: There is no model yet, or it was read from a binary file of KenLM's.
        """
        if self.model is None:
            raise UserError("There is no n-gram model to save: fit one, or load an ARPA file.")
        (self.model.write_arpa if str(path).endswith(".arpa") else self.model.save)(path, force)

    @classmethod
    def load(cls, path: str | Path, backend: Backend = "python", *, engine: Engine = "auto") -> NGramScorer:
        """Reads a model: what :meth:`save` wrote, an ARPA file, or (backend ``kenlm``) KenLM's binary file.

        Raises:
            UserError: The file is missing or is not readable by the backend.
        """
        path = Path(path)
        scorer = cls(backend=backend, engine=engine)
        if path.suffix in _BINARY:
            if backend != "kenlm":
                raise UserError(
                    f"{path} is a binary file of KenLM: read it with the backend 'kenlm', or give the ARPA."
                )
            scorer._kenlm = _open_kenlm(path)
            scorer.order = scorer._kenlm.order
            return scorer
        return scorer._take(read_arpa(path) if path.suffix in _ARPA else NGramModel.load(path)[0])

    def _take(self, model: NGramModel) -> Self:
        self.model, self.order = model, model.order
        if self.backend == "kenlm":
            with tempfile.TemporaryDirectory(prefix="modelwright-kenlm-") as folder:
                model.write_arpa(Path(folder) / "model.arpa")
                self._kenlm = _open_kenlm(Path(folder) / "model.arpa")
        else:
            self._lookup = Lookup(model, self.engine)
        return self

    def _by_kenlm(self, texts: Sequence[str]) -> Scores:
        found = np.zeros((3, len(texts)))
        for i, text in enumerate(texts):
            # Each word's value is a float32; their sum here is not.
            for value, _, unknown in self._kenlm.full_scores(text.encode("utf-8", "surrogatepass")):
                found[:, i] += value, 1, unknown
        return Scores(found[0], found[1].astype(np.int64), found[2].astype(np.int64))


def _open_kenlm(path: Path) -> Any:
    import kenlm

    config = kenlm.Config()
    config.show_progress = False
    try:
        return kenlm.Model(str(path), config)
    except (OSError, RuntimeError) as error:
        raise UserError(f"KenLM cannot read {path}: {str(error).splitlines()[0]}") from error
