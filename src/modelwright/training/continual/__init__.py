"""Training on one task after the other, and what is left of the first ones: tasks, baselines, the matrix."""

from modelwright.training.continual.matrix import AccuracyMatrix
from modelwright.training.continual.options import ContinualOptions
from modelwright.training.continual.stream import ContinualBenchmark, StreamResult
from modelwright.training.continual.tasks import ORDERS, Example, Task, read_benchmark, read_stream, world_tasks

__all__ = [
    "ORDERS",
    "AccuracyMatrix",
    "ContinualBenchmark",
    "ContinualOptions",
    "Example",
    "StreamResult",
    "Task",
    "read_benchmark",
    "read_stream",
    "world_tasks",
]
