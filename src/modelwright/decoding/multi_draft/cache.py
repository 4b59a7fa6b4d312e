"""The key/value cache of several sequences of different lengths, from which rejected tokens are taken out again.

Sequences end at the same column, as left-padded prompts do: sequence b fills the last ``held[b]`` columns. So whatever
reads the cache with a two-dimensional mask sees nothing unusual.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from modelwright.errors import UserError
from modelwright.models.caches import BaseQuantizedLayer

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def check_cache(cache: Any, model: PreTrainedModel) -> None:
    """Refuses a cache from which tokens cannot be taken out exactly.

    Raises:
        UserError: It is static, quantized, sliding, a recurrent state, or none at all.
    """
    name = type(model).__name__
    layers = getattr(cache, "layers", None)
    if layers is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise UserError(
            f"{name} gives no key/value cache of tokens (use_cache is off, or its state is recurrent): rejected drafts "
            "could not be taken back, so multi-draft decoding does not work with it."
        )
    if any(getattr(cache, "is_sliding", [])):
        raise UserError(
            f"The cache given to {name} has sliding windows, which forgot what a rejected draft would need again: "
            "leave out past_key_values and cache_implementation."
        )
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or isinstance(layer, BaseQuantizedLayer):
            raise UserError(
                f"Multi-draft decoding needs a dynamic cache, not one with layers of the kind {type(layer).__name__}: "
                "leave out cache_implementation and past_key_values."
            )
    if getattr(cache, "offloading", False):
        raise UserError("Multi-draft decoding does not work with an offloaded cache: leave out cache_implementation.")


def without_windows(cache: Any) -> Any:
    """Returns a cache that keeps every key in place of an empty dynamic one with sliding windows.

    The windows are then the mask's alone, so that rejected tokens can be taken out; it needs the memory of full
    attention.
    """
    layers = getattr(cache, "layers", [])
    # Static caches can be sliding too, and stay for check_cache to refuse.
    plain = all(isinstance(layer, DynamicLayer) and not isinstance(layer, BaseQuantizedLayer) for layer in layers)
    if any(getattr(cache, "is_sliding", [])) and plain and cache.get_seq_length() == 0:
        return DynamicCache()
    return cache


def full_cache(model: PreTrainedModel) -> Any:
    """Returns an empty cache of the kind that a model needs, without sliding windows."""
    return without_windows(DynamicCache(config=model.config.get_text_config(decoder=True)))


def windows_of(cache: Any) -> float:
    """Returns the shortest sliding window of a cache's layers, in tokens; infinity if there is none."""
    layers = getattr(cache, "layers", [])
    return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=math.inf)


