"""What an editor is: a dataclass of options whose ``fit`` makes an edit and leaves the model as it was."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from modelwright import catalog
from modelwright.editing.edit import Edit
from modelwright.editing.requests import EditRequest, check_requests
from modelwright.errors import UserError
from modelwright.options import make_part
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Editor(ABC):
    """A method of editing. Implementations are keyword-only dataclasses.

    The fields are the method's options, ``Annotated[T, Arg("help.")]`` with defaults: `modelwright edit --method rome
    --set layer=5` sets them. Wrong options raise :class:`~modelwright.errors.UserError` in ``__post_init__``. A card
    offers an editor as ``[provides.editors] rome = "modelwright.editing.rome:ROME"``.

    Attributes:
        name: As in the catalog.
        changes_weights: Whether its edits are on the weights; where not, no ordinary checkpoint can hold them.
        stronger: What to change where the edited model does not say what it should, as the end of a sentence.
    """

    name: ClassVar[str]
    changes_weights: ClassVar[bool] = True
    stronger: ClassVar[str] = "try other options of the editor (modelwright show)"

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Refuses what :meth:`fit` would refuse whatever the model: for whoever edits for hours before it is called.

        Raises:
            UserError: A request is bad or contradicts another, or the editor lacks something, such as its training.
        """
        check_requests(requests)

    @abstractmethod
    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> Edit:
        """Makes one edit that writes all requests; the model has the same bits afterwards.

        Args:
            model: A causal language model, as it stands: with the edits that are on it.
            tokenizer: Its tokenizer.
            requests: What to write.
            progress: Where to tell how far it is.

        Raises:
            UserError: A request is bad or contradicts another, or the model cannot be edited in this way.
        """

    def fit_each(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> list[Edit]:
        """Makes one edit a request, each for the model as it stands: the same as a :meth:`fit` of each alone.

        Methods that can fit many at once do so here.
        """
        edits = []
        for request in requests:
            edits.append(self.fit(model, tokenizer, [request]))
            if progress is not None:
                progress.advance()
        return edits

    def remedy(self, edit: Edit) -> str:
        """Returns what to change where the model with this edit does not say what it should; see ``stronger``."""
        return self.stronger


def make_editor(name: str, options: Mapping[str, Any] | None = None) -> Editor:
    """Makes an editor of the catalog from its options.

    Args:
        name: Such as ``rome``.
        options: Field to value; strings (from the command line) are converted to the field's type.

    Raises:
        UserError: No such editor or option, or a value of the wrong type.
    """
    plain = (str, int, float, list, tuple, dict, type(None))
    # Only text and numbers are converted: statistics that are in memory stay as they are.
    ready = {key: value for key, value in (options or {}).items() if not isinstance(value, plain)}
    converted = {key: value for key, value in (options or {}).items() if key not in ready}
    editor = make_part(catalog.load("editors", name), name, converted)
    return dataclasses.replace(editor, **ready) if ready else editor


def layer_for(depth: int, paper_layer: int, paper_depth: int = 32) -> int:
    """Returns the layer that stands as deep in a model as the paper's does in the paper's model.

    Args:
        depth: Layers of the model.
        paper_layer: Number of the paper's layer, from 0.
        paper_depth: Layers of the paper's model; 32 in Llama-2-7B, Llama-3-8B and Mistral-7B.
    """
    return min(depth - 1, int(paper_layer * depth / paper_depth + 0.5))


def check_layer(layer: int, depth: int) -> int:
    """Returns the layer.

    Raises:
        UserError: The model has no such layer.
    """
    if not 0 <= layer < depth:
        raise UserError(f"There is no layer {layer}: the model's {depth} layers are numbered 0 to {depth - 1}.")
    return layer
