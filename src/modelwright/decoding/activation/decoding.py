"""Activation decoding (AD): ``log p - a E``, with E the entropy over the prompt's positions of a token's activation.

A token's activation at a position is the logit that the model's head gives it behind an "info" layer; its softmax over
the positions of the prompt is a distribution, which is sharp for tokens that a part of the prompt calls for (arXiv
2403.01548, section 3). E is taken once, over the prompt's tokens (as the official code does), and not over those
generated.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from modelwright.decoding.contrast import as_float, check_alpha, check_relative_top, keep_plausible
from modelwright.decoding.early_exit import EarlyExit
from modelwright.decoding.loop import Decoding, Prompt, Stream, all_logits
from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

#: Logits (numbers) that are held at once: 256 MiB in float32.
_CHUNK = 1 << 26


def activation_entropy(exit_: EarlyExit, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns each token's entropy over positions, ``(rows, V)`` in nats.

    Args:
        exit_: The model's head.
        hidden: Hidden states behind the info layer, ``(rows, length, width)``.
        mask: ``(rows, length)``, 0 at positions that do not count; None for none.
    """
    found = []
    for row in range(len(hidden)):
        own = hidden[row] if mask is None else hidden[row][mask[row].bool()]
        # Over positions, a block at a time: log-sum-exp z, and the mean of the logits under the softmax.
        total = weighted = None
        step = max(1, _CHUNK // exit_.vocabulary)
        for begin in range(0, len(own), step):
            logits = exit_(own[begin : begin + step])
            part = logits.logsumexp(0)
            mean = ((logits - part).exp() * logits).sum(0)
            if total is None or weighted is None:
                total, weighted = part, mean
            else:
                both = torch.logaddexp(total, part)
                weighted = (total - both).exp() * weighted + (part - both).exp() * mean
                total = both
        if total is None or weighted is None:
            raise UserError("Activation decoding needs a prompt.")
        found.append(total - weighted)
    return torch.stack(found)


class ActivationDecoding(Decoding):
    """Towards tokens that the prompt's hidden states point at sharply.

    Args:
        alpha: Strength; 0.5 is the paper's for 7B models.
        info_layer: Layer whose hidden states are looked at; by default three quarters up (24 of 32).
        relative_top: Only tokens with at least this fraction of the most probable one; 0.1 is the paper's.
        norm: See :class:`~modelwright.decoding.early_exit.EarlyExit`.
        streamer: See :class:`~modelwright.decoding.loop.Decoding`.
    """

    looks_ahead = True  # the entropies of a text are over all its tokens

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        info_layer: int | None = None,
        relative_top: float | None = 0.1,
        norm: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(streamer=streamer)
        check_alpha(alpha)
        check_relative_top(relative_top)
        self.alpha, self.info_layer, self.relative_top, self.norm = float(alpha), info_layer, relative_top, norm

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a layer that the model has not.

        Raises:
            UserError: It has not.
        """
        self._exit(model)

    def _exit(self, model: PreTrainedModel) -> tuple[EarlyExit, int]:
        exit_ = EarlyExit(model, norm=self.norm)
        layer = 3 * exit_.layers // 4 if self.info_layer is None else self.info_layer
        exit_.check(layer)
        return exit_, layer

    def combine(self, logits: Tensor, spread: Tensor) -> Tensor:
        """Returns the scores of the next token, ``(…, V)``, of logits and of entropies that broadcast to them."""
        return keep_plausible(logits - self.alpha * spread if self.alpha else logits, logits, self.relative_top)

    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        exit_, layer = self._exit(model)
        if prompt.known:
            raise UserError("Activation decoding reads the whole prompt: leave out the cache that holds a part of it.")
        stream = Stream(model, prompt)
        out = stream.read(prompt.ids, hidden=True)
        spread = activation_entropy(exit_, out.hidden_states[layer], prompt.mask)
        logits = as_float(out.logits[:, -1])
        while True:
            tokens = yield self.combine(logits, spread)
            logits = stream.logits(tokens[:, None])

    @torch.no_grad()
    def next_token_log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: list[int] | None = None,
    ) -> Tensor:
        """See :class:`~modelwright.decoding.loop.Decoding`.

        Args:
            model: The model.
            input_ids: Tokens ``(rows, length)``.
            attention_mask: Their mask.
            prompt_lengths: Tokens of each row that are prompt, over which entropies are taken; by default all, as the
                official code does for multiple choice.
        """
        exit_, layer = self._exit(model)
        out = all_logits(model, input_ids, attention_mask, hidden=True)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if prompt_lengths is not None:
            lengths = torch.as_tensor(prompt_lengths, device=mask.device)[:, None]
            mask = mask * (mask.cumsum(1) <= lengths)
        spread = activation_entropy(exit_, out.hidden_states[layer], mask)[:, None]
        return self.combine(as_float(out.logits), spread).log_softmax(-1)


@dataclass(kw_only=True)
class ActivationOptions:
    """Towards tokens that the prompt's hidden states point at sharply."""

    alpha: Annotated[float, Arg("Strength.")] = 0.5
    info_layer: Annotated[int | None, Arg("Layer to look at; three quarters up by default.")] = None
    relative_top: Annotated[float | None, Arg("Keep tokens with this fraction of the best one's probability.")] = 0.1
    norm: Annotated[bool, Arg("Put the final norm behind the layer.")] = False

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ActivationDecoding:
        """Returns what ``generate(custom_generate=…)`` takes.

        Raises:
            UserError: A setting is out of range, or the layer is not in the model.
        """
        decoding = ActivationDecoding(
            self.alpha, info_layer=self.info_layer, relative_top=self.relative_top, norm=self.norm
        )
        decoding.check(model)
        return decoding