class Kept:
    """A cache with the number of tokens that each sequence has in it.

    Args:
        cache: A dynamic cache.
        held: Tokens of each sequence in it: the last columns.
    """

    def __init__(self, cache: Cache, held: Sequence[int]) -> None:
        self.cache = cache
        self.held = list(held)

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return int(self.cache.get_seq_length())

    @property
    def full(self) -> bool:
        """Whether all columns of all sequences are held, so that there is no padding."""
        return min(self.held) == self.width

    def mask(self, new: Tensor) -> Tensor:
        """Returns the two-dimensional mask ``(rows, width + n)`` of what is held and of new columns ``(rows, n)``."""
        if self.full:
            return torch.cat([new.new_ones(len(self.held), self.width), new], 1)
        columns = torch.arange(self.width, device=new.device)
        first = torch.tensor([self.width - h for h in self.held], device=new.device)
        return torch.cat([(columns >= first[:, None]).to(new.dtype), new], 1)

    def commit(self, rows: Sequence[int], new: Sequence[Sequence[int]], count: int) -> None:
        """Keeps some rows and, of the columns that were just added, some; in place.

        Args:
            rows: Row of the cache for each sequence that stays, in ascending order of ``held``'s sequences.
            new: For each of them the added columns that stay, counted from the first added one, ascending.
            count: Columns that were added.
        """
        width = self.width - count
        held = [old + len(columns) for old, columns in zip(self.held, new, strict=True)]
        same_rows = list(rows) == list(range(self._rows()))
        if len(rows) == 1:
            if not same_rows:
                self.cache.batch_select_indices(torch.tensor(list(rows), device=self._device()))
            self._keep_tail(width, list(new[0]), count)
        elif same_rows and all(list(c) == list(range(len(c))) and len(c) == len(new[0]) for c in new):
            self.cache.crop(len(new[0]) - count)
        elif not (same_rows and width == 0 and all(list(c) == list(range(count - len(c), count)) for c in new)):
            index = torch.zeros(len(rows), max(held), dtype=torch.long)
            for b, (old, columns) in enumerate(zip(self.held, new, strict=True)):
                index[b, max(held) - held[b] :] = torch.tensor(
                    [*range(width - old, width), *(width + c for c in columns)], dtype=torch.long
                )
            self._gather(torch.tensor(list(rows)), index)
        self.held = held

    def select(self, sequences: Sequence[int]) -> None:
        """Keeps some of the sequences, and no more columns than the longest of them needs."""
        if list(sequences) != list(range(len(self.held))):
            self.cache.batch_select_indices(torch.tensor(list(sequences), device=self._device()))
            self.held = [self.held[s] for s in sequences]
        spare = self.width - max(self.held)
        if spare > 0:
            for layer in self._layers():
                layer.keys, layer.values = layer.keys[..., spare:, :], layer.values[..., spare:, :]

    def _layers(self) -> list[Any]:
        return [layer for layer in self.cache.layers if layer.is_initialized and layer.keys is not None]

    def _rows(self) -> int:
        return int(self._layers()[0].keys.shape[0])

    def _device(self) -> torch.device:
        return self._layers()[0].keys.device

    def _keep_tail(self, width: int, columns: list[int], count: int) -> None:
        # The first columns are often in place already.
        kept = next((i for i, column in enumerate(columns) if i != column), len(columns))
        if kept < len(columns):
            sources: dict[torch.device, Tensor] = {}
            target = slice(width + kept, width + len(columns))
            for layer in self._layers():
                device = layer.keys.device
                if device not in sources:
                    sources[device] = torch.tensor(columns[kept:], device=device) + width
                for kind in (layer.keys, layer.values):
                    kind[..., target, :] = kind.index_select(-2, sources[device])
        self.cache.crop(len(columns) - count)

    def _gather(self, rows: Tensor, index: Tensor) -> None:
        for layer in self._layers():
            at = index.to(layer.keys.device)
            row = rows.to(layer.keys.device)[:, None]
            layer.keys = layer.keys.transpose(1, 2)[row, at].transpose(1, 2)
            layer.values = layer.values.transpose(1, 2)[row, at].transpose(1, 2)


class Forward:
    """Calls a causal language model on several tokens of several sequences behind a cache.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = set(inspect.signature(model.forward).parameters)
        self.calls = 0

    def __call__(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, *, last: bool = False
    ) -> Tensor:
        """Returns logits ``(rows, n, V)``, or ``(rows, 1, V)`` of the last tokens if ``last``.

        Args:
            ids: Tokens ``(rows, n)``.
            mask: ``(rows, width + n)``, or ``(rows, 1, n, width + n)`` as the attention function takes it; None where
                nothing is padding.
            positions: Position of each token, ``(rows, n)``.
            cache: Is grown by n columns.
            last: Whether only the last column is needed.
        """
        options: dict[str, Any] = {}
        if "position_ids" in self.names:
            options["position_ids"] = positions
        if "logits_to_keep" in self.names:
            options["logits_to_keep"] = 1 if last else 0
        self.calls += 1
        found = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, **options
        )
        logits: Tensor = found.logits
        return logits[:, -1:] if last else logits
