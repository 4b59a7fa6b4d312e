"""Which tasks use the same rows of a model: the heat map of the MIGU paper's figures 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modelwright.training.continual.examples import Encoder
from modelwright.training.continual.tasks import Task, drawn
from modelwright.training.migu import MIGUConfig, row_overlap, top_rows


def task_overlap(
    model: nn.Module,
    encoder: Encoder,
    tasks: Sequence[Task],
    *,
    samples: int = 100,
    batch_size: int = 20,
    config: MIGUConfig | None = None,
) -> dict[str, Any]:
    """Returns the share of each task's rows of largest magnitude that are another task's too.

    The diagonal compares two halves of the samples of one task: it says how much of an overlap is the task itself.

    Args:
        model: The model.
        encoder: Of its tokenizer.
        tasks: Tasks; test examples are looked at, drawn at random: halves of every other example would be halves of
            the classes where examples go through the classes in turn.
        samples: Examples of each task.
        batch_size: Examples at once.
        config: ``threshold`` and ``target_modules``; the defaults are the paper's top 30% of the blocks' layers.

    Returns:
        ``mean``: a matrix over tasks, mean over layers; ``layers``: layer to its matrix; ``samples``.
    """
    device = next(model.parameters()).device
    halves: list[tuple[dict[str, torch.Tensor], ...]] = []
    for task in tasks:
        rows = [encoder.row(example) for example in drawn(task.test, samples, 0)]
        found = []
        for part in (rows, rows[::2], rows[1::2] or rows):
            batches = [
                {k: v.to(device) for k, v in encoder.batch(part[i : i + batch_size]).items() if k != "labels"}
                for i in range(0, len(part), batch_size)
            ]
            found.append(top_rows(model, batches, config))
        halves.append(tuple(found))
    pairs = [
        [row_overlap(*(one[1:] if i == j else (one[0], other[0]))) for j, other in enumerate(halves)]
        for i, one in enumerate(halves)
    ]
    layers = {name: [[cell[name] for cell in row] for row in pairs] for name in pairs[0][0]}
    mean = [[sum(cell.values()) / len(cell) for cell in row] for row in pairs]
    return {"mean": mean, "layers": layers, "samples": samples}
