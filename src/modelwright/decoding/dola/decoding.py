"""DoLa: ``log p - log p_early`` among plausible tokens, early being the layer whose law is farthest from the last's.

The distance is the Jensen-Shannon divergence (arXiv 2309.03883, section 2.2), of each row by itself. (The code that was
in transformers took the mean over a batch's rows, so that a row's tokens depended on its neighbours.) transformers 5
has DoLa no more.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from modelwright.decoding.contrast import as_float, check_relative_top, keep_plausible
from modelwright.decoding.early_exit import EarlyExit
from modelwright.decoding.loop import Decoding, Prompt, Stream, all_logits
from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

#: Early logits (numbers) that are held at once in scoring: 512 MiB in float32.
_CHUNK = 1 << 27


class DoLaDecoding(Decoding):
    """The last layer against an early one.

    Args:
        layers: Numbers of the early layers to choose from, 0 being the embedding; or ``low`` or ``high``: every second
            layer of the lower or upper half, of models with more than 40 layers of the first or last 20. ``low``
            begins at 2 where the embedding is tied to the head, and would only repeat the last token.
        relative_top: Only tokens with at least this fraction of the most probable one; 0.1 is the paper's.
        norm: See :class:`~modelwright.decoding.early_exit.EarlyExit`.
        streamer: See :class:`~modelwright.decoding.loop.Decoding`.
    """

    def __init__(
        self,
        layers: Literal["low", "high"] | Sequence[int] = "high",
        *,
        relative_top: float | None = 0.1,
        norm: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(streamer=streamer)
        check_relative_top(relative_top)
        if isinstance(layers, str) and layers not in ("low", "high"):
            raise UserError(f"The layers are '{layers}': give low, high or numbers.")
        if not isinstance(layers, str) and not len(layers):
            raise UserError("DoLa needs at least one early layer.")
        self.layers, self.relative_top, self.norm = layers, relative_top, norm

    def check(self, model: PreTrainedModel) -> None:
        """Refuses layers that the model has not.

        Raises:
            UserError: It has not.
        """
        self.candidates(model)

    def candidates(self, model: PreTrainedModel) -> list[int]:
        """Returns the early layers of a model."""
        exit_ = EarlyExit(model, norm=self.norm)
        count = exit_.layers
        if isinstance(self.layers, str):
            tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
            half = count // 2 if count <= 40 else 20
            first, last = (2 if tied else 0, half) if self.layers == "low" else (count - half, count)
            found = list(range(first, last, 2))
            if not found:
                raise UserError(f"A model of {count} layers has no '{self.layers}' early layers: give numbers.")
            return found
        for layer in self.layers:
            exit_.check(layer)
        return list(self.layers)

    def combine(self, last: Tensor, early: Tensor) -> Tensor:
        """Returns the scores of the next token, ``(…, V)``.

        Args:
            last: Logits of the last layer, ``(…, V)``.
            early: Logits of the early layers, ``(layers, …, V)``.
        """
        log_p, log_q = last.log_softmax(-1), early.log_softmax(-1)
        farthest = divergence(log_p, log_q).argmax(0)
        at = farthest[None, ..., None].expand(1, *log_p.shape)
        return keep_plausible(log_p - log_q.gather(0, at)[0], log_p, self.relative_top)

    def _at(self, exit_: EarlyExit, layers: list[int], out: Any, at: slice) -> Tensor:
        """Returns the scores behind some of the tokens that were read."""
        early = torch.stack([exit_(out.hidden_states[layer][:, at]) for layer in layers])
        return self.combine(as_float(out.logits[:, at]), early)

    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        stream, ids = Stream(model, prompt), prompt.ids[:, prompt.known :]
        exit_, layers = EarlyExit(model, norm=self.norm), self.candidates(model)
        while True:
            tokens = yield self._at(exit_, layers, stream.read(ids, hidden=True), slice(-1, None))[:, 0]
            ids = tokens[:, None]

    @torch.no_grad()
    def next_token_log_probs(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        exit_, layers = EarlyExit(model, norm=self.norm), self.candidates(model)
        out = all_logits(model, input_ids, attention_mask, hidden=True)
        # Early logits are many times the last ones: of a part of the tokens at a time.
        step = max(1, _CHUNK // (len(layers) * len(input_ids) * exit_.vocabulary))
        parts = [
            self._at(exit_, layers, out, slice(begin, begin + step)).log_softmax(-1)
            for begin in range(0, input_ids.shape[1], step)
        ]
        return torch.cat(parts, 1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns the Jensen-Shannon divergence of two laws in nats, 0 to ln 2, over the last dimension."""
    mean = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype, device=log_p.device))
    return 0.5 * ((log_p.exp() * (log_p - mean)).sum(-1) + (log_q.exp() * (log_q - mean)).sum(-1))


@dataclass(kw_only=True)
class DoLaOptions:
    """The last layer against an early one."""

    layers: Annotated[str, Arg("Early layers to choose from: low, high, or numbers such as 0,2,4.")] = "high"
    relative_top: Annotated[float | None, Arg("Keep tokens with this fraction of the best one's probability.")] = 0.1
    norm: Annotated[bool, Arg("Put the final norm behind early layers.")] = False

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DoLaDecoding:
        """Returns what ``generate(custom_generate=…)`` takes.

        Raises:
            UserError: A setting is out of range, or a layer is not in the model.
        """
        layers: Any = self.layers
        if layers not in ("low", "high"):
            try:
                layers = [int(part) for part in str(layers).split(",")]
            except ValueError as error:
                raise UserError(f"The layers are '{layers}': give low, high or numbers such as 0,2,4.") from error
        decoding = DoLaDecoding(layers, relative_top=self.relative_top, norm=self.norm)
        decoding.check(model)
        return decoding
