"""NQ-Swap: questions whose context names another answer than the true one. Which does the model give?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError
from modelwright.evaluation.answers import answers_of, contains, exact_match

if TYPE_CHECKING:
    from modelwright.data.records import Records
    from modelwright.decoding.run import Source

INSTRUCTION = "Answer the question from the context, with as few words as possible."
_FIELDS = ("question", "sub_context", "sub_answer", "org_answer")
METRICS = ("sub_em", "sub_contains", "org_em", "org_contains")


def read_questions(records: Records) -> list[tuple[dict[str, Any], str]]:
    """Reads rows with ``question``, ``sub_context``, ``sub_answer`` and ``org_answer`` (texts, or lists of them).

    Raises:
        UserError: A row has not what it must have.
    """
    found = []
    for record in records:
        row = record.row
        if missing := [name for name in _FIELDS if not row.get(name)]:
            raise UserError(f"{record.where} has no '{missing[0]}': NQ-Swap's rows have {', '.join(_FIELDS)}.")
        found.append(({name: row[name] for name in _FIELDS}, record.where))
    return found


def prompts(questions: Sequence[tuple[Mapping[str, Any], str]], *, shots: int = 4) -> Iterator[Source]:
    """Yields prompts: an instruction, examples, context and question.

    The first ``shots`` different questions are the examples, and are not asked. Each row also has the prompt without
    its own context, for methods that look at both.

    Raises:
        UserError: There are no questions beside the examples.
    """
    examples: dict[str, Mapping[str, Any]] = {}
    for row, _ in questions:
        if len(examples) < shots:
            examples.setdefault(str(row["question"]), row)
    before = INSTRUCTION + "\n\n"
    for row in examples.values():
        before += _asked(row) + f" {(answers_of(row, 'sub_answer') or [''])[0]}\n\n"
    asked = [(row, where) for row, where in questions if str(row["question"]) not in examples]
    if not asked:
        raise UserError(f"There are no questions beside the {len(examples)} that serve as examples: use fewer --shots.")
    for row, where in asked:
        yield before + _asked(row), {**row, "prompt_without_context": before + _asked(row, context=False)}, where


def _asked(row: Mapping[str, Any], *, context: bool = True) -> str:
    first = f"Context: {row['sub_context']}\n" if context else ""
    return f"{first}Question: {row['question']}\nAnswer:"


def score(row: Mapping[str, Any]) -> dict[str, float]:
    """Scores a completion's first line: exact match and containment of the swapped and of the original answer."""
    said = (str(row["completion"]).strip() or " ").splitlines()[0]
    found: dict[str, float] = {}
    for kind in ("sub", "org"):
        answers = answers_of(row, f"{kind}_answer") or []
        found |= {f"{kind}_em": exact_match(said, answers), f"{kind}_contains": contains(said, answers)}
    return found


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the means of :func:`score` over rows, and standard errors of the exact matches."""
    scores = [score(row) for row in rows]
    means = {name: sum(one[name] for one in scores) / len(scores) for name in METRICS}
    errors = {
        f"{name}_stderr": math.sqrt(means[name] * (1 - means[name]) / len(scores)) for name in ("sub_em", "org_em")
    }
    return {**means, **errors, "questions": len(scores)}
