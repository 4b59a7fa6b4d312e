"""Making a benchmark item of a fact: from the facts world's own templates, or from general ones for a user's facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelwright.data import Records
from modelwright.errors import UserError
from modelwright.evaluation.hallueditbench.items import HOPS, Item, choices_of
from modelwright.evaluation.matching import words
from modelwright.worlds import fact_questions as bank
from modelwright.worlds.base import Draw
from modelwright.worlds.fact_questions import Beliefs

# General wordings, for facts whose relation has no templates. They quote the question, so they fit any.
_REPHRASED = "Give the answer to this: {question}"
_YES_NO = 'Is "{answer}" the right answer to the question "{question}"?'


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A question with its right answer.

    Attributes:
        question: The question.
        answer: The right answer.
        subject: Who or what it is about.
        relation: Name of the relation; facts of one relation lend each other their answers as wrong choices.
        topic: Name of the topic.
        row: Everything else that a file says about it, such as ready questions in the published columns.
        subject_popularity: How well known the subject is, a count of any kind; None where nobody says.
        object_popularity: The same of the answer.
    """

    question: str
    answer: str
    subject: str
    relation: str = ""
    topic: str = ""
    row: Mapping[str, Any] | None = None
    subject_popularity: int | None = None
    object_popularity: int | None = None


def read_facts(sources: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Fact]:
    """Reads facts from files.

    A row has ``question``, ``answer`` (or ``object``) and ``subject``, and may have ``relation``, ``topic``,
    ``subject_popularity``, ``object_popularity`` and the published columns of ready questions.

    Raises:
        UserError: A row lacks one of the three, its subject is not in its question, or a popularity is no whole number
            (named by file and line).
    """
    found: list[Fact] = []
    for record in Records(sources, "question", field_option=None):
        if limit is not None and len(found) >= limit:
            break
        row = {str(k): str(v).strip() for k, v in record.row.items() if v is not None}
        answer = row.get("answer") or row.get("object")
        if not row["question"] or not answer or not row.get("subject"):
            raise UserError(
                f"{record.where}: a fact needs question, answer and subject; this row has "
                f"{', '.join(k for k, v in row.items() if v) or 'none'}."
            )
        if row["subject"] not in row["question"]:
            raise UserError(f"{record.where}: the subject {row['subject']!r} does not stand in the question.")
        found.append(
            Fact(
                question=row["question"],
                answer=answer,
                subject=row["subject"],
                relation=row.get("relation", ""),
                topic=row.get("topic", ""),
                row=row,
                subject_popularity=_count(row, "subject_popularity", record.where),
                object_popularity=_count(row, "object_popularity", record.where),
            )
        )
    return found


def _count(row: Mapping[str, str], name: str, where: str) -> int | None:
    if not (text := row.get(name)):
        return None
    try:
        value = float(text)  # a column of a CSV that has gaps is often written as 8.0
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise UserError(f"{where}: {name} is {text!r}: give a whole number, or leave the cell empty.")
    return int(value)


def single_valued(facts: Sequence[Fact]) -> list[Fact]:
    """Returns the facts that have one answer, each once, in order (paper, 3.1).

    Left out are those whose question, or whose subject and relation, have another answer elsewhere in the list: what
    the model says may then be right although it is not what this fact says.
    """

    def keys(fact: Fact) -> list[tuple[str, ...]]:
        return [(fact.question,)] + ([(fact.subject, fact.relation)] if fact.relation else [])

    known: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for fact in facts:
        for key in keys(fact):
            known.setdefault(key, set()).add(tuple(words(fact.answer)))
    single: dict[str, Fact] = {}
    for fact in facts:
        if all(len(known[key]) == 1 for key in keys(fact)):
            single.setdefault(fact.question, fact)
    return list(single.values())


