"""In-context editing: no weight is changed; the new facts stand before each question (arXiv 2410.16251, 2305.12740)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import torch

from modelwright.editing.edit import edits_on
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

#: What an example shows: the new fact itself, other words for it, or a fact that stays.
Kind = Literal["copy", "update", "retain"]
KINDS: tuple[Kind, ...] = get_args(Kind)


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
        """See :meth:`Editor.fit`; there is nothing to fit. Facts of such an edit on the model stand before the new."""
        check_requests(requests)
        if progress is not None:
            progress.advance(len(requests))
        return ContextEdit(self.name, None, [*told(model, requests), *requests])


@dataclass(kw_only=True)
class IKE(Editor):
    """IKE: before the new facts, examples of facts and of what follows from them, retrieved by embedding.

    Every fact of the demonstrations' files gives examples of three kinds: its own prompt is answered by it (copy), so
    are its paraphrases (update), and another fact's prompt is not (retain: the one after it that has another subject
    and an ``old_answer``). Those with the largest cosine to a new fact are taken, the nearest one last: of each kind as
    many as the ``quota`` says (the paper's 1 : 3 : 4), and where a kind has too few, the nearest of the others. A
    demonstration about a new fact's own prompt is never taken.

    With several new facts, each has a line of its own, and an example counts as near as it is to the nearest of them.
    An edit that is fitted with another on the model takes in that one's facts and looks up examples for all.
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
    quota: Annotated[
        list[int] | None,
        Arg("Shares of the kinds copy, update and retain; none takes the nearest of all, as the benchmarks' code."),
    ] = field(default_factory=lambda: [1, 3, 4])
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
        if self.quota is not None and (len(self.quota) != 3 or min(self.quota) < 0 or not any(self.quota)):
            raise UserError(f"quota is {self.quota}: give three shares, of copy, update and retain, such as 1,3,4.")

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
        requests = [*told(model, requests), *requests]
        new = {r.text for r in requests}
        shown = [r for r in self._facts if new.isdisjoint((r.text, *r.paraphrase_texts()))]
        examples = [one for i, r in enumerate(shown) for one in examples_of(r, shown[i + 1 :] + shown[:i])]
        if not examples:
            raise UserError("All demonstrations are about the prompts of the requests themselves: give other facts.")
        kinds, texts = zip(*examples, strict=True)
        wanted = self._vectors(model, tokenizer, [demonstration(r, r.text, r.target) for r in requests])
        scores = (self._vectors(model, tokenizer, texts) @ wanted.T).amax(1)
        ranked = scores.argsort(descending=True, stable=True).tolist()
        first = ranked if self.quota is None else within(quotas(self.quota, self.number), kinds, ranked)
        rest = [i for i in ranked if i not in set(first)]
        taken = set([*first, *rest][: self.number])
        nearest = [i for i in reversed(ranked) if i in taken]
        if progress is not None:
            progress.advance(len(requests))
        details = {"similarities": [float(scores[i]) for i in nearest], "kinds": [kinds[i] for i in nearest]}
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


def told(model: PreTrainedModel, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Returns the facts of the last edit in the prompt that is on a model, without those that are written anew."""
    new = {r.text for r in requests}
    before = [edit for edit in edits_on(model) if isinstance(edit, ContextEdit)]
    return [r for edit in before[-1:] for r in edit.requests if r.text not in new]


def examples_of(request: EditRequest, others: Sequence[EditRequest]) -> list[tuple[Kind, str]]:
    """Returns the demonstrations of one fact, each with its kind: copy, update and retain.

    Args:
        request: The fact.
        others: Further facts; the first that has another subject and an ``old_answer`` stays as it is.
    """
    found: list[tuple[Kind, str]] = [("copy", demonstration(request, request.text, request.target))]
    for text in request.paraphrase_texts():
        found.append(("update", demonstration(request, text, request.target)))
    for other in others:
        if other.old_answer and other.subject != request.subject:
            return [*found, ("retain", demonstration(request, other.text, other.old_answer))]
    return found


def quotas(shares: Sequence[int], number: int) -> dict[Kind, int]:
    """Returns how many examples of each kind there shall be: shares of a number, the largest remainders rounded up."""
    exact = [share * number / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: number - sum(counts)]:
        counts[i] += 1
    return dict(zip(KINDS, counts, strict=True))


def within(counts: Mapping[Kind, int], kinds: Sequence[Kind], order: Sequence[int]) -> list[int]:
    """Returns the first examples in an order of each kind, at most so many."""
    left, found = dict(counts), []
    for i in order:
        if left[kinds[i]]:
            left[kinds[i]] -= 1
            found.append(i)
    return found
