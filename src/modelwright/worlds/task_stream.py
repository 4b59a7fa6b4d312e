"""Classification tasks that come one after the other, with words of their own and label words of their own or not.

A text is a handful of invented words; some of them are cues of its class, the others say nothing. Which words are cues
of what is the whole task, so a model learns one in a minute and can lose it again in the next.

Everything is generated: the same seed gives the same bytes on every machine and Python version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelwright.errors import UserError, did_you_mean
from modelwright.worlds.base import Draw, Row, World, check_at_least
from modelwright.worlds.names import Names

#: How label words are shared.
LABELS = ("disjoint", "pair", "shared")


@dataclass(frozen=True)
class TaskStreamWorld(World):
    """Tasks in their order.

    Attributes:
        train: ``task``, ``text``, ``label``.
        test: The same, with texts that ``train`` has not.
        tasks: Task to its ``labels`` and each label's ``cues``.
    """

    train: list[Row]
    test: list[Row]
    tasks: dict[str, Any]

    @property
    def truth(self) -> dict[str, Any]:
        """The cues, of which a perfect model knows all, and the accuracy of guessing."""
        classes = self.parameters["classes"]
        return {"tasks": self.tasks, "chance": 1 / classes}


def task_stream(
    seed: int = 0,
    *,
    tasks: int = 4,
    classes: int = 4,
    cues: int = 6,
    fillers: int = 12,
    length: int = 6,
    cues_in_text: int = 2,
    labels: str = "disjoint",
    train_rows: int = 400,
    test_rows: int = 100,
) -> TaskStreamWorld:
    """Makes the world.

    Args:
        seed: Decides everything.
        tasks: Tasks.
        classes: Classes of each.
        cues: Words that speak for a class.
        fillers: Words of a task that say nothing.
        length: Words of a text.
        cues_in_text: How many of them are cues; all of the same class.
        labels: ``disjoint``: each task has label words of its own; ``pair``: but for the last, which has those of the
            task before it; ``shared``: all have the same.
        train_rows: Training texts of each task.
        test_rows: Test texts of each task.

    Raises:
        UserError: A parameter is out of range.
    """
    parameters = locals().copy()
    check_at_least(1, tasks=tasks, cues=cues, fillers=fillers, cues_in_text=cues_in_text)
    check_at_least(2, classes=classes)
    check_at_least(1, train_rows=train_rows, test_rows=test_rows)
    if cues_in_text > length:
        raise UserError(f"cues_in_text is {cues_in_text}, but a text has only {length} words: choose a smaller one.")
    if labels not in LABELS:
        raise UserError(f"The labels cannot be '{labels}': {did_you_mean(labels, LABELS)}")
    names = Names(Draw(seed, "names"))
    made: dict[str, Any] = {}
    train: list[Row] = []
    test: list[Row] = []
    words_of: list[str] = []
    for number in range(tasks):
        name = f"task-{number + 1}"
        again = labels == "shared" or (labels == "pair" and number == tasks - 1)
        if not (again and words_of):
            words_of = [names.word().lower() for _ in range(classes)]
        cues_of = {label: [names.word().lower() for _ in range(cues)] for label in words_of}
        neutral = [names.word().lower() for _ in range(fillers)]
        made[name] = {"labels": list(words_of), "cues": cues_of}
        draw, seen = Draw(seed, name), set[str]()
        for rows, count in ((test, test_rows), (train, train_rows)):
            held = set(seen)  # the test texts, when training texts are drawn
            for i in range(count):
                label = words_of[i % classes]
                text = _text(draw, cues_of[label], neutral, length, cues_in_text)
                for _ in range(100):
                    if text not in held:
                        break
                    text = _text(draw, cues_of[label], neutral, length, cues_in_text)
                else:
                    raise UserError("There are too few different texts of a class: use more cues, fillers or words.")
                seen.add(text)
                rows.append({"task": name, "text": text, "label": label})
    return TaskStreamWorld(parameters, train, test, made)


def _text(draw: Draw, cues: list[str], neutral: list[str], length: int, count: int) -> str:
    words = [draw.choice(cues) for _ in range(count)] + [draw.choice(neutral) for _ in range(length - count)]
    return " ".join(draw.shuffled(words))
