"""The staircase cache of a model, KIVI as its two-level case, and what they weigh."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from modelwright.attention.saq.layer import StaircaseLayer
from modelwright.attention.saq.memory import Level
from modelwright.attention.saq.stored import StoredStates
from modelwright.errors import UserError
from modelwright.kernels.packed import BITS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Most tokens of a segment: far more than makes sense, but the bytes of a row must be counted in an int32.
_LONGEST = 1 << 16


class StaircaseQuantizedCache(Cache):
    """A key/value cache whose precision falls in steps with age: staircase adaptive quantisation, SAQ.

    Source: arXiv 2410.18441, its listing of SAQ. The newest tokens, fewer than ``segment_length``, are held as they
        came. Of the full segments before them the i-th
    most recent has ``levels[min(i, len(levels) - 1)]`` bits. Keys are quantised per channel in groups of ``group_size``
    tokens, values per token in groups of ``group_size`` channels, with the group's minimum and its range as scale
    (KIVI's scheme); codes are packed into bytes. A segment is requantised only when it steps down a level, from what it
    had become: no original is kept.

    Errors of the paper's listing that are mended here: in its last branch the oldest group is dequantised with bits of
    an index that is out of scope (it has the last level's); and that group is rewritten in the same bits at every step,
    which changes nothing and costs the whole cache: here it is left alone.

    Give it to ``model.generate(..., past_key_values=cache)`` or to the model; a cache serves one batch of sequences. A
    decoding step with ``sdpa`` attention (what transformers uses by default) or with
    ``attn_implementation="staircase"`` reads packed states directly; with any other implementation they are dequantised
    for the step, a layer at a time.

    Args:
        config: The model's config.
        levels: Bits by age, falling; the first is 16 and means tokens as they came, in the model's own dtype. ``(16,)``
            quantises nothing.
        segment_length: S: tokens of a segment, and of what is held unquantised at most, less one.
        group_size: G: divides the segment length and the size of a head.
        metadata: Dtype of scales and minima, torch.float16 or torch.float32; keys and values beyond its range are held
            as its bounds.

    Raises:
        UserError: A value makes no sense, or the model does not attend to all tokens in all layers.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        levels: Sequence[int] = (16, 8, 4, 2),
        segment_length: int = 128,
        group_size: int = 32,
        metadata: torch.dtype = torch.float16,
    ) -> None:
        config = config.get_text_config(decoder=True)
        self.levels, self.segment_length, self.group_size = check_steps(levels, segment_length, group_size)
        check_model(config, group_size if len(self.levels) > 1 else 1)
        if metadata not in (torch.float16, torch.float32):
            raise UserError(f"metadata is {metadata}: give torch.float16 or torch.float32.")
        steps = self.levels, segment_length, group_size, metadata
        super().__init__(layers=[StaircaseLayer(*steps) for _ in range(config.num_hidden_layers)])
        self._config = config

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a layer's tokens, and returns all its keys and values: see :meth:`StaircaseLayer.update`."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if getattr(self._config, "_attn_implementation", None) == "flex_attention":
            # It is compiled, and compiled code takes plain tensors only.
            keys, values = (s.dequantised() if isinstance(s, StoredStates) else s for s in (keys, values))
        return keys, values

    def memory_by_level(self) -> list[Level]:
        """Returns tokens and bytes of each number of bits in use, the most bits first, of all layers together."""
        found: dict[int, list[int]] = {}
        for number, layer in enumerate(self._filled()):
            size = layer.keys.element_size()
            rows = [(16, layer.keys.shape[2], *[layer.keys.nbytes + layer.values.nbytes] * 2)]
            for pair in layer.segments:
                elements = sum(part.codes.numel() * 8 // part.bits for part in pair)
                rows.append((pair[0].bits, pair[0].tokens, sum(part.bytes for part in pair), elements * size))
            for bits, tokens, *sizes in rows:
                level = found.setdefault(bits, [0, 0, 0])
                level[0] += 0 if number else tokens  # the same in every layer
                level[1:] = (a + b for a, b in zip(level[1:], sizes))
        return [Level(bits, *numbers) for bits, numbers in sorted(found.items(), reverse=True)]

    def _filled(self) -> list[StaircaseLayer]:
        # Others may lay something of their own into a cache: SERAC, what it decided about a row.
        return [layer for layer in self.layers if isinstance(layer, StaircaseLayer) and layer.is_initialized]

    def memory_bytes(self) -> int:
        """Returns the bytes of all tensors that are held: codes, scales and minima, and what is not quantised."""
        return sum(level.bytes for level in self.memory_by_level())

    def bits_per_element(self, *, metadata: bool = True) -> float:
        """Returns the mean number of bits that a number of a key or value takes; 0 of an empty cache.

        Args:
            metadata: Whether scales and minima count.
        """
        bits = elements = 0
        for layer in self._filled():
            for states in (layer.keys, layer.values):
                bits += 8 * states.nbytes
                elements += states.numel()
            for part in (part for pair in layer.segments for part in pair):
                codes = part.codes.numel() * 8
                bits += 8 * part.bytes if metadata else codes
                elements += codes // part.bits
        return bits / elements if elements else 0.0

    def segment_bits(self, layer: int = 0) -> list[int]:
        """Returns the bits of a layer's segments, the oldest first."""
        return [keys.bits for keys, _ in self.layers[layer].segments for _ in range(keys.segments)]

    def __repr__(self) -> str:
        """Says levels, and what is held."""
        return (
            f"{type(self).__name__}(levels={self.levels}, segment_length={self.segment_length}, "
            f"group_size={self.group_size}, tokens={self.get_seq_length()}, bytes={self.memory_bytes()})"
        )


class KiviCache(StaircaseQuantizedCache):
    """KIVI (arXiv 2402.02750) in the same frame: a residual and one level.

    Its keys are KIVI's. Of the values KIVI keeps exactly ``residual_length`` unquantised and quantises the oldest of
    them with every new one; here they are quantised together with the keys of the same tokens, so that the staircase
    and its two-level case differ in levels alone. As published it holds some more bits and is a few percent more exact.

    Args:
        config: The model's config.
        bits: 2 or 4 (or 8 or 1).
        residual_length: R: unquantised tokens at most; KIVI's default.
        group_size: G: KIVI's default.

    Raises:
        UserError: As :class:`StaircaseQuantizedCache`.
    """

    def __init__(
        self, config: PreTrainedConfig, bits: int = 2, residual_length: int = 128, group_size: int = 32
    ) -> None:
        super().__init__(config, (16, bits), residual_length, group_size)


def check_steps(levels: Sequence[int], segment_length: int, group_size: int) -> tuple[tuple[int, ...], int, int]:
    """Returns levels, segment length and group size as given, if they make sense.

    Raises:
        UserError: They do not.
    """
    levels = tuple(levels)
    for name, value in (("segment_length", segment_length), ("group_size", group_size)):
        if type(value) is not int or not 1 <= value <= _LONGEST:
            raise UserError(f"{name} is {value!r}: give a whole number from 1 to {_LONGEST}.")
    if not levels or levels[0] != 16:
        raise UserError(f"levels are {levels}: the first must be 16, which stands for tokens as they came.")
    if unknown := [bits for bits in levels[1:] if type(bits) is not int or bits not in BITS]:
        raise UserError(f"levels are {levels}: {unknown[0]!r} bits cannot be packed; give 8, 4, 2 or 1 after 16.")
    if any(a <= b for a, b in itertools.pairwise(levels)):
        raise UserError(f"levels are {levels}: bits must fall with age, such as (16, 8, 4, 2).")
    if segment_length % group_size:
        raise UserError(
            f"A segment of {segment_length} tokens cannot be cut into groups of {group_size}: give a group_size that "
            f"divides segment_length."
        )
    if segment_length * min(levels) % 8:
        raise UserError(
            f"A segment of {segment_length} tokens in {min(levels)} bits does not fill whole bytes: give a "
            f"segment_length that is a multiple of {8 // min(levels)}."
        )
    return levels, segment_length, group_size


def check_model(config: PreTrainedConfig, group_size: int) -> None:
    """Refuses a model whose layers do not all attend to all tokens, or whose heads the groups do not divide.

    Raises:
        UserError: It is one.
    """
    name = getattr(config, "model_type", type(config).__name__)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (not kinds and window and getattr(config, "use_sliding_window", True))
    if slides:
        raise UserError(
            f"A {name} model with a sliding window of {window} tokens forgets old tokens by itself, so there is no "
            f"staircase for it: use the model's own cache, or a checkpoint without a window."
        )
    heads = getattr(config, "num_attention_heads", None)
    if other := kinds - {"full_attention"} or ({"recurrent"} if not heads else set()):
        raise UserError(
            f"The staircase cache is for models with full attention in all layers; {name} has others ({min(other)}): "
            f"use the model's own cache."
        )
    size = int(getattr(config, "head_dim", None) or config.hidden_size // (heads or 1))
    if size % group_size:
        good = _divisor(size, group_size)
        raise UserError(
            f"Heads of {name} have {size} channels, which groups of {group_size} do not divide: give a group_size that "
            f"does, such as {good} (--cache 'NAME: {{group_size: {good}}}')."
        )


def _divisor(size: int, most: int) -> int:
    return max(n for n in range(1, min(size, most) + 1) if size % n == 0)
