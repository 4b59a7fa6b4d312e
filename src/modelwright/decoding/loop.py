"""The one loop behind every decoding that changes the law of the next token.

``model.generate(..., custom_generate=decoding)`` prepares prompts, processors and criteria; the decoding says what the
scores of the next token are, for as many streams of as many models as it likes; this loop shapes them, chooses,
stops and streams as ``generate`` does.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelwright.decoding.contrast import as_float
from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

_KNOWN = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache"}


@dataclass(frozen=True)
class Prompt:
    """What a batch begins with.

    Attributes:
        ids: Tokens ``(rows, length)`` int64, padded on the left.
        mask: ``(rows, length)``, 0 for padding; None without padding.
        positions: Position of each token, ``(rows or 1, length)``, or None for those that the mask implies.
        cache: The model's cache, which may hold the first tokens already; None to do without.
        room: Tokens that a row has in the end, at most.
    """

    ids: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    cache: Cache | None = None
    room: int = 0

    @property
    def known(self) -> int:
        """How many tokens the cache holds already."""
        return int(self.cache.get_seq_length()) if self.cache is not None else 0

    def beside(self, model: PreTrainedModel) -> Prompt:
        """Returns the same prompt for another model: on its device, with a cache of its own if there was one."""
        from transformers import DynamicCache

        device = model.device
        return Prompt(
            self.ids.to(device),
            None if self.mask is None else self.mask.to(device),
            None if self.positions is None else self.positions.to(device),
            None if self.cache is None else DynamicCache(config=model.config),
            self.room,
        )


class Stream:
    """A model that reads on, with its cache, or without one from the beginning each time.

    Args:
        model: A causal language model.
        prompt: Says padding, positions and cache; its tokens are not read yet.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt) -> None:
        self.model, self.cache = model, prompt.cache
        self.seen = prompt.known
        self._names = set(inspect.signature(model.forward).parameters)
        self._ids: Tensor | None = None
        rows, length = prompt.ids.shape
        room, device = max(prompt.room, length + 1), prompt.ids.device
        self._mask: Tensor | None = None
        if prompt.mask is not None:
            self._mask = torch.ones(rows, room, dtype=prompt.mask.dtype, device=device)
            self._mask[:, :length] = prompt.mask
            self._positions = (self._mask.long().cumsum(-1) - 1).clamp(min=0)
        else:
            self._positions = torch.arange(room, device=device)[None]
        if prompt.positions is not None and prompt.positions.shape[1] == length:
            further = torch.arange(1, room - length + 1, device=device)
            self._positions = torch.cat((prompt.positions, prompt.positions[:, -1:] + further), 1)

    def read(self, ids: Tensor, *, hidden: bool = False, attentions: bool = False, keep: int = 1) -> Any:
        """Reads tokens and returns the model's output.

        Args:
            ids: The next tokens ``(rows, n)``.
            hidden: Whether hidden states are wanted.
            attentions: Whether attention weights are wanted, which only some attention implementations give.
            keep: For how many of the last tokens logits are wanted; 0 for all.
        """
        begin = self.seen
        if self.cache is None:
            ids = ids if self._ids is None else torch.cat((self._ids, ids), 1)
            self._ids, begin = ids, 0
        self.seen = end = begin + ids.shape[1]
        self._grow(end)
        options: dict[str, Any] = {}
        if "position_ids" in self._names:
            options["position_ids"] = self._positions[:, begin:end]
        if "logits_to_keep" in self._names:
            options["logits_to_keep"] = keep
        if hidden:
            options["output_hidden_states"] = True
        if attentions:
            options["output_attentions"] = True
        mask = None if self._mask is None else self._mask[:, :end]
        return self.model(
            input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=self.cache is not None,
            return_dict=True, **options,
        )  # fmt: skip

    def logits(self, ids: Tensor) -> Tensor:
        """Reads tokens and returns the logits that follow the last, ``(rows, V)`` in float32 or float64."""
        return as_float(self.read(ids).logits[:, -1])

    def repeat(self, times: int) -> None:
        """Makes each row so many rows, side by side: what was read is shared, what follows is not."""
        if self.cache is not None:
            self.cache.batch_repeat_interleave(times)
        if self._ids is not None:
            self._ids = self._ids.repeat_interleave(times, 0)
        if self._mask is not None:
            self._mask = self._mask.repeat_interleave(times, 0)
        if len(self._positions) > 1:
            self._positions = self._positions.repeat_interleave(times, 0)

    def _grow(self, length: int) -> None:
        more = length - self._positions.shape[1]
        if more > 0:
            further = torch.arange(1, more + 1, device=self._positions.device)
            self._positions = torch.cat((self._positions, self._positions[:, -1:] + further), 1)
            if self._mask is not None:
                self._mask = torch.cat((self._mask, self._mask.new_ones(len(self._mask), more)), 1)


