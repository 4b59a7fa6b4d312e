"""One decoder layer's keys and values on the staircase: precision falls with age, a level at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from modelwright.attention.saq.stored import StoredStates
from modelwright.errors import UserError
from modelwright.kernels.packed import Packed, quantise
from modelwright.kernels.packed_attention import Held

#: Segments that are quantised together, so that a long prompt is not held in float32.
_AT_A_TIME = 32


class StaircaseLayer(CacheLayerMixin):
    """Keys and values of a layer: the newest tokens as they came, older segments in fewer and fewer bits.

    When ``segment_length`` tokens have gathered they become a segment of ``levels[1]`` bits, and each segment that was
    there before ages by one level: it is dequantised and requantised, once, until it has ``levels[-1]`` bits; those
    that have are never touched again. The state depends on the tokens alone, not on how many came at a time.

    A call attends to what was held when it began, and to its own tokens as they came; only then do segments age. (The
    paper's listing leaves the order open. So no token attends to itself in fewer bits, a prompt of one call is read
    exactly, as KIVI does it too, and up to a segment's length nothing differs from a dynamic cache.)

    Attributes:
        levels: Bits by age; the first is 16, the tokens as they came, whatever their dtype.
        segment_length: S, tokens of a segment.
        group_size: G, tokens (of keys) or channels (of values) that share a scale.
        metadata: Of scales and minima.
        old: The keys and the values of ``levels[-1]`` bits, or None.
        young: Keys and values of the segments above that, from the oldest on.
        keys: Keys that are not quantised, (batch, heads, under ``segment_length`` tokens, size).
        values: The same of values.
    """

    is_sliding = False
    # A rollback over the end of a segment cannot bring lost bits back.
    is_croppable = False

    def __init__(
        self,
        levels: Sequence[int] = (16, 8, 4, 2),
        segment_length: int = 128,
        group_size: int = 32,
        metadata: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.levels, self.segment_length, self.group_size = tuple(levels), segment_length, group_size
        self.metadata = metadata
        self.old: tuple[Packed, Packed] | None = None
        self.young: list[tuple[Packed, Packed]] = []

    @property
    def segments(self) -> list[tuple[Packed, Packed]]:
        """All that is packed, from the oldest on."""
        return ([] if self.old is None else [self.old]) + self.young

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first states, and empties the layer.

        Raises:
            UserError: The group size does not divide the size of a value.
        """
        if len(self.levels) > 1 and value_states.shape[-1] % self.group_size:
            raise UserError(
                f"Values of this model have {value_states.shape[-1]} channels, which groups of {self.group_size} do "
                f"not divide: give a group_size that does."
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens, and returns all keys and values that they attend to.

        Args:
            key_states: (batch, key heads, new tokens, size), rotated already where the model rotates.
            value_states: The same of values.
            *args: Not used.
            **kwargs: Not used.

        Returns:
            Keys and values (batch, key heads, all tokens, size). As long as nothing is packed these are plain tensors;
            then tensors that are dequantised when they are used: see
            :class:`~modelwright.attention.saq.stored.StoredStates`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = torch.cat((self.keys, key_states), 2), torch.cat((self.values, value_states), 2)
        packed = self.segments
        whole = 0 if len(self.levels) == 1 else keys.shape[2] // self.segment_length
        if whole:
            end = whole * self.segment_length
            self._append(keys[:, :, :end], values[:, :, :end])
            self.keys, self.values = keys[:, :, end:].clone(), values[:, :, end:].clone()
        else:
            self.keys, self.values = keys, values
        if not packed:
            return keys, values
        return (
            StoredStates.of(Held(tuple(k for k, _ in packed), keys)),
            StoredStates.of(Held(tuple(v for _, v in packed), values)),
        )

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Makes whole segments of the tokens, and lets all that is held age."""
        whole, last = keys.shape[2] // self.segment_length, len(self.levels) - 1
        old = [] if self.old is None else [self.old]
        young: list[tuple[Packed, Packed]] = []
        for age, pair in zip(range(whole + len(self.young), whole, -1), self.young, strict=True):
            (old if age >= last else young).append(self._down(pair, self._bits(age)))
        # Of the new segments all that go down to the last level at once do so together.
        deep = max(0, whole - last + 1)
        for begin, end in [(0, deep), *((i, i + 1) for i in range(deep, whole))]:
            if end > begin:
                age = whole - end + 1
                (old if age >= last else young).append(self._fresh(keys, values, begin, end, self._bits(age)))
        self.old, self.young = _joined(old) if old else None, young

    def _bits(self, age: int) -> int:
        """Returns the bits of the age-th most recent segment, from 1."""
        return self.levels[min(age, len(self.levels) - 1)]

    def _fresh(self, keys: Tensor, values: Tensor, begin: int, end: int, bits: int) -> tuple[Packed, Packed]:
        """Quantises new segments, a few at a time, down the levels to ``bits``."""

        def quantised(x: Tensor, along: Literal["tokens", "channels"], at: int, until: int) -> Packed:
            part = x[:, :, at * self.segment_length : until * self.segment_length]
            part = part.reshape(*x.shape[:2], until - at, self.segment_length, x.shape[3])
            return quantise(part, self.levels[1], self.group_size, along, self.metadata)

        pieces = []
        for at in range(begin, end, _AT_A_TIME):
            until = min(end, at + _AT_A_TIME)
            pair = quantised(keys, "tokens", at, until), quantised(values, "channels", at, until)
            pieces.append(self._down(pair, bits))
        return _joined(pieces)

    def _down(self, pair: tuple[Packed, Packed], bits: int) -> tuple[Packed, Packed]:
        """Takes every level between the pair's and ``bits``, as if a segment had come for each."""
        for level in self.levels[1:]:
            if bits <= level < pair[0].bits:
                pair = pair[0].at(level), pair[1].at(level)
        return pair

    def get_seq_length(self) -> int:
        """Returns how many tokens are held."""
        if not self.is_initialized:
            return 0
        assert self.keys is not None
        return sum(keys.tokens for keys, _ in self.segments) + int(self.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns how many keys a call of some queries sees, and the first one's number."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1: there is no bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, by the name that older versions of transformers ask for."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Takes tokens out again, the newest first.

        Where that cuts through a segment, what is left of it is dequantised; lost bits do not come back, so segments
        may then have fewer bits than their age asks for, until it catches up.

        Args:
            tokens_to_remove: How many, as a number below 0, as in transformers.

        Raises:
            ValueError: The number is above 0.
            UserError: There are not so many tokens.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}.")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        keep = self.get_seq_length() + tokens_to_remove
        if keep < 0:
            raise UserError(f"The cache holds {keep - tokens_to_remove} tokens: {-tokens_to_remove} cannot be removed.")
        assert self.keys is not None
        assert self.values is not None
        packed = sum(keys.tokens for keys, _ in self.segments)
        if keep >= packed:
            self.keys, self.values = (
                self.keys[:, :, : keep - packed].clone(),
                self.values[:, :, : keep - packed].clone(),
            )
            return
        whole, left = divmod(keep, self.segment_length)
        empty = self.keys[:, :, :0], self.values[:, :, :0]
        old, young = self.old, []
        begin = 0
        for pair in self.segments:
            end = begin + pair[0].segments
            if begin <= whole < end and left:
                opened = (part.cut(whole - begin, whole - begin + 1).dequantised(self.dtype) for part in pair)
                empty = tuple(states[:, :, :left].clone() for states in opened)  # type: ignore[assignment]
            if pair is self.old:
                old = _cut(pair, whole)
            elif end <= whole:
                young.append(pair)
            begin = end
        self.old, self.young, (self.keys, self.values) = old, young, empty

    def reset(self) -> None:
        """Forgets all tokens."""
        self.old, self.young, self.keys, self.values = None, [], None, None  # type: ignore[assignment]
        self.is_initialized = False

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes every tensor that is held alike, along the rows of the batch (their first dimension)."""
        if not self.is_initialized:
            return
        if self.old is not None:
            self.old = self.old[0].map(change), self.old[1].map(change)
        self.young = [(keys.map(change), values.map(change)) for keys, values in self.young]
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = change(self.keys), change(self.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows of the beams that go on; (rows,) int64."""
        self.change_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch; (rows,) int64 or bool."""
        self.change_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes each row so many rows, side by side."""
        self.change_rows(lambda t: t.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Moves all to the CPU."""
        self.change_rows(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves all back to where the states came from."""
        self.change_rows(lambda t: t.to(self.device, non_blocking=True))


def _cut(pair: tuple[Packed, Packed], segments: int) -> tuple[Packed, Packed] | None:
    if segments >= pair[0].segments:
        return pair
    return (pair[0].cut(0, segments), pair[1].cut(0, segments)) if segments else None


def _joined(pairs: Sequence[tuple[Packed, Packed]]) -> tuple[Packed, Packed]:
    """Joins pairs of the same bits along segments."""
    if len(pairs) == 1:
        return pairs[0]
    keys, values = zip(*pairs, strict=True)
    return _cat(keys), _cat(values)


def _cat(parts: Sequence[Packed]) -> Packed:
    # Autocast knows no float16 on a CPU, and would not join it.
    with torch.autocast(parts[0].codes.device.type, enabled=False):
        codes, scale, minimum = (
            torch.cat([getattr(part, n) for part in parts], 2) for n in ("codes", "scale", "minimum")
        )
    return replace(parts[0], codes=codes, scale=scale, minimum=minimum)
