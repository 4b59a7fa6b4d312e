"""Decoding that changes nothing, through the loop that all others go through."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modelwright.decoding.contrast import as_float
from modelwright.decoding.loop import Decoding, Prompt, Stream, all_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PlainDecoding(Decoding):
    """The model's own law: the same tokens as ``generate`` without it."""

    exact = True

    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        stream = Stream(model, prompt)
        scores = stream.logits(prompt.ids[:, prompt.known :])
        while True:
            tokens = yield scores
            scores = stream.logits(tokens[:, None])

    @torch.no_grad()
    def next_token_log_probs(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        return as_float(all_logits(model, input_ids, attention_mask).logits).log_softmax(-1)


@dataclass(kw_only=True)
class PlainOptions:
    """The model's own law: greedy search, or sampling."""

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PlainDecoding:
        """Returns what ``generate(custom_generate=…)`` takes."""
        return PlainDecoding()