class Decoding(ABC):
    """A law of the next token, as ``generate(custom_generate=…)`` takes it.

    ``generate`` keeps its ``streamer`` to itself when a callable decodes: give it here instead.

    Attributes:
        exact: Whether the law is the model's own, so that scoring may use the plain model.
        needs_context: Whether each prompt is also needed without its context, as ``without_context_ids`` and
            ``without_context_mask`` of ``generate`` and of :meth:`next_token_log_probs`.
        looks_ahead: Whether :meth:`next_token_log_probs` of a place depends on tokens after it, so that padding on the
            right must be in the mask.
        streamer: Gets the prompts and then each token.
    """

    exact: bool = False
    needs_context: bool = False
    looks_ahead: bool = False

    def __init__(self, *, streamer: BaseStreamer | None = None) -> None:
        self.streamer = streamer

    @abstractmethod
    def scores(self, model: PreTrainedModel, prompt: Prompt) -> Generator[Tensor, Tensor, None]:
        """Yields the scores of the next token, ``(rows, V)``, and is sent the tokens chosen, ``(rows,)``; for ever.

        Whatever is done to a model is undone when the generator is closed.
        """

    @abstractmethod
    def next_token_log_probs(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Returns log-probabilities (natural) of the next token after each token, ``(rows, length, V)`` float32.

        Args:
            model: The model.
            input_ids: Tokens ``(rows, length)``.
            attention_mask: ``(rows, length)``, 0 for padding, on either side. What stands at padding means nothing.
        """

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuses a model that this decoding does not go with: called before anything is read.

        Raises:
            UserError: It does not.
        """

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop, as ``generate`` calls it.

        Returns:
            Tokens ``(rows, length)``, or a ``GenerateDecoderOnlyOutput`` if asked for.

        Raises:
            UserError: A setting or a cache does not go with it.
        """
        prompt = make_prompt(model, input_ids, generation_config, model_kwargs)
        self.check(model)
        law = self.scores(model, prompt)
        return run(law, prompt, logits_processor, stopping_criteria, generation_config, self.streamer)


def make_prompt(model: PreTrainedModel, ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]) -> Prompt:
    """Reads what ``generate`` hands over, and refuses what no decoding of this loop can do.

    Raises:
        UserError: Beams, a static cache, right padding, inputs that are no text …
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UserError(f"This decoding is for decoder-only models; {name} has an encoder.")
    if (config.num_beams or 1) > 1:
        raise UserError("This decoding samples or takes the best token: leave out num_beams.")
    wanted = [n for n in ("output_attentions", "output_hidden_states") if getattr(config, n, None)]
    if config.return_dict_in_generate and wanted:
        raise UserError(f"This decoding reads the model more than once a token: leave out {wanted[0]}.")
    if inputs.get("cache_params") is not None:
        raise UserError(f"{name} keeps a recurrent state and no key/value cache: this decoding needs attention.")
    if extra := [key for key, value in inputs.items() if key not in _KNOWN and value is not None]:
        raise UserError(f"This decoding is for text in input_ids: '{extra[0]}' cannot be used with it.")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise UserError(
            f"The attention mask is for {mask.shape[1]} tokens and input_ids has {ids.shape[1]}: behind a cache, too, "
            f"input_ids must hold all tokens."
        )
    if mask is not None and bool((mask[:, -1] == 0).any()):
        raise UserError("Prompts of a batch must be padded on the left: set padding_side='left' in the tokenizer.")
    cache = inputs.get("past_key_values")
    if cache is not None:
        check_cache(cache, name)
    prompt = Prompt(ids, mask, inputs.get("position_ids"), cache, (config.max_length or 0) + 1)
    if prompt.known >= ids.shape[1]:
        raise UserError(
            f"The cache given holds {prompt.known} tokens already, but the prompt has only {ids.shape[1]}: input_ids "
            f"must hold all tokens, at least one of them new."
        )
    return prompt


def check_cache(cache: Any, name: str) -> None:
    """Refuses a cache whose rows cannot be copied.

    Raises:
        UserError: It is static, quantized or offloaded, or a recurrent state.
    """
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    from modelwright.models.caches import copies_rows

    layers = getattr(cache, "layers", None)
    if layers is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise UserError(f"{name} keeps a recurrent state and no key/value cache: this decoding needs attention.")
    for layer in layers:
        if not copies_rows(layer):
            raise UserError(
                f"This decoding needs a dynamic cache, not one with layers of the kind {type(layer).__name__}: leave "
                f"out cache_implementation and past_key_values."
            )
    if getattr(cache, "offloading", False):
        raise UserError("This decoding does not work with an offloaded cache: leave out cache_implementation.")


@torch.no_grad()
def run(
    law: Generator[Tensor, Tensor, None],
    prompt: Prompt,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None = None,
) -> Any:
    """Draws tokens from a law until all rows have ended; see :class:`Decoding`."""
    from transformers.generation import GenerateDecoderOnlyOutput

    ids = prompt.ids
    as_dict = config.return_dict_in_generate
    kept: list[Tensor] | None = [] if as_dict and config.output_scores else None
    raw: list[Tensor] | None = [] if as_dict and config.output_logits else None
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    padding: Any = getattr(config, "_pad_token_tensor", None)
    unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    try:
        scores = next(law)
        while True:
            if raw is not None:
                raw.append(scores.clone())
            scores = processors(ids, scores.to(ids.device))
            if kept is not None:
                kept.append(scores)
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            if ends:
                tokens = tokens * unfinished + padding.to(ids.device) * (1 - unfinished)
            ids = torch.cat((ids, tokens[:, None]), 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            unfinished = unfinished & ~criteria(ids, None if kept is None else tuple(kept))
            if not bool(unfinished.any()):
                break
            scores = law.send(tokens)
    finally:
        law.close()
    if streamer is not None:
        streamer.end()
    if not as_dict:
        return ids
    return GenerateDecoderOnlyOutput(
        sequences=ids,
        scores=None if kept is None else tuple(kept),
        logits=None if raw is None else tuple(raw),
        past_key_values=prompt.cache,
    )


def all_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """Returns the model's output on whole sequences, with logits of all tokens; see :class:`Stream`."""
    if mask is not None and bool((mask == 1).all()):
        mask = None
    return Stream(model, Prompt(ids, mask)).read(ids, keep=0, **options)
