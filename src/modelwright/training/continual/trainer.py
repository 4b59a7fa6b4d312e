"""``transformers.Trainer`` for one task of a stream: masks of gradients, penalties, exact resumption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback

from modelwright.training.continual.examples import answer_loss
from modelwright.training.gradient_mask import GradientMask, GradientMaskMixin
from modelwright.training.resume import ResumableTrainer

Row = dict[str, list[int]]


class Passes(Dataset[Row]):
    """Passes over a task's rows, each in an order of its own that the seed alone decides.

    Args:
        rows: The rows.
        length: How many are drawn in all.
        seed: Decides the order.
    """

    def __init__(self, rows: Sequence[Row], length: int, seed: int) -> None:
        self.rows, self.length, self.seed = rows, length, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        number, place = divmod(index, len(self.rows))
        if self._order[0] != number:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._order = number, torch.randperm(len(self.rows), generator=generator).tolist()
        return self.rows[self._order[1][place]]


class ContinualTrainer(GradientMaskMixin, ResumableTrainer):
    """The loop of one task.

    Args:
        mask: Masks the gradients of each step before they are clipped.
        penalty: Returns a scalar that is added to the loss of each step; called anew in each forward pass.
        keys: As for ``Trainer``.
    """

    def __init__(
        self, *, mask: GradientMask | None, penalty: Callable[[], torch.Tensor | None] | None, **keys: Any
    ) -> None:
        super().__init__(compute_loss_func=answer_loss, **keys)
        self.penalty = penalty
        self.use_gradient_mask(mask)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # Passes has the order

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **keys: Any) -> Any:
        """The loss of a micro-batch, and its share of the penalty."""
        loss = super().compute_loss(model, inputs, *args, **keys)
        if self.penalty is not None and (extra := self.penalty()) is not None:
            loss = loss + extra / self.current_gradient_accumulation_steps
        return loss

    def training_step(self, *args: Any, **keys: Any) -> torch.Tensor:
        """As above; keeps the loss for the log without waiting for it."""
        loss = super().training_step(*args, **keys)
        self._losses.append(loss)
        return loss
