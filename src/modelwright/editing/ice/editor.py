"""In-context editing: no weight is changed; the new facts stand before each question (arXiv 2410.16251, 2305.12740)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch

from modelwright.editing.editor import Editor
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.ice.edit import ContextEdit, demonstration
from modelwright.editing.requests import EditRequest, check_requests, read_requests
from modelwright.editing.sentences import load_encoder, sentence_vectors
from modelwright.errors import UserError
from modelwright.options import Arg
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class ICE(Editor):
    """ICE: ask with the new facts before the question, as ``New Fact: Q: … A: …``.

    :class:`IKE`, its parent, shows by examples how such a fact is to be used.
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


@dataclass(kw_only=True)
class IKE(Editor):
    """IKE: before the new facts, examples of facts and of what follows from them, retrieved by embedding.

    Every fact of the demonstrations' files gives examples of three kinds: its own prompt is answered by it (copy), so
    are its paraphrases (update), and another fact's prompt is not (retain: the one after it that has another subject
    and an ``old_answer``). Those with the largest cosine to a new fact are taken, the nearest one last. The paper's
    quota for each kind is left out, as in the code of the benchmarks, which take the nearest of all. A demonstration
    about a new fact's own prompt is never taken.

    With several new facts, each has a line of its own, and an example counts as near as it is to the nearest of them.
    Facts that are read and embedded once are kept for later fits of the same editor.
    """

    name: ClassVar[str] = "ike"
    changes_weights: ClassVar[bool] = False
    in_prompt: ClassVar[bool] = True
    stronger: ClassVar[str] = "give more demonstrations, with paraphrases (--set number=32), or use another editor"

    demonstrations: Annotated[
        list[str],
        Arg("Files of facts to show, as those of the requests; with paraphrases and old_answer.", kind="input"),
    ] = field(default_factory=list)
    number: Annotated[int, Arg("Examples before the new facts.")] = 16
    encoder: Annotated[
        str | None,
        Arg("Encoder of sentences, a folder or hub id, such as sentence-transformers/all-MiniLM-L6-v2; the model's "
            "own states by default.", kind="input"),
    ] = None  # fmt: skip

    _facts: list[EditRequest] = field(default_factory=list, init=False, repr=False, compare=False)
    _by: Any = field(default=None, init=False, repr=False, compare=False)
    #: Texts to vectors of the model of that fingerprint.
    _known: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _of: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.demonstrations, str):
            self.demonstrations = [self.demonstrations]
        if self.number < 1:
            raise UserError(f"number is {self.number}: show at least one example, or use ice.")

    def check(self, requests: Sequence[EditRequest]) -> None:
        """See :meth:`Editor.check`; there must be facts to show, which are read here."""
        super().check(requests)
        if not self.demonstrations:
            raise UserError(
                "IKE needs facts to show: name files of them as its option demonstrations (--set demonstrations=FILE, "
                "or --options ike.demonstrations=FILE where there are several editors), or use ice."
            )
        self._facts = self._facts or read_requests(self.demonstrations, what="demonstrations")

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> ContextEdit:
        """See :meth:`Editor.fit`; there is nothing to fit, but examples are looked up.

        Raises:
            UserError: No demonstrations are given, or all of them are about the new facts.
        """
        self.check(requests)
        new = {r.text for r in requests}
        shown = [r for r in self._facts if new.isdisjoint((r.text, *r.paraphrase_texts()))]
        texts = [text for i, r in enumerate(shown) for text in examples_of(r, shown[i + 1 :] + shown[:i])]
        if not texts:
            raise UserError("All demonstrations are about the prompts of the requests themselves: give other facts.")
        wanted = self._vectors(model, tokenizer, [demonstration(r, r.text, r.target) for r in requests])
        scores = (self._vectors(model, tokenizer, texts) @ wanted.T).amax(1)
        nearest = scores.argsort(descending=True, stable=True)[: self.number].flip(0).tolist()
        if progress is not None:
            progress.advance(len(requests))
        details = {"similarities": [float(scores[i]) for i in nearest]}
        return ContextEdit(self.name, None, requests, details, [texts[i] for i in nearest])

    def _vectors(self, model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
        if self.encoder is not None and self._by is None:
            self._by = load_encoder(self.encoder)
        if self._by is not None:
            self._by[0].to(model.device)
        by, words = self._by or (model, tokenizer)
        if self._of != (of := model_fingerprint(by)):
            self._known, self._of = {}, of
        if missing := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known |= zip(missing, sentence_vectors(by, words, missing))
        return torch.stack([self._known[text] for text in texts])


def examples_of(request: EditRequest, others: Sequence[EditRequest]) -> list[str]:
    """Returns the demonstrations of one fact: copy, update and retain.

    Args:
        request: The fact.
        others: Further facts; the first that has another subject and an ``old_answer`` stays as it is.
    """
    texts = [demonstration(request, prompt, request.target) for prompt in [request.text, *request.paraphrase_texts()]]
    for other in others:
        if other.old_answer and other.subject != request.subject:
            return [*texts, demonstration(request, other.text, other.old_answer)]
    return texts
