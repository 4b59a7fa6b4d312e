"""The accuracy matrix of a stream of tasks, and the numbers that are read off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelwright.errors import UserError


class AccuracyMatrix:
    """``a[s, t]``: accuracy on task t after training on the tasks up to s, both from 0.

    Args:
        tasks: Names in the order of training.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.rows: list[list[float]] = []

    def add(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Adds the row of a task that was just trained.

        Args:
            step: Its number; rows come in order.
            accuracies: Task to accuracy in [0, 1], for all tasks.

        Raises:
            UserError: Out of order, or a task is missing.
        """
        if step != len(self.rows) or step >= len(self.tasks):
            raise UserError(f"Row {step} of the accuracy matrix was given, but row {len(self.rows)} is next.")
        if missing := [name for name in self.tasks if name not in accuracies]:
            raise UserError(f"The accuracy on {missing[0]} is missing in row {step} of the accuracy matrix.")
        self.rows.append([float(accuracies[name]) for name in self.tasks])

    @property
    def complete(self) -> bool:
        """Whether all tasks were trained."""
        return len(self.rows) == len(self.tasks)

    def final(self) -> float:
        """Returns ACC, the mean over tasks of the accuracy after the last one."""
        return _mean(self._last())

    def learning(self) -> float:
        """Returns the mean over tasks of the accuracy right after training on the task."""
        self._last()
        return _mean([row[i] for i, row in enumerate(self.rows)])

    def forgetting(self) -> float:
        """Returns the mean over tasks of the best accuracy ever minus that after the last task."""
        last = self._last()
        return _mean([max(row[t] for row in self.rows) - last[t] for t in range(len(last))])

    def backward_transfer(self) -> float:
        """Returns BWT, the mean over all tasks but the last of final minus learning accuracy; 0 for one task."""
        last = self._last()
        return _mean([last[t] - self.rows[t][t] for t in range(len(last) - 1)])

    def _last(self) -> list[float]:
        if not self.rows:
            raise UserError("The accuracy matrix is empty: no task was trained.")
        return self.rows[-1][: len(self.rows)]

    def summary(self) -> dict[str, float]:
        """Returns ``accuracy``, ``learning_accuracy``, ``forgetting`` and ``backward_transfer``."""
        return {
            "accuracy": self.final(),
            "learning_accuracy": self.learning(),
            "forgetting": self.forgetting(),
            "backward_transfer": self.backward_transfer(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns tasks and rows (JSON-able)."""
        return {"tasks": self.tasks, "rows": self.rows}

    def __str__(self) -> str:
        """The matrix as a table, a row for each trained task."""
        width = max(8, *(len(name) for name in self.tasks))
        head = " ".join(f"{name:>{width}}" for name in ["after", *self.tasks])
        lines = [
            " ".join([f"{self.tasks[i]:>{width}}", *(f"{100 * value:>{width}.1f}" for value in row)])
            for i, row in enumerate(self.rows)
        ]
        return "\n".join([head, *lines])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