def general_item(fact: Fact, wrong: str, facts: Sequence[Fact], seed: int = 0) -> Item:
    """Makes the item of a user's fact; what its file says stands, the rest comes from general wordings.

    The paraphrase and the yes- and no-questions quote the question. The choices are the right answer, the model's own
    and two from facts of the same relation; locality asks another question about the same subject. There are no
    reversed and no multi-hop questions unless the file has them: they cannot be made without knowing the relation.

    Args:
        fact: The fact.
        wrong: What the model answered.
        facts: All facts of the file.
        seed: Decides choices and locality question.
    """
    draw = Draw(seed, f"item/{fact.question}")
    given = Item.from_row(
        {**(fact.row or {}), "question": fact.question, "subject": fact.subject, "object": fact.answer}
    )
    wrong = wrong.strip() or "something else"
    beside = [f for f in facts if f.subject == fact.subject and f.question != fact.question]
    choices, letter = given.choices, given.letter
    if choices is None:
        wanted = choices_of((fact.row or {}).get("multiple_choices", ""))
        others = wanted + draw.shuffled(dict.fromkeys(f.answer for f in facts if f.relation == fact.relation))
        pool = [o for o in dict.fromkeys(others) if words(o) not in (words(fact.answer), words(wrong))]
        if len(pool) >= 2:
            choices, letter = bank.multiple_choice(fact.answer, [wrong, *pool[:2]], draw)
    return Item(
        question=fact.question,
        subject=fact.subject,
        object=fact.answer,
        relation=fact.relation,
        topic=fact.topic,
        wrong=wrong,
        choices=choices,
        letter=letter,
        rephrased=given.rephrased or (_REPHRASED.format(question=fact.question),),
        yes_question=given.yes_question or _YES_NO.format(answer=fact.answer, question=fact.question),
        no_question=given.no_question or _YES_NO.format(answer=wrong, question=fact.question),
        locality=given.locality or ((draw.choice(beside).question,) if beside else ()),
        reversed=given.reversed,
        hops=given.hops,
    )


def world_facts(truth: Beliefs, keys: Sequence[tuple[str, str]]) -> list[Fact]:
    """Returns facts of the facts world, asked in the first wording, by (subject, relation)."""
    return [
        Fact(
            question=bank.question(relation, subject), answer=truth.objects[subject, relation], subject=subject,
            relation=relation, topic=relation,
        )
        for subject, relation in keys
    ]  # fmt: skip


def world_item(
    fact: Fact,
    wrong: str,
    beliefs: Beliefs,
    *,
    wordings: Sequence[int] = (1, 2),
    max_hops: int = 6,
    seed: int = 0,
) -> Item:
    """Makes the item of a fact of the facts world, with every question that has one exact answer.

    Hops go on from the right object through what the model believes; the reversed question is asked where one subject
    alone has the object; locality asks all other facts of the subject.

    Args:
        fact: The fact, as :func:`world_facts` makes it.
        wrong: What the model answered.
        beliefs: What the model holds true before the edit.
        wordings: Wordings of the paraphrases.
        max_hops: Longest chain.
        seed: Decides chains and choices.
    """
    draw = Draw(seed, f"item/{fact.subject}/{fact.relation}")
    candidates = beliefs.candidates(fact.relation)
    others = [o for o in draw.shuffled(candidates) if o not in (fact.answer, wrong)]
    # The model may have answered something that is no object of the relation.
    mistaken = wrong if wrong in candidates else others[-1]
    hops = {n: beliefs.chain(fact.subject, fact.relation, fact.answer, n, draw) for n in range(2, max_hops + 1)}
    choices, letter = None, None
    if len(others) >= 3:
        choices, letter = bank.multiple_choice(fact.answer, [mistaken, *others[:2]], draw)
    one_to_one = len(candidates) == sum(relation == fact.relation for _, relation in beliefs.objects)
    return Item(
        question=fact.question,
        subject=fact.subject,
        object=fact.answer,
        relation=fact.relation,
        topic=fact.topic,
        wrong=wrong,
        choices=choices,
        letter=letter,
        rephrased=tuple(bank.question(fact.relation, fact.subject, w) for w in wordings),
        yes_question=bank.yes_no(fact.relation, fact.subject, fact.answer),
        no_question=bank.yes_no(fact.relation, fact.subject, mistaken),
        locality=tuple(
            bank.question(name, fact.subject) for name in beliefs.relations_of(fact.subject) if name != fact.relation
        ),
        reversed=bank.reversed_question(fact.relation, fact.answer) if one_to_one else None,
        hops={n: found for n, found in hops.items() if found is not None and n in HOPS},
    )
