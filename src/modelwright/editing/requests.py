"""What to change: one fact a request, from Python or from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.data.records import Records
from modelwright.errors import UserError
from modelwright.options import check_limit

#: Where a request's fields stand in files of this toolkit and in published ones; dots lead into objects.
_FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "requested_rewrite.prompt", "src", "question"),
    "subject": ("subject", "requested_rewrite.subject"),
    "target": ("target", "target_new", "requested_rewrite.target_new.str", "alt", "object"),
    "old_answer": ("old_answer", "target_true", "ground_truth", "requested_rewrite.target_true.str", "attribute"),
    "paraphrases": ("paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt", "paraphrased_question"),
    "id": ("id", "case_id", "known_id"),
}


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into a model.

    Attributes:
        prompt: What the model is asked, such as ``The capital of {} is``; ``{}`` stands for the subject, which may also
            be written out.
        subject: Who or what the fact is about. It must stand in the prompt.
        target: What the model should go on with. White space before it is added where it is needed: see
            :func:`~modelwright.editing.subject.encode_pair`.
        old_answer: What it says today, for methods that unlearn it (knowledge neurons) and for tracing.
        paraphrases: Other prompts for the same fact, with ``{}`` or the subject in them; for evaluation.
        id: Name in reports.

    Raises:
        UserError: The prompt lacks the subject, or one of the three is blank.
    """

    prompt: str
    subject: str
    target: str
    old_answer: str | None = None
    paraphrases: tuple[str, ...] = ()
    id: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"The {name} of the request {self._shown()} is empty: say {_MEANING[name]}.")
        if self.subject not in self.text:
            raise UserError(
                f"The subject {self.subject!r} does not stand in the prompt {self.prompt!r}: write it there as it is "
                f"spelled, or put {{}} in its place."
            )
        if self.old_answer is not None and self.old_answer.strip() == self.target.strip():
            raise UserError(f"The request {self._shown()} asks for today's answer: there is nothing to edit.")
        object.__setattr__(self, "paraphrases", tuple(self.paraphrases))

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject)

    def paraphrase_texts(self) -> list[str]:
        """Returns the paraphrases with the subject in its place."""
        return [p.replace("{}", self.subject) for p in self.paraphrases]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that are set, as JSON has them."""
        row: dict[str, Any] = {"prompt": self.prompt, "subject": self.subject, "target": self.target}
        row |= {"old_answer": self.old_answer, "paraphrases": list(self.paraphrases), "id": self.id}
        return {name: value for name, value in row.items() if value not in (None, [])}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> EditRequest:
        """Reads a row of a file, under the names used here or in CounterFact, ZsRE, known_1000 or HalluEditBench.

        Raises:
            UserError: A field is missing or not of its type.
        """
        found = {field: _first(row, names) for field, names in _FIELDS.items()}
        for field in ("prompt", "subject", "target"):
            if found[field] is None:
                raise UserError(
                    f"there is no field '{field}' (fields: {', '.join(map(str, row)) or 'none'}); "
                    f"a request needs prompt, subject and target."
                )
            if not isinstance(found[field], str):
                raise UserError(f"the field '{field}' is {found[field]!r}, not text.")
        old = found["old_answer"]
        if isinstance(old, list):
            old = old[0] if old else None
        if old is not None and not isinstance(old, str):
            raise UserError(f"the field 'old_answer' is {old!r}, not text.")
        name = found["id"]
        return cls(
            found["prompt"], found["subject"], found["target"], old or None, _texts(found["paraphrases"]),
            None if name is None else str(name),
        )  # fmt: skip

    def _shown(self) -> str:
        return repr(self.id or self.prompt or self.subject or "?")


_MEANING = {
    "prompt": "what the model is asked",
    "subject": "who or what the fact is about",
    "target": "what the model should answer",
}


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    for name in names:
        value: Any = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):  # CounterFact's targets are objects with the text under "str"
            value = value.get("str")
        if value is not None:
            return value
    return None


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        if value.startswith("["):  # a list in a CSV cell
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                value = [value]
        else:
            value = [value] if value.strip() else []
    if value is None:
        return ()
    texts = tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"the field 'paraphrases' holds {value!r}, not texts.")
    return texts


def read_requests(
    sources: str | Path | Sequence[str | Path],
    *,
    limit: int | None = None,
    known: bool = False,
    what: str = "requests",
) -> list[EditRequest]:
    """Reads requests from JSONL, JSON, CSV or Parquet files.

    The fields are those of :class:`EditRequest`; rows of CounterFact, ZsRE, known_1000 and HalluEditBench are read as
    they are.

    Args:
        sources: One file or several.
        limit: At most this many, in the files' order.
        known: Read facts as they are today (known_1000 has no others): the answer stands in ``old_answer``, and where
            a row names no target, a placeholder does.
        what: What they are, for messages.

    Raises:
        UserError: A row is no request (named by file and line), two requests contradict each other, there is none, or
            the limit is below 1.
    """
    check_limit(limit)
    found: list[EditRequest] = []
    places: list[str] = []
    for row, where in _rows(sources):
        if limit is not None and len(found) >= limit:
            break
        try:
            found.append(EditRequest.from_dict(_with_target(row) if known else row))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        places.append(where)
    if not found:
        named = ", ".join(map(str, [sources] if isinstance(sources, str | Path) else sources))
        raise UserError(f"There are no {what} in {named}: give at least one.")
    check_requests(found, places, what)
    return found


def _with_target(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row if _first(row, _FIELDS["target"]) is not None else {**row, "target": "?"}


def _rows(sources: str | Path | Sequence[str | Path]) -> Iterable[tuple[dict[str, Any], str]]:
    records = Records(sources, text_field="prompt")
    for source in records.sources:
        # Not iter(records): where the prompt stands differs from file to file.
        yield from records._rows(source)


def check_requests(
    requests: Sequence[EditRequest], places: Sequence[str] | None = None, what: str = "requests"
) -> None:
    """Refuses an empty list, and two requests that ask for different answers to the same prompt.

    Args:
        requests: What is to be fitted together.
        places: Where each was read, for the message.
        what: What they are, for the message.

    Raises:
        UserError: One of these.
    """
    if not requests:
        raise UserError("There is no request: give at least one fact to write.")
    seen: dict[str, int] = {}
    for number, request in enumerate(requests):
        first = seen.setdefault(request.text, number)
        if requests[first].target.strip() != request.target.strip():
            one, two = (places[first], places[number]) if places else (f"number {first + 1}", f"number {number + 1}")
            raise UserError(
                f"The {what} {one} and {two} contradict each other: {request.text!r} cannot be answered by both "
                f"{requests[first].target.strip()!r} and {request.target.strip()!r}."
            )
