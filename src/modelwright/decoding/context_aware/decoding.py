"""Context-aware decoding (CAD): ``(1 + a) z(context, question) - a z(question)`` (arXiv 2305.14739, equation 3)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from modelwright.decoding.contrast import as_float, check_alpha, check_relative_top, contrast, keep_plausible
from modelwright.decoding.loop import Decoding, Prompt, Stream, all_logits, make_prompt, run
from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )
    from transformers.generation.streamers import BaseStreamer


class ContextAwareDecoding(Decoding):
    """CAD: each prompt is given with its context and, as ``without_context_ids``, without.

    Args:
        alpha: Strength; the paper's is 0.5 for summaries and up to 1.
        relative_top: Only tokens with at least this fraction of the most probable one's probability; None keeps all,
            as the paper does.
        streamer: See :class:`~modelwright.decoding.loop.Decoding`.
    """

    needs_context = True

    def __init__(
        self, alpha: float = 0.5, *, relative_top: float | None = None, streamer: BaseStreamer | None = None
    ) -> None:
        super().__init__(streamer=streamer)
        check_alpha(alpha)
        check_relative_top(relative_top)
        self.alpha, self.relative_top = float(alpha), relative_top

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        without_context_ids: Tensor | None = None,
        without_context_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """See :class:`~modelwright.decoding.loop.Decoding`.

        Args:
            model: The model.
            input_ids: Prompts with context.
            logits_processor: See ``generate``.
            stopping_criteria: See ``generate``.
            generation_config: See ``generate``.
            without_context_ids: The prompts without context, ``(rows, length)``, padded on the left.
            without_context_mask: Their mask.
            **model_kwargs: See ``generate``.
        """
        prompt = make_prompt(model, input_ids, generation_config, model_kwargs)
        law = self._scores(model, prompt, *_without(input_ids, without_context_ids, without_context_mask))
        return run(law, prompt, logits_processor, stopping_criteria, generation_config, self.streamer)

    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """Refuses: see :meth:`__call__`.

        Raises:
            UserError: The prompts without context are missing.
        """
        raise UserError(_MISSING)

    def _scores(
        self, model: PreTrainedModel, prompt: Prompt, ids: Tensor, mask: Tensor | None
    ) -> Generator[Tensor, Tensor, None]:
        from transformers import DynamicCache

        cache = None if prompt.cache is None else DynamicCache(config=model.config)
        room = prompt.room - prompt.ids.shape[1] + ids.shape[1]
        stream, other = Stream(model, prompt), Stream(model, Prompt(ids, mask, cache=cache, room=room))
        own = prompt.ids[:, prompt.known :]
        while True:
            base = stream.logits(own)
            tokens = yield keep_plausible(contrast(base, other.logits(ids), self.alpha), base, self.relative_top)
            own = ids = tokens[:, None]

    @torch.no_grad()
    def next_token_log_probs(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        without_context_ids: Tensor | None = None,
        without_context_mask: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~modelwright.decoding.loop.Decoding`.

        Args:
            model: The model.
            input_ids: Texts with context.
            attention_mask: Their mask.
            without_context_ids: Texts without, which end in the same tokens; padded on either side. Tokens that only
                the text with context has are under the model's own law.
            without_context_mask: Their mask.

        Raises:
            UserError: The texts without context are missing.
        """
        ids, mask = _without(input_ids, without_context_ids, without_context_mask)
        base = as_float(all_logits(model, input_ids, attention_mask).logits)
        other = as_float(all_logits(model, ids, mask).logits)
        own = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        theirs = torch.ones_like(ids) if mask is None else mask
        out = base.clone()
        for row in range(len(base)):
            # Place k from the end of one text is place k from the end of the other.
            at, to = own[row].nonzero()[:, 0], theirs[row].nonzero()[:, 0]
            common = min(len(at), len(to))
            at, to = at[len(at) - common :], to[len(to) - common :]
            mixed = contrast(base[row, at], other[row, to], self.alpha)
            out[row, at] = keep_plausible(mixed, base[row, at], self.relative_top)
        return out.log_softmax(-1)


_MISSING = (
    "Context-aware decoding also needs each prompt without its context: give without_context_ids and "
    "without_context_mask."
)


def _without(input_ids: Tensor, ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if ids is None:
        raise UserError(_MISSING)
    if len(input_ids) % len(ids):
        raise UserError(f"There are {len(input_ids)} prompts, and {len(ids)} without their context.")
    if mask is not None and mask.shape != ids.shape:
        raise UserError("without_context_mask must have the shape of without_context_ids.")
    times = len(input_ids) // len(ids)  # num_return_sequences, which generate applies to its own inputs only
    ids = ids.to(input_ids.device).repeat_interleave(times, 0)
    return ids, None if mask is None else mask.to(input_ids.device).repeat_interleave(times, 0)


@dataclass(kw_only=True)
class ContextAwareOptions:
    """Away from what the model would say without the context; needs each prompt without it."""

    alpha: Annotated[float, Arg("Strength.")] = 0.5
    relative_top: Annotated[float | None, Arg("Keep tokens with this fraction of the best one's probability.")] = None

    def custom_generate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ContextAwareDecoding:
        """Returns what ``generate(custom_generate=…)`` takes.

        Raises:
            UserError: A setting is out of range.
        """
        return ContextAwareDecoding(self.alpha, relative_top=self.relative_top)
