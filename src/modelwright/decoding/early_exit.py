"""What the model would say after some of its layers: for decodings that compare layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modelwright.decoding.contrast import as_float
from modelwright.errors import UserError
from modelwright.models.roles import roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EarlyExit:
    """The model's head behind one of its layers.

    Args:
        model: A causal language model.
        norm: Whether the final norm stands before the head. The official codes of DoLa and of activation decoding
            leave it out.
        like: See :func:`~modelwright.models.roles.roles`.
    """

    def __init__(self, model: PreTrainedModel, *, norm: bool = False, like: str | None = None) -> None:
        parts = roles(model, like=like)
        self.layers = len(parts.layers)
        self.head: nn.Module = parts.head
        self.norm: nn.Module | None = parts.final_norm if norm else None
        self.vocabulary = int(parts.model.get_output_embeddings().weight.shape[0])
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def check(self, layer: int) -> None:
        """Refuses a layer that the model has not.

        Raises:
            UserError: It has not.
        """
        if not 0 <= layer < self.layers:
            raise UserError(f"Layer {layer} is no early one: give 0 (the embedding) to {self.layers - 1}.")

    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns logits ``(…, V)`` in float32 or float64 of hidden states ``(…, width)`` behind a layer."""
        logits: Any = self.head(hidden if self.norm is None else self.norm(hidden))
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return as_float(logits)
