"""Saved edits as a context of decoding; see :mod:`modelwright.decoding.parts`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from modelwright.editing.edit import Edit, load_edit
from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class EditedOptions:
    """Have saved edits on the model: deltas of weights, memories, and facts that stand before each prompt."""

    edit: Annotated[list[str], Arg("Folder of an edit, in the order of their fits; may be several.", kind="input")]

    _loaded: list[Edit] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.edit:
            raise UserError("'edited' needs the folder of at least one saved edit.")

    @property
    def edits(self) -> list[Edit]:
        """The edits, lowest first; read once.

        Raises:
            UserError: A folder holds none.
        """
        if not self._loaded:
            self._loaded = [load_edit(folder) for folder in self.edit]
        return self._loaded

    def check(self, model: Any, tokenizer: Any) -> None:
        """Reads the edits, before anything expensive is done."""
        assert self.edits

    @property
    def changes_prompts(self) -> bool:
        """Whether some of the edits live in the prompt."""
        return any(type(edit).prompt is not Edit.prompt for edit in self.edits)

    def prompt(self, text: str) -> str:
        """Returns what to give to the model instead of a prompt; an edit that a later one took in says nothing more."""
        for number, edit in enumerate(self.edits):
            if not any(later.holds(edit) for later in self.edits[number + 1 :]):
                text = edit.prompt(text)
        return text

    @contextlib.contextmanager
    def apply(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Has the edits on the model inside the block; outside it has its own bits.

        Raises:
            UserError: An edit is another model's.
        """
        with contextlib.ExitStack() as stack:
            for edit in self.edits:
                stack.enter_context(edit.applied(model))
            yield model
