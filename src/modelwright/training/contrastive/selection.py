"""How a method chooses the training batch out of a larger one, while the model learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from modelwright.training.contrastive.encoded import Encoded


class Chosen(NamedTuple):
    """A choice from a super-batch.

    Attributes:
        indices: (size,) int64, rows of the super-batch, no row twice.
        logs: Numbers for the training log.
    """

    indices: Tensor
    logs: dict[str, float]


class Selection(Protocol):
    """Chooses each training batch. The catalog finds one by the name of its method (kind ``batch_selectors``).

    A selection may have a method ``attach(learner)``, which is called with the ``PairEncoder`` before training.
    """

    def super_batch_size(self, batch_size: int) -> int:
        """Returns how many pairs are read for a training batch of ``batch_size``."""

    def choose(
        self,
        encode: Callable[[list[dict[str, Any]]], Encoded],
        super_batch: list[dict[str, Any]],
        size: int,
        step: int,
        extras: Mapping[str, Tensor],
    ) -> Chosen:
        """Chooses ``size`` pairs.

        Args:
            encode: Gives the learner's embeddings of a list of sub-batches: without gradient, in evaluation mode, with
                random state and buffers left as they were. With several processes, of all processes' rows, in the
                order of the ranks; every process then makes the same choice.
            super_batch: This process's part, as sub-batches of model inputs.
            size: Pairs to choose, over all processes.
            step: Optimizer steps done so far: what a draw depends on besides the seed, for a resumed run repeats it.
            extras: Columns of the whole super-batch's rows, such as cached reference embeddings; first dimension the
                row. Those that the data have of the selection's attribute ``columns``, if it has one; they must be
                numbers, or are left out if the attribute ``logged_columns`` names them too.
        """
