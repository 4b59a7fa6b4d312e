"""`modelwright generate --cache saq`, ``kivi-2``, ``kivi-4``: the caches by name, with their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class SaqOptions:
    """The staircase cache; see :class:`~modelwright.attention.saq.StaircaseQuantizedCache`.

    Attributes:
        levels: Bits by age, falling from 16.
        segment_length: Tokens of a segment.
        group_size: Numbers that share a scale.
    """

    levels: Annotated[tuple[int, ...], Arg("Bits by age, falling from 16.")] = (16, 8, 4, 2)
    segment_length: Annotated[int, Arg("Tokens of a segment.")] = 128
    group_size: Annotated[int, Arg("Numbers that share a scale.")] = 32

    def for_generate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Returns what ``generate`` is given for one batch.

        Raises:
            UserError: A value makes no sense, or the model does not go with it.
        """
        from modelwright.attention.saq.cache import StaircaseQuantizedCache

        cache = StaircaseQuantizedCache(model.config, self.levels, self.segment_length, self.group_size)
        return {"past_key_values": cache}


@dataclass(frozen=True, kw_only=True)
class _KiviOptions:
    bits: Annotated[int, Arg("Bits of a code: 8, 4, 2 or 1.")]
    residual_length: Annotated[int, Arg("Tokens that are not quantised, at most.")] = 128
    group_size: Annotated[int, Arg("Numbers that share a scale.")] = 32

    def for_generate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Returns what ``generate`` is given for one batch.

        Raises:
            UserError: A value makes no sense, or the model does not go with it.
        """
        from modelwright.attention.saq.cache import KiviCache

        return {"past_key_values": KiviCache(model.config, self.bits, self.residual_length, self.group_size)}


@dataclass(frozen=True, kw_only=True)
class Kivi2Options(_KiviOptions):
    """KIVI in 2 bits; see :class:`~modelwright.attention.saq.KiviCache`."""

    bits: Annotated[int, Arg("Bits of a code: 8, 4, 2 or 1.")] = 2


@dataclass(frozen=True, kw_only=True)
class Kivi4Options(_KiviOptions):
    """KIVI in 4 bits; see :class:`~modelwright.attention.saq.KiviCache`."""

    bits: Annotated[int, Arg("Bits of a code: 8, 4, 2 or 1.")] = 4
