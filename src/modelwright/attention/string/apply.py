"""STRING on a Hugging Face model: a context manager that leaves the model as it was, bit for bit."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from modelwright.attention.rotary import check_rotary
from modelwright.attention.string.hook import Hook, hooked
from modelwright.attention.string.serve import serve
from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What the official code multiplies cosines and sines of queries and keys by, though the paper's equations do not.
OFFICIAL_FACTOR = 0.1 * math.log(2) + 1


@dataclass(frozen=True, kw_only=True)
class StringConfig:
    """How far keys are shifted.

    Attributes:
        shift: Distance from which keys are brought nearer: tokens if a whole number, a share of the training length if
            a fraction. None is a third of the training length. The paper recommends a third to a half.
        window: Positions that stay reserved for a token's true neighbours; 32 at least is recommended, 128 is the
            paper's, and 512 is the official advice where generated text is not fluent.
        attention_factor: What cosines and sines are multiplied by, so that all scores grow by its square. 1 is the
            paper's equations; ``official`` is the 1.0693 of the official code. It is taken as a factor of the whole
            score, also where only a part of a head rotates, and also for prompts that the shift does not reach.
        training_length: Positions that the model was trained on; by default its config's ``max_position_embeddings``.
    """

    shift: Annotated[float | None, Arg("Shift in tokens, or as a fraction of the training length; a third.")] = None
    window: Annotated[int, Arg("Positions kept for true neighbours.")] = 128
    attention_factor: Annotated[float | Literal["official"], Arg("1 (the paper), or official (1.0693).")] = 1.0
    training_length: Annotated[int | None, Arg("Positions the model was trained on, if its config is wrong.")] = None

    def apply(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[AppliedString]:
        """Returns :func:`apply_string` of the model and these options."""
        return apply_string(model, self)

    def resolve(self, model: PreTrainedModel) -> tuple[int, float, int]:
        """Returns the shift in tokens, the attention factor and the training length.

        Raises:
            UserError: A value is out of range for the model.
        """
        length = self.training_length
        if length is None:
            length = getattr(model.get_decoder().config, "max_position_embeddings", None)
        elif isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise UserError(f"training_length is {length!r}: give the tokens of a training sequence, at least 2.")
        if not isinstance(length, int) or length < 2:
            raise UserError(
                f"{type(model).__name__} does not say how many positions it was trained on: give training_length."
            )
        shift = self.shift
        if shift is None:
            shift = length // 3
        elif isinstance(shift, bool) or (isinstance(shift, float) and not 0 < shift < 1):
            raise UserError(
                f"shift is {shift}: give a fraction between 0 and 1 of the training length, or whole tokens as an int."
            )
        elif isinstance(shift, float):
            shift = int(shift * length)
        if not 0 <= shift < length:
            raise UserError(f"shift is {shift} tokens: give at least 0 and less than the training length of {length}.")
        if type(self.window) is not int or not 0 <= self.window <= shift:
            raise UserError(
                f"window is {self.window}: give whole tokens from 0 to at most the shift, which is {shift} tokens."
            )
        factor = OFFICIAL_FACTOR if self.attention_factor == "official" else self.attention_factor
        if not isinstance(factor, (int, float)) or not (factor > 0 and math.isfinite(factor)):
            raise UserError(f"attention_factor is {factor!r}: give a number above 0, or 'official'.")
        return int(shift), float(factor), length


@dataclass(frozen=True)
class AppliedString:
    """STRING as it stands on a model.

    Attributes:
        shift: In tokens.
        window: In tokens.
        attention_factor: As a number.
        training_length: In tokens.
        layers: Layers whose queries rotate, which it can change.
    """

    shift: int
    window: int
    attention_factor: float
    training_length: int
    layers: tuple[int, ...]

    def largest_position(self, length: int) -> int:
        """Returns the largest relative position that a prompt of a length uses."""
        if length <= self.shift:
            return length - 1
        return max(self.shift - 1, length - 1 - self.shift + self.window)


@contextlib.contextmanager
def apply_string(model: PreTrainedModel, config: StringConfig | None = None) -> Iterator[AppliedString]:
    """Shifts far positions of one model inside the block; section 4 of the paper.

    Keys, values and the cache are untouched, so a cache filled inside may be used outside and the other way round. As
    long as no more than ``shift`` tokens are in sight, the model's own attention runs: with an attention factor of 1
    the outputs are the same bits. Layers with a sliding window of at most ``shift`` are left alone (if all are, that is
    said in a warning); a wider window is intersected with STRING's parts.

    Distances are counted by place in the sequence, so padding, packing and chunks are right. A caller who passes a mask
    of four dimensions decides on the order of tokens, so then they are counted by ``position_ids``.

    Args:
        model: A causal language model with rotary positions, from transformers.
        config: How far; a third of the training length by default.

    Yields:
        What was applied.

    Raises:
        UserError: The model has no rotary positions, or has ALiBi; a value is out of range; the factor would be applied
            on top of the model's own (YaRN); later, in a forward pass: a static cache.
    """
    config = config or StringConfig()
    check_rotary(model)
    shift, factor, length = config.resolve(model)
    window = config.window
    if factor != 1:
        _check_own_factor(model)
    told: list[int] = []

    def applies(keys: int, sliding: int | None) -> bool:
        return keys > shift and (sliding is None or sliding > shift)

    def seen(reach: int) -> None:
        if reach > length and not told:
            told.append(reach)
            warnings.warn(
                f"{reach} tokens are more than the {length} positions that {type(model).__name__} was made for: STRING "
                f"makes better use of trained positions, it does not add any.",
                stacklevel=2,
            )

    distance = (shift - window) or max(1, shift)
    with hooked(
        model, partial(serve, shift=shift, window=window), applies, distance=distance, temperature=factor**2, seen=seen
    ) as hook:
        _warn_if_nothing(model, shift, hook)
        layers = tuple(sorted(layer for layer, rotation in hook.rotations.items() if rotation is not None))
        yield AppliedString(shift, window, factor, length, layers)


def _check_own_factor(model: PreTrainedModel) -> None:
    for module in model.get_decoder().modules():
        for name, value in vars(module).items():
            if name.endswith("attention_scaling") and isinstance(value, (int, float)) and value != 1:
                raise UserError(
                    f"{type(model).__name__} scales its rotary embedding by {value:.4g} already (YaRN and its like): "
                    f"leave attention_factor at 1."
                )


def _warn_if_nothing(model: PreTrainedModel, shift: int, hook: Hook) -> None:
    config = model.get_decoder().config
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    all_slide = (
        all(kind == "sliding_attention" for kind in kinds) if kinds else getattr(config, "use_sliding_window", True)
    )
    if isinstance(window, int) and 0 < window <= shift and all_slide:
        warnings.warn(
            f"Every layer of {type(model).__name__} sees {window} tokens at most, which a shift of {shift} does not "
            f"reach: STRING changes nothing.",
            stacklevel=4,
        )
