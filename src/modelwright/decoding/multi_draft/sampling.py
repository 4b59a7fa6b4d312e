"""One call of ``generate``: its sequences as they grow, and the shaping of logits that both laws go through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation import logits_process as stock

from modelwright.decoding.generate import GumbelDraw, RefuseNan
from modelwright.decoding.multi_draft.draws import Uniforms
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
_NO_TOKENS = torch.zeros(1, 1, dtype=torch.long)
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


class Row:
    """A prompt and what was generated so far.

    Tokens are appended on the CPU, where the loop decides; they go to the model's device when somebody there asks.

    Args:
        index: Its row in the batch that ``generate`` was called with.
        prompt: Its tokens, ``(length,)`` int64; padding on the left.
        padding: How many of them are padding.
        longest: Tokens there must be room for.
        generator: Source of randomness; None for torch's own.
        fill: Token that stands behind the end.
    """

    def __init__(
        self,
        index: int,
        prompt: Tensor,
        padding: int = 0,
        *,
        longest: int,
        generator: torch.Generator | None = None,
        fill: int = 0,
    ) -> None:
        self.index, self.padding, self.length = index, padding, len(prompt)
        self.uniform = Uniforms(generator)
        self.host = torch.full((max(longest, len(prompt)),), fill)
        self.host[: len(prompt)] = prompt.cpu()
        self._buffer = self.host.to(prompt.device)
        self._there = self.length

    def append(self, token: int) -> None:
        """Adds a token."""
        self.host[self.length] = token
        self.length += 1

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._buffer.device

    @property
    def ids(self) -> Tensor:
        """The tokens with their padding, ``(length,)``, on the model's device."""
        return self.buffer[: self.length]

    @property
    def buffer(self) -> Tensor:
        """The same with all the room behind, on the model's device."""
        if self._buffer is not self.host and self._there < self.length:
            new = slice(self._there, self.length)
            self._buffer[new] = self.host[new].to(self._buffer.device)
        self._there = self.length
        return self._buffer


class Stops:
    """Says when a sequence ends. Stock criteria on its last token and its length are looked at without the device.

    Args:
        criteria: Those of ``generate``.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.ends: set[int] = set()
        self.longest: int | None = None
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.ends |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria:
                self.longest = min(criterion.max_length, self.longest or criterion.max_length)
            else:
                self.others.append(criterion)

    def __call__(self, row: Row) -> bool:
        """Whether the row's last token is its last."""
        if int(row.host[row.length - 1]) in self.ends or (self.longest is not None and row.length >= self.longest):
            return True
        return len(self.others) > 0 and bool(self.others(row.ids[None], None).all())


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

    def __call__(self, logits: Tensor, owners: Sequence[Row], prefixes: Callable[[int], Tensor]) -> Tensor:
        """Returns scores, ``(rows, V)`` float32.

        Args:
            logits: ``(rows, V)``.
            owners: The sequence that each row belongs to.
            prefixes: Returns the tokens before a row, with padding, ``(length,)``; asked only if a processor looks.
        """
        scores = logits.to(torch.float32, copy=True)
        if not self.processors:
            return scores
        if self.scores_only:
            return self.shape(scores)
        before = [prefixes(row) for row in range(len(scores))]
        by_length: dict[int, list[int]] = {}
        for row, prefix in enumerate(before):
            by_length.setdefault(len(prefix), []).append(row)
        for group in by_length.values():
            ids = torch.stack([before[row] for row in group])
            processors = LogitsProcessorList(
                _for_rows(p, [owners[row].index for row in group]) for p in self.processors
            )
            scores[group] = processors(ids, scores[group])
        return scores

    def shape(self, scores: Tensor) -> Tensor:
        """Applies processors that look at scores only to float32 ``(rows, V)``, which may be changed in place."""
        if not self.processors:
            return scores
        # None of them looks at the tokens.
        shaped: Tensor = self.processors(_NO_TOKENS.expand(len(scores), 1), scores)
        return shaped


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
    if temperature != 1:
        scores = scores.to(torch.float64) / temperature
    return scores.softmax(-1, dtype=torch.float64)
