"""Puts another attention in front of one model's own, and takes it away again: no model file is patched.

transformers finds the attention function by a name in the config. Inside the context the model's attention modules see
a copy of the config that names ours, so other models of the same class, or even of the same config object, see nothing.
Leaving puts the very same config objects back and removes the name.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modelwright.attention.implementation import TEMPORARY, is_changed
from modelwright.attention.rotary import check_rotary
from modelwright.attention.string.rotation import Rotation, match
from modelwright.errors import UserError
from modelwright.models.loading import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = f"{TEMPORARY}positions-"
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class _Note:
    """What our mask function knows and the attention function wants, kept on the mask itself.

    Attributes:
        plain: The mask is the model's own kind, for its own attention function.
        lefts: Padding on the left of each row, where there is no other padding; None where there is.
    """

    plain: bool = False
    lefts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention that is ours to serve.

    Attributes:
        query: (batch, heads, rows, size), rotated; they belong to the last ``rows`` keys.
        key: (batch, key heads, keys, size), rotated.
        value: (batch, key heads, keys, value size).
        mask: None for plain causal; (batch, keys) bool, true for real tokens; or (batch, heads or 1, rows, keys), bool
            or added, which stands for everything.
        lefts: Padding on the left of each row, if that is all that ``mask`` says.
        places: Positions of queries (batch, rows) and keys (batch, keys), where they are not those of a sequence: the
            caller gave a mask of four dimensions, and so decides on the order.
        rotation: The layer's rotation, or None if it has none.
        scaling: Factor of the scores.
        softcap: See Gemma-2.
        dropout: Share of weights dropped.
        weights: Whether the weights are asked for.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    lefts: tuple[int, ...] | None
    places: tuple[torch.Tensor, torch.Tensor] | None
    rotation: Rotation | None
    scaling: float
    softcap: float | None
    dropout: float
    weights: bool


#: Returns outputs (batch, heads, rows, value size) and weights (batch, heads, rows, keys) or None.
Serve = Callable[[Call], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class Hook:
    """A model's attention while ours stands in front of it.

    Attributes:
        name: The attention implementation's name.
        original: Name of the model's own.
        serve: What answers calls that are ours.
        applies: ``applies(keys, window)``: whether a layer that sees that many keys, through a sliding window of that
            size or None, is ours; else the model's own attention answers, with the mask it expects.
        temperature: Factor of all scores, ours and not.
        seen: Called with the positions in use, once a forward pass.
        rotations: Layer to its rotation; set once they are known.
    """

    name: str
    original: str
    serve: Serve
    applies: Callable[[int, int | None], bool]
    temperature: float = 1.0
    seen: Callable[[int], None] | None = None
    rotations: dict[int, Rotation | None] = field(default_factory=dict)
    _captured: dict[int, torch.Tensor] | None = None

    def mask(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Makes the mask of a forward pass; transformers calls it by keyword, once for each kind of layer."""
        keys, window = kwargs["kv_length"], kwargs.get("local_size")
        offset = kwargs.get("q_offset", 0)
        reach = int(offset) + kwargs["q_length"]
        if self._captured is None and self.seen is not None:
            self.seen(reach)
        if self._captured is not None or not self.applies(keys, window):
            own = ALL_MASK_ATTENTION_FUNCTIONS.get(self.original)
            return _noted(own(*args, **kwargs) if own is not None else None, _Note(plain=True))
        if keys + kwargs.get("kv_offset", 0) != reach:
            raise UserError(
                f"The cache gives attention {keys} places for {reach} tokens: a static cache cannot be served here, "
                f"use the dynamic one (leave cache_implementation out)."
            )
        if kwargs.get("mask_function") is not causal_mask_function or window is not None:
            full = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
            return _noted(full, _Note())
        padding = kwargs.get("attention_mask")
        if padding is None:
            # None is what the model's own attention may get, so ours never does.
            return _noted(torch.ones(1, 1, dtype=torch.bool, device=kwargs.get("device")), _Note(lefts=()))
        begin = kwargs.get("kv_offset", 0)
        padding = padding[:, begin : begin + keys]
        padding = torch.nn.functional.pad(padding, (0, keys - padding.shape[1]))
        return _noted(padding, _Note(lefts=_lefts(padding)))

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Answers a layer: outputs (batch, rows, heads, value size), and weights or None."""
        if self._captured is not None:
            self._captured[module.layer_idx] = query
            return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None
        scale = (query.shape[-1] ** -0.5 if scaling is None else scaling) * self.temperature
        note = getattr(attention_mask, "_modelwright_note", None)
        keys, window = key.shape[2], kwargs.get("sliding_window")
        if (
            attention_mask is None
            or (note is not None and note.plain)
            or (note is None and not self.applies(keys, window))
        ):
            own = self._own(module)
            own_scaling = scaling if self.temperature == 1 else scale
            return own(module, query, key, value, attention_mask, scaling=own_scaling, dropout=dropout, **kwargs)
        if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
            raise UserError("This model adds attention sinks or a position bias to its scores, which is not supported.")
        mask: torch.Tensor | None = attention_mask
        places = None
        if attention_mask.ndim == 2 and (
            # Ours for no padding; the note is lost where layers stand on several devices, the shape is not.
            attention_mask.shape == (1, 1) or (note is not None and note.lefts is not None and not any(note.lefts))
        ):
            mask = None
        elif attention_mask.ndim == 2:
            mask = attention_mask.expand(-1, keys).to(torch.bool)
        elif note is None:  # the caller's own
            mask = attention_mask[..., :keys]
            places = _places(kwargs.get("position_ids"), query.shape[2], keys)
        call = Call(
            query=query, key=key, value=value, mask=mask, lefts=note.lefts if note else None, places=places,
            rotation=self.rotations.get(module.layer_idx), scaling=scale,
            # transformers' sdpa knows no cap; releases that let Gemma-2 use it (5.17) run the model without.
            softcap=None if self.original == "sdpa" else kwargs.get("softcap"), dropout=dropout,
            weights=self.original == "eager" or bool(kwargs.get("output_attentions")),
        )  # fmt: skip
        out, weights = self.serve(call)
        return out.transpose(1, 2).contiguous(), weights

    def _own(self, module: nn.Module) -> Callable[..., Any]:
        if self.original in ALL_ATTENTION_FUNCTIONS:
            return ALL_ATTENTION_FUNCTIONS[self.original]
        for kind in type(module).__mro__:
            # Each family's file has an eager function of its own, which no registry knows.
            if found := getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None):
                return found
        raise UserError(f"{type(module).__name__} has no attention function '{self.original}' that could be called.")

    @torch.no_grad()
    def look(self, decoder: PreTrainedModel, distance: int) -> None:
        """Finds every layer's rotation by reading a few single tokens at position 0 and at a distance.

        Raises:
            UserError: The model cannot be run so, its attention is not replaceable, or it does not rotate.
        """
        table = decoder.get_input_embeddings().weight
        some = torch.linspace(1, table.shape[0] - 1, 4, device=table.device).long()
        ids = torch.cat((some, some))[:, None]
        positions = torch.zeros_like(ids)
        positions[len(some) :] = distance
        training = [module for module in decoder.modules() if module.training]
        self._captured = {}
        try:
            decoder.eval()  # dropout would make the two queries differ
            decoder(input_ids=ids, position_ids=positions, use_cache=False)
            captured = self._captured
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"{type(decoder).__name__} could not be examined: {first_line(error)}") from error
        finally:
            self._captured = None
            for module in training:
                module.training = True
        if not captured:
            raise UserError(
                f"{type(decoder).__name__} does not ask transformers for its attention function, so it cannot be "
                f"given another."
            )
        self.rotations = match(captured, distance, decoder.modules())
        if wrong := sorted(set(captured) - set(self.rotations)):
            raise UserError(
                f"Layer {wrong[0]} of {type(decoder).__name__} changes its queries with the position in a way that is "
                f"no rotation by the frequencies it keeps: this family is not supported."
            )
        if not any(self.rotations.values()):
            raise UserError(
                f"No layer of {type(decoder).__name__} rotates its queries: it is not a model with rotary positions."
            )


def _noted(mask: Any, note: _Note) -> Any:
    if isinstance(mask, torch.Tensor):
        mask._modelwright_note = note  # type: ignore[attr-defined]
    return mask


def _lefts(padding: torch.Tensor) -> tuple[int, ...] | None:
    """Returns how many tokens each row of (batch, keys) is padded by on the left; None if there is other padding."""
    keys = padding.shape[1]
    lefts = keys - padding.sum(-1)
    if not bool((padding == (torch.arange(keys, device=padding.device) >= lefts[:, None])).all()):
        return None
    return tuple(lefts.tolist())


def _places(position_ids: torch.Tensor | None, rows: int, keys: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns positions of the queries and of all keys: those in the cache run up to the first query's."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != rows:
        return None
    cached = position_ids[:, :1] - torch.arange(keys - rows, 0, -1, device=position_ids.device)
    return position_ids, torch.cat((cached, position_ids), dim=1)


@contextlib.contextmanager
def hooked(
    model: PreTrainedModel,
    serve: Serve,
    applies: Callable[[int, int | None], bool],
    *,
    distance: int,
    temperature: float = 1.0,
    seen: Callable[[int], None] | None = None,
) -> Iterator[Hook]:
    """Serves a model's attention by ``serve`` inside the block; see :class:`Hook` for the arguments.

    Args:
        model: A decoder with rotary positions.
        serve: See :class:`Hook`.
        applies: See :class:`Hook`.
        distance: Positions by which rotations are examined, at least 1.
        temperature: See :class:`Hook`.
        seen: See :class:`Hook`.

    Raises:
        UserError: The model has no rotary positions, has ALiBi, or cannot be hooked.
    """
    check_rotary(model)
    decoder = model.get_decoder()
    config = decoder.config
    if is_changed(model):
        raise UserError("This model's positions are changed by another context already: leave that one first.")
    own = copy.deepcopy(config)
    hook = Hook(
        name=f"{_PREFIX}{next(_NUMBERS)}", original=config._attn_implementation or "eager",
        serve=serve, applies=applies, temperature=temperature, seen=seen,
    )  # fmt: skip
    own._attn_implementation_internal = hook.name
    holders = [module for module in model.modules() if module.__dict__.get("config") is config]
    AttentionInterface.register(hook.name, hook.attention)
    AttentionMaskInterface.register(hook.name, hook.mask)
    for module in holders:
        module.config = own
    try:
        hook.look(decoder, distance)
        yield hook
    finally:
        for module in holders:
            if module.config is own:
                module.config = config
        AttentionInterface._global_mapping.pop(hook.name, None)
        AttentionMaskInterface._global_mapping.pop(hook.name, None)
