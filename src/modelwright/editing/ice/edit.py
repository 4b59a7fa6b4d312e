"""Facts that stand before a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from modelwright.editing.edit import Edit
from modelwright.editing.requests import EditRequest


class ContextEdit(Edit):
    """Facts that :meth:`prompt` puts before a question; the model itself stays as it is, and any model will do.

    With a chat template, the result of :meth:`prompt` is what the user says. One that is fitted with another on the
    model takes in that one's facts, before its own.

    Attributes:
        demonstrations: Texts that show how a new fact is to be used (IKE), the one nearest to the question last; None
            for facts alone (ICE).
    """

    kind: ClassVar[str] = "ice"

    def __init__(
        self,
        method: str,
        fingerprint: str | None,
        requests: Sequence[EditRequest] = (),
        details: Mapping[str, Any] | None = None,
        demonstrations: Sequence[str] | None = None,
    ) -> None:
        super().__init__(method, fingerprint, requests, details)
        self.demonstrations = None if demonstrations is None else tuple(demonstrations)

    @property
    def context(self) -> str:
        """What stands before every question."""
        if self.demonstrations is None:
            return "".join(f"New Fact: Q: {r.text} A: {r.target.strip()}\n" for r in self.requests)
        return "".join([*self.demonstrations, *map(new_fact, self.requests), "Prompt: "])

    def prompt(self, question: str) -> str:
        """Returns the facts, a line each, and then the question."""
        return self.context + question

    def holds(self, other: Edit) -> bool:
        """See :meth:`Edit.holds`: this one says something to all that the other one does."""
        known = {request.text for request in self.requests}
        return isinstance(other, ContextEdit) and known.issuperset(request.text for request in other.requests)

    def _put_on(self, model: nn.Module, stack: Any) -> None:
        pass

    def _take_off(self, model: nn.Module, stack: Any) -> None:
        pass

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return ({} if self.demonstrations is None else {"demonstrations": list(self.demonstrations)}), {}

    @classmethod
    def _from_state(cls, common: dict[str, Any], state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        return cls(**common, demonstrations=state.get("demonstrations"))


def new_fact(request: EditRequest) -> str:
    """Returns a fact as IKE states it, in a line."""
    return f"New Fact: {_said(request.text, request.target)}\n"


def demonstration(request: EditRequest, prompt: str, answer: str) -> str:
    """Returns a text that shows what a model that was told a fact says to a prompt."""
    return f"{new_fact(request)}Prompt: {_said(prompt, answer)}\n\n"


def _said(prompt: str, answer: str) -> str:
    return f"{prompt.rstrip()} {answer.strip()}"
