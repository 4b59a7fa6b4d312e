"""In-context editing: no weight is changed; each new fact stands before each question (arXiv 2410.16251)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from modelwright.editing.edit import Edit
from modelwright.editing.editor import Editor
from modelwright.editing.requests import EditRequest, check_requests
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ContextEdit(Edit):
    """Facts that :meth:`prompt` puts before a question; the model itself stays as it is, and any model will do.

    With a chat template, the result of :meth:`prompt` is what the user says.
    """

    kind: ClassVar[str] = "ice"

    @property
    def context(self) -> str:
        """What stands before every question."""
        return "".join(f"New Fact: Q: {r.text} A: {r.target.strip()}\n" for r in self.requests)

    def prompt(self, question: str) -> str:
        """Returns the facts, a line each, and then the question."""
        return self.context + question

    def _put_on(self, model: nn.Module, stack: Any) -> None:
        pass

    def _take_off(self, model: nn.Module, stack: Any) -> None:
        pass

    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {}, {}

    @classmethod
    def _from_state(cls, common: dict[str, Any], state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Self:
        return cls(**common)


@dataclass(kw_only=True)
class ICE(Editor):
    """ICE: ask with the new facts before the question, as ``New Fact: Q: … A: …``.

    The demonstrations of IKE, its parent, which are retrieved by embedding, are not part of it.
    """

    name: ClassVar[str] = "ice"
    changes_weights: ClassVar[bool] = False
    stronger: ClassVar[str] = (
        "the model does not follow what stands before the question: write fewer facts, or use another editor"
    )

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> ContextEdit:
        """See :meth:`Editor.fit`; there is nothing to fit."""
        check_requests(requests)
        if progress is not None:
            progress.advance(len(requests))
        return ContextEdit(self.name, None, requests)
