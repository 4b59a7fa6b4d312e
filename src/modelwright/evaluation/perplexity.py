"""Perplexity and bits per byte of a model on documents, exactly counted, in the result format of lm-eval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelwright import provenance
from modelwright.errors import UserError
from modelwright.models.loading import describe
from modelwright.models.scoring import DocumentScore, resolve_window, score_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Totals:
    """Sums over documents, in float64.

    Attributes:
        documents: Documents.
        tokens: Tokens predicted; prefix and padding are not counted.
        bytes: UTF-8 bytes of the texts.
        words: Words of the texts, as split at white space.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    _nats: list[float] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)

    def add(self, score: DocumentScore) -> None:
        """Counts a document.

        Raises:
            UserError: The model gave no finite probability.
        """
        if not math.isfinite(score.log_probability):
            raise UserError(
                f"The model's log-probability of document {self.documents + 1} is {score.log_probability}: its weights "
                f"hold values that are not finite, or they overflow in this dtype (try --dtype float32)."
            )
        self.documents += 1
        self.tokens += score.tokens
        self.bytes += score.bytes
        self.words += score.words
        self._nats.append(-score.log_probability)
        self._lengths.append(score.bytes)

    def metrics(self) -> dict[str, float | None]:
        """Returns the metrics of all documents together.

        ``bits_per_byte`` is the only one that may be compared across tokenizers. Its standard error is that of a ratio
        of sums over documents (linearised); None for a single document. A perplexity beyond float64 is None.

        Raises:
            UserError: There is no text at all.
        """
        if not self.bytes:
            raise UserError("All documents are empty, so there is nothing to measure.")
        nats = math.fsum(self._nats)
        ratio = nats / self.bytes
        error = None
        if self.documents > 1:
            squares = math.fsum((n - ratio * b) ** 2 for n, b in zip(self._nats, self._lengths, strict=True))
            error = math.sqrt(squares * self.documents / (self.documents - 1)) / self.bytes / math.log(2)
        return {
            "bits_per_byte": ratio / math.log(2),
            "bits_per_byte_stderr": error,
            "byte_perplexity": _exp(ratio),
            "token_perplexity": _exp(nats / self.tokens),
            "word_perplexity": _exp(nats / self.words) if self.words else None,
        }


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None


def sample_rows(scores: Iterable[DocumentScore], totals: Totals) -> Iterator[dict[str, Any]]:
    """Yields a row a document (``doc_id``, ``bits_per_byte``, counts) while adding it to ``totals``."""
    for number, score in enumerate(scores):
        totals.add(score)
        yield {
            "doc_id": number,
            "bits_per_byte": -score.log_probability / score.bytes / math.log(2) if score.bytes else None,
            "log_probability": score.log_probability,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "words": score.words,
        }


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    task: str = "perplexity",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measures a model and returns what lm-eval's ``simple_evaluate`` would: results, configs, n-samples, versions.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        texts: Documents.
        task: Name under which the results stand.
        window: Longest input in tokens; None takes the model's own, at most 2,048.
        stride: New tokens a window; None takes half the window.
        batch_size: Windows at once; does not change the result beyond rounding.

    Raises:
        UserError: See :func:`~modelwright.models.scoring.score_documents`; or there is no text.
    """
    window, stride = resolve_window(model, window, stride)
    totals = Totals()
    for score in score_documents(model, tokenizer, texts, window=window, stride=stride, batch_size=batch_size):
        totals.add(score)
    return as_results(model, totals, task=task, window=window, stride=stride, batch_size=batch_size)


def as_results(
    model: PreTrainedModel, totals: Totals, *, task: str, window: int, stride: int, batch_size: int
) -> dict[str, Any]:
    """Lays out totals as lm-eval does."""
    metrics = {f"{name},none": "N/A" if value is None else value for name, value in totals.metrics().items()}
    return {
        "results": {task: {"alias": task, **metrics}},
        "configs": {
            task: {
                "task": task,
                "output_type": "loglikelihood_rolling",
                "metadata": {"window": window, "stride": stride},
            }
        },
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"bits_per_byte": False, "byte_perplexity": False, "word_perplexity": False}},
        "n-samples": {task: {"original": totals.documents, "effective": totals.documents}},
        "config": {
            "model": "hf",
            "model_args": {"name": model.config.name_or_path, **describe(model)},
            "batch_size": batch_size,
            "device": str(model.device),
        },
        "counts": {
            "documents": totals.documents,
            "bytes": totals.bytes,
            "tokens": totals.tokens,
            "words": totals.words,
        },
        "software": provenance.versions(),
    }
