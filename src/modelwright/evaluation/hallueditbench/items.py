"""Items of the benchmark: a fact that a model has wrong, and the questions that follow an edit of it."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelwright.data import Records
from modelwright.errors import UserError
from modelwright.evaluation.matching import Kind

HOPS = range(2, 7)
#: The questions of the five dimensions; robustness asks further turns of ``efficacy``.
GENERALISATION = ("rephrase", "yes", "no", "multiple_choice", "reversed")
QUESTIONS = ("efficacy", *GENERALISATION, "locality", *(f"{n}hop" for n in HOPS))


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        name: One of :data:`QUESTIONS`.
        question: The text.
        label: The right answer; None for locality, where the answer before the edit is right.
        kind: What kind of answer is wanted.
    """

    name: str
    question: str
    label: str | None
    kind: Kind = "text"


@dataclass(frozen=True, kw_only=True)
class Item:
    """A fact with its questions; what an item has not is empty or None, and is not asked.

    Attributes:
        question: Asks for the object.
        subject: Who or what the fact is about.
        object: The right answer, which an edit writes.
        relation: Name of the relation.
        topic: Name of the topic.
        wrong: What the model answered before the edit.
        choices: The four choices, with letters.
        letter: Letter of the right one.
        rephrased: The question in other words; several are possible, and their mean counts.
        yes_question: Its right answer is Yes.
        no_question: Its right answer is No.
        locality: Questions about the subject whose answers should stay.
        reversed: Asks for the subject.
        hops: Number of hops to question and answer.
    """

    question: str
    subject: str
    object: str
    relation: str = ""
    topic: str = ""
    wrong: str | None = None
    choices: str | None = None
    letter: str | None = None
    rephrased: tuple[str, ...] = ()
    yes_question: str | None = None
    no_question: str | None = None
    locality: tuple[str, ...] = ()
    reversed: str | None = None
    hops: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A name that depends on the fact alone."""
        digest = hashlib.sha256("\0".join((self.question, self.subject, self.object)).encode()).hexdigest()[:12]
        return f"{self.topic or 'item'}-{digest}"

    def probes(self) -> list[Probe]:
        """Returns its questions."""
        found = [Probe("efficacy", self.question, self.object)]
        found += [Probe("rephrase", question, self.object) for question in self.rephrased]
        if self.yes_question:
            found.append(Probe("yes", self.yes_question, "Yes", "yes_no"))
        if self.no_question:
            found.append(Probe("no", self.no_question, "No", "yes_no"))
        if self.choices and self.letter:
            found.append(Probe("multiple_choice", f"{self.question} {self.choices}", self.letter, "letter"))
        if self.reversed:
            found.append(Probe("reversed", self.reversed, self.subject))
        found += [Probe("locality", question, None) for question in self.locality]
        return found + [Probe(f"{n}hop", *self.hops[n]) for n in sorted(self.hops)]

    def to_row(self) -> dict[str, Any]:
        """Returns the item as a row of the published format, with ``output_model`` for what the model answered."""
        row: dict[str, Any] = {
            "topic": self.topic, "subject": self.subject, "relation": self.relation, "object": self.object,
            "question": self.question, "output_model": self.wrong or "",
            "paraphrased_question": "\n".join(self.rephrased),
            "multiple_choice_with_letters": self.choices or "", "multiple_choice_labels": self.letter or "",
            "yes_question": self.yes_question or "", "no_question": self.no_question or "",
            "locality_question": "\n".join(self.locality), "reversed_relation_question": self.reversed or "",
        }  # fmt: skip
        for n in HOPS:
            row[f"question_{n}hop"], row[f"answer_{n}hop"] = self.hops.get(n, ("", ""))
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Item:
        """Reads a row of the published format; more than one paraphrase or locality question stand on lines of a cell.

        Raises:
            UserError: Question, subject or object is missing.
        """
        text = {str(key): "" if value is None else str(value).strip() for key, value in row.items()}
        for name in ("question", "subject", "object"):
            if not text.get(name):
                raise UserError(
                    f"there is no '{name}' (fields: {', '.join(text) or 'none'}); "
                    f"an item needs question, subject and object."
                )
        outputs = [value for key, value in text.items() if key.startswith("output_") and value]
        hops = {n: (text.get(f"question_{n}hop", ""), text.get(f"answer_{n}hop", "")) for n in HOPS}
        letter = text.get("multiple_choice_labels", "")
        choices = text.get("multiple_choice_with_letters", "")
        if bool(letter) != bool(choices):
            raise UserError(
                "choices need their letter: multiple_choice_with_letters and multiple_choice_labels go together."
            )
        return cls(
            question=text["question"],
            subject=text["subject"],
            object=text["object"],
            relation=text.get("relation", ""),
            topic=text.get("topic", ""),
            wrong=outputs[0] if outputs else None,
            choices=choices or None,
            letter=letter or None,
            rephrased=_lines(text.get("paraphrased_question", "")),
            yes_question=text.get("yes_question") or None,
            no_question=text.get("no_question") or None,
            locality=_lines(text.get("locality_question", "")),
            reversed=text.get("reversed_relation_question") or None,
            hops={n: pair for n, pair in hops.items() if all(pair)},
        )


def _lines(cell: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in cell.splitlines() if line.strip())


def choices_of(cell: str) -> list[str]:
    """Reads the column ``multiple_choices``: a list as Python writes it."""
    try:
        found = ast.literal_eval(cell)
    except (SyntaxError, ValueError):
        return []
    return [str(choice) for choice in found] if isinstance(found, list) else []


def read_items(sources: str | Path | Sequence[str | Path], *, per_topic: int | None = None) -> list[Item]:
    """Reads items: CSV files of the published format (or a folder of them), or the same fields in JSONL or Parquet.

    Args:
        sources: Files, folders or patterns.
        per_topic: Keep at most this many of each topic, in the files' order.

    Raises:
        UserError: A row is no item (named by file and line), or there is none.
    """
    kept: list[Item] = []
    counts: dict[str, int] = {}
    for record in Records(sources, "question", field_option=None):
        try:
            item = Item.from_row(record.row)
        except UserError as error:
            raise UserError(f"{record.where}: {error}") from error
        counts[item.topic] = counts.get(item.topic, 0) + 1
        if per_topic is None or counts[item.topic] <= per_topic:
            kept.append(item)
    if not kept:
        named = ", ".join(map(str, [sources] if isinstance(sources, str | Path) else sources))
        raise UserError(f"There are no items in {named}: give at least one.")
    return kept


def unique(items: Iterable[Item]) -> list[Item]:
    """Returns the items without repetitions, in order."""
    return list({item.id: item for item in items}.values())
