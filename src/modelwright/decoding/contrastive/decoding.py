"""Contrastive decoding (CD): ``log p_expert - log p_amateur`` among plausible tokens (arXiv 2210.15097, section 3).

Written here, after arXiv 2309.09117, as ``(1 + beta) z_expert - beta z_amateur``, so that the strength can be set; the
first paper's own score is the limit of a large beta. With ``alpha=None`` it is exactly that score.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from modelwright.decoding.contrast import (
    as_float,
    check_alpha,
    check_relative_top,
    check_vocabularies,
    contrast,
    fill_up,
    keep_plausible,
)
from modelwright.decoding.loop import Decoding, Prompt, Stream, all_logits
from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer


class ContrastiveDecoding(Decoding):
    """An expert against an amateur.

    Args:
        amateur: A smaller model with the same tokens.
        alpha: Strength; None takes the difference of the log-probabilities itself, as the paper does.
        relative_top: Only tokens with at least this fraction of the expert's most probable one; the paper's is 0.1.
        pad_vocabulary: Whether the amateur's table of tokens may have another size, for models of one tokenizer whose
            tables were padded differently (Qwen2.5): tokens that only one has are ruled out.
        temperature: Of the amateur's law; the paper's is 1, or 0.5 for its smallest amateurs.
        streamer: See :class:`~modelwright.decoding.loop.Decoding`.
    """

    def __init__(
        self,
        amateur: PreTrainedModel,
        alpha: float | None = None,
        *,
        relative_top: float | None = 0.1,
        temperature: float = 1.0,
        pad_vocabulary: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> None:
        super().__init__(streamer=streamer)
        if alpha is not None:
            check_alpha(alpha)
        check_relative_top(relative_top)
        if not temperature > 0:
            raise UserError(f"The amateur's temperature is {temperature}: it must be above 0.")
        self.amateur, self.alpha, self.relative_top, self.temperature = amateur, alpha, relative_top, temperature
        self.pad_vocabulary = pad_vocabulary

    def check(self, model: PreTrainedModel) -> None:
        """Refuses an amateur with other tokens.

        Raises:
            UserError: It has.
        """
        own, wanted = (int(m.get_output_embeddings().weight.shape[0]) for m in (self.amateur, model))
        check_vocabularies(own, wanted, self.pad_vocabulary)

    def combine(self, base: Tensor, amateur: Tensor) -> Tensor:
        """Returns the scores of the next token, ``(…, V)``, of logits of both."""
        size = base.shape[-1]
        amateur = amateur[..., :size].to(base.device) / self.temperature
        base = base[..., : amateur.shape[-1]]
        mixed = base - amateur if self.alpha is None else contrast(base, amateur, self.alpha)
        return fill_up(keep_plausible(mixed, base, self.relative_top), size)

    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        stream, other = Stream(model, prompt), Stream(self.amateur, prompt.beside(self.amateur))
        ids, theirs = prompt.ids[:, prompt.known :], prompt.ids.to(self.amateur.device)
        while True:
            tokens = yield self.combine(stream.logits(ids), other.logits(theirs))
            ids = tokens[:, None]
            theirs = ids.to(self.amateur.device)

    @torch.no_grad()
    def next_token_log_probs(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """See :class:`~modelwright.decoding.loop.Decoding`."""
        self.check(model)
        base = as_float(all_logits(model, input_ids, attention_mask).logits)
        device = self.amateur.device
        mask = None if attention_mask is None else attention_mask.to(device)
        other = as_float(all_logits(self.amateur, input_ids.to(device), mask).logits)
        return self.combine(base, other).log_softmax(-1)


@dataclass(kw_only=True)
class ContrastiveOptions:
    """The model against a smaller one with the same tokens."""

    amateur: Annotated[str, Arg("The smaller model: a folder or a hub id.", kind="input")]
    alpha: Annotated[float | None, Arg("Strength; by default the plain difference of log-probabilities.")] = None
    relative_top: Annotated[float | None, Arg("Keep tokens with this fraction of the best one's probability.")] = 0.1
    temperature: Annotated[float, Arg("Of the amateur's law.")] = 1.0
    pad_vocabulary: Annotated[
        bool, Arg("The amateur's table of tokens may be padded to another size, as among Qwen2.5's models.")
    ] = False
    dtype: Annotated[str, Arg("Of the amateur: auto (the checkpoint's own), float32, bfloat16 or float16.")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the amateur.")] = False

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ContrastiveDecoding:
        """Loads the amateur and returns what ``generate(custom_generate=…)`` takes.

        Raises:
            UserError: A setting is out of range, or the amateur has another tokenizer.
        """
        from modelwright.decoding.companion import load_companion

        amateur = load_companion(
            self.amateur, model, tokenizer, what="amateur", dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        decoding = ContrastiveDecoding(
            amateur, self.alpha, relative_top=self.relative_top, temperature=self.temperature,
            pad_vocabulary=self.pad_vocabulary,
        )  # fmt: skip
        decoding.check(model)
        return decoding
