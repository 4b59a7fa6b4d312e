"""Whether a model's positions are rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_rotary(model: PreTrainedModel) -> None:
    """Refuses a model whose positions are no rotation.

    Raises:
        UserError: It has ALiBi, or no frequencies of a rotary embedding.
    """
    decoder = model.get_decoder()
    if getattr(decoder.config, "alibi", False):
        raise UserError(f"{type(model).__name__} tells positions by ALiBi, not by rotation.")
    if not any("inv_freq" in name for module in decoder.modules() for name, _ in module.named_buffers(recurse=False)):
        raise UserError(
            f"{type(model).__name__} has no rotary position embedding (its positions are learned, or it has none)."
        )
