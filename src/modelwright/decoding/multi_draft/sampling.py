"""One call of ``generate``: its sequences as they grow, and the shaping of logits that both laws go through."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

from modelwright.decoding.generate import GumbelDraw, RefuseNan
from modelwright.errors import UserError

#: Processors that look at the scores only: all drafts can be shaped in one call, whatever stands before them.
_SCORES_ONLY = (
    RefuseNan,
    stock.TemperatureLogitsWarper,
    stock.TopKLogitsWarper,
    stock.TopPLogitsWarper,
    stock.MinPLogitsWarper,
    stock.TypicalLogitsWarper,
    stock.EpsilonLogitsWarper,
    stock.EtaLogitsWarper,
    stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization,
    stock.SuppressTokensLogitsProcessor,
)
#: Processors that remember earlier calls, which drafts that are thrown away would confuse.
_REMEMBERING = (
    stock.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    stock.SynthIDTextWatermarkLogitsProcessor,
)
#: Processors that tell sequences apart by their place in the batch.
_BY_ROW = (
    stock.PrefixConstrainedLogitsProcessor,
    stock.EncoderRepetitionPenaltyLogitsProcessor,
    stock.EncoderNoRepeatNGramLogitsProcessor,
)


@dataclass
class Row:
    """A prompt and what was generated so far.

    Attributes:
        index: Its row in the batch that ``generate`` was called with.
        buffer: Room for all its tokens, ``(max_length,)`` int64; padding on the left.
        length: Tokens in it, padding included.
        padding: How many of them are padding.
        generator: Source of randomness; None for torch's own.
    """

    index: int
    buffer: Tensor
    length: int
    padding: int
    generator: torch.Generator | None = None

    @property
    def ids(self) -> Tensor:
        """The tokens with their padding, ``(length,)``."""
        return self.buffer[: self.length]


class Shaper:
    """Applies ``generate``'s processors to rows of logits that stand behind different prefixes.

    Args:
        processors: Those of ``generate``. A :class:`GumbelDraw` is taken out: its generators become those of the
            sequences.
        rows: Sequences in the batch.

    Raises:
        UserError: A processor cannot be used on drafts.
    """

    def __init__(self, processors: LogitsProcessorList, rows: int) -> None:
        self.generators: list[torch.Generator] | None = None
        self.processors = LogitsProcessorList()
        for processor in processors:
            name = type(processor).__name__
            if isinstance(processor, _REMEMBERING):
                raise UserError(f"{name} remembers earlier tokens, which drafts would confuse: leave its option out.")
            if isinstance(processor, _BY_ROW) and rows > 1:
                raise UserError(f"{name} depends on a prompt's place in the batch: use it with one prompt at a time.")
            if isinstance(processor, GumbelDraw):
                self.generators = processor.generators
            else:
                self.processors.append(processor)
        self.scores_only = all(type(p) in _SCORES_ONLY for p in self.processors)

    def __call__(self, owners: Sequence[Row], prefixes: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Returns scores, ``(rows, V)`` float32.

        Args:
            owners: The sequence that each row belongs to.
            prefixes: Tokens before each row, with padding, ``(length,)`` each.
            logits: ``(rows, V)``.
        """
        scores = logits.to(torch.float32, copy=True)
        if not self.processors:
            return scores
        if self.scores_only:
            return self.processors(torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device), scores)
        by_length: dict[int, list[int]] = {}
        for row, prefix in enumerate(prefixes):
            by_length.setdefault(len(prefix), []).append(row)
        for group in by_length.values():
            ids = torch.stack([prefixes[row] for row in group])
            processors = LogitsProcessorList(
                _for_rows(p, [owners[row].index for row in group]) for p in self.processors
            )
            scores[group] = processors(ids, scores[group])
        return scores


def _for_rows(processor: Any, rows: list[int]) -> Any:
    """Returns a processor that holds the padding of each sequence of the batch, as one for some of its rows."""
    padding = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(padding, Tensor):
        return processor
    twin = copy.copy(processor)
    twin.prompt_ignore_length = padding[rows]
    return twin


def as_probabilities(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the float64 softmax of scores over the last dimension."""
    return (scores.to(torch.float64) / temperature).softmax(-1)
