"""MemoTrap: does a model do as it is told where it knows another text by heart? From the published CSV files."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError
from modelwright.evaluation.continuations import Continuation, score_continuations

if TYPE_CHECKING:
    from modelwright.data.records import Records
    from modelwright.decoding.parts import Applied


@dataclass(frozen=True)
class Trap:
    """One question.

    Attributes:
        subset: Such as ``proverb-ending``: the file's name without number.
        prompt: The text that is to be gone on with.
        classes: Two or more continuations, as they stand behind the prompt.
        answer: Which of them does what the prompt asks for.
        where: File and line.
    """

    subset: str
    prompt: str
    classes: tuple[str, ...]
    answer: int
    where: str


def read_traps(records: Records) -> Iterator[Trap]:
    """Reads rows with ``prompt``, ``classes`` (a list, or a Python list literal as published) and ``answer_index``.

    Raises:
        UserError: A row has not what it must have.
    """
    for record in records:
        row, where = record.row, record.where
        classes: Any = row.get("classes")
        if isinstance(classes, str):
            try:
                classes = ast.literal_eval(classes)
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise UserError(f"{where}: classes is not a list of texts: {str(row['classes'])[:80]!r}.") from error
        texts = isinstance(classes, (list, tuple)) and all(isinstance(c, str) and c for c in classes)
        if not texts or len(classes) < 2:
            raise UserError(f"{where}: classes must be a list of two texts or more, not {str(classes)[:80]!r}.")
        try:
            answer = int(row["answer_index"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: answer_index must be a whole number: {row.get('answer_index')!r}.") from error
        if not 0 <= answer < len(classes):
            raise UserError(f"{where}: answer_index is {answer}, but there are {len(classes)} classes, from 0.")
        subset = re.sub(r"^\d+-", "", Path(where.rpartition(":")[0]).name.split(".")[0]) or "all"
        yield Trap(str(row.get("subset") or subset), record.text, tuple(classes), answer, where)


def memotrap_rows(applied: Applied, traps: Sequence[Trap], *, batch_size: int = 8) -> Iterator[dict[str, Any]]:
    """Scores the continuations of each question; yields its fields with ``scores`` and ``right``.

    The wanted continuation must be more probable than every other, by the sum of its log-probabilities; a tie is wrong.
    A method that looks at a prompt without its context gets what stands behind the last colon, as in DeCoRe's code.
    """
    pairs = [
        Continuation(trap.prompt, text, trap.prompt.split(":")[-1].strip(), trap.where)
        for trap in traps
        for text in trap.classes
    ]
    scores = score_continuations(applied, pairs, batch_size=batch_size)
    for trap in traps:
        own = [next(scores) for _ in trap.classes]
        others = [score for i, score in enumerate(own) if i != trap.answer]
        yield {
            "subset": trap.subset, "prompt": trap.prompt, "classes": list(trap.classes), "answer_index": trap.answer,
            "scores": own, "right": own[trap.answer] > max(others),
        }  # fmt: skip


def summarise(rows: Sequence[Mapping[str, Any]], *, macro_with_all: bool = False) -> dict[str, Any]:
    """Returns accuracy by subset, ``micro`` over all questions and ``macro``, the mean over subsets.

    Args:
        rows: From :func:`memotrap_rows`.
        macro_with_all: Count ``micro`` as one more subset in ``macro``, as the published DeCoRe numbers do.
    """
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(str(row["subset"]), []).append(bool(row["right"]))
    subsets = {name: sum(values) / len(values) for name, values in right.items()}
    micro = sum(map(sum, right.values())) / sum(map(len, right.values()))
    parts = [*subsets.values(), *([micro] if macro_with_all else [])]
    count = sum(map(len, right.values()))
    return {
        "macro": sum(parts) / len(parts), "micro": micro, "micro_stderr": math.sqrt(micro * (1 - micro) / count),
        "subsets": subsets, "questions": {name: len(values) for name, values in right.items()},
    }  # fmt: skip
