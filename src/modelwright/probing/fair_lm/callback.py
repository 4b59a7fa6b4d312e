"""Loss by token frequency while a ``Trainer`` trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from modelwright.errors import UserError
from modelwright.probing.fair_lm.bins import frequency_bins
from modelwright.probing.fair_lm.counts import TokenCounts
from modelwright.probing.fair_lm.measure import measure_rows
from modelwright.probing.fair_lm.report import TokenLossReport, bin_gap


class TokenFairnessCallback(TrainerCallback):
    """Measures losses by token type every so many steps, and logs them.

    Rows ``{prefix}/loss``, ``/loss_balanced``, ``/accuracy``, ``/accuracy_balanced``, ``/loss_bin_k``, ``/slope`` and
    ``/gap`` go into the trainer's log history. Loggers (TensorBoard, Weights & Biases) get them as well once the
    callback knows the trainer: ``callback.attach(trainer)`` instead of ``callbacks=[callback]``.

    In a distributed run each process measures its share of the rows, and sums are added up. The random state and the
    mode of the model are left as they were, so that training goes on as it would without.

    Args:
        eval_dataset: Rows with ``input_ids``, as :func:`~modelwright.probing.fair_lm.measure.measure_rows` takes them.
            Give one callback the training rows (or some of them) and another, with another prefix, held-out ones: a
            regulariser may hurt rare types on the first and help them on the second.
        train_counts: Counts of the training corpus, padded with zeros where the model's table is larger.
        every_steps: Steps between measurements; the last step is always measured, and so is the untrained model.
        batch_size: Rows at once.
        collate: Makes batches; see :func:`~modelwright.probing.fair_lm.measure.measure_rows`.
        prefix: What names in the log begin with.
        base: Ratio of the edges of the frequency bins.

    Attributes:
        reports: Step to report; ``learning_speed(list(callback.reports.values()))`` says which bins are learnt first.

    Raises:
        UserError: There are no rows, or ``every_steps`` is below 1. Training raises it for counts of another tokenizer.
    """

    def __init__(
        self,
        eval_dataset: Sequence[Mapping[str, Any]],
        train_counts: Any,
        every_steps: int = 100,
        *,
        batch_size: int = 8,
        collate: Callable[[list[Any]], Mapping[str, torch.Tensor]] | None = None,
        prefix: str = "eval",
        base: int = 3,
    ) -> None:
        if every_steps < 1:
            raise UserError(f"every_steps must be at least 1, not {every_steps}.")
        if not len(eval_dataset):
            raise UserError("The data set to measure on is empty.")
        self.rows, self.every_steps, self.batch_size = eval_dataset, every_steps, batch_size
        self.collate, self.prefix, self.base = collate, prefix, base
        self.counts = train_counts if isinstance(train_counts, TokenCounts) else TokenCounts(train_counts)
        frequency_bins(self.counts, base)  # refuses what it refuses before training
        self.reports: dict[int, TokenLossReport] = {}
        self.trainer: Any = None

    def attach(self, trainer: Any) -> TokenFairnessCallback:
        """Adds the callback to a trainer, whose loggers then get its numbers too."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
        """Measures the untrained model; not again where a run is resumed."""
        if keys.get("processing_class") is not None and hasattr(keys["processing_class"], "get_vocab"):
            self.counts.check(keys["processing_class"])
        if state.global_step == 0:
            self._measure(state, keys["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
        """Measures when it is time."""
        if state.global_step % self.every_steps == 0 or state.global_step >= state.max_steps:
            self._measure(state, keys["model"])

    def _measure(self, state: Any, model: Any) -> None:
        import torch.distributed as dist

        together = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        mine = (self.rows[i] for i in range(rank, len(self.rows), world))
        tracker = measure_rows(model, mine, batch_size=self.batch_size, collate=self.collate).all_reduce()
        report = self.reports[state.global_step] = tracker.compute()
        bins = frequency_bins(self.counts.resized(report.vocab_size), self.base)
        rows = report.by_bin(bins)
        found = {
            "loss": report.average,
            "loss_balanced": report.balanced,
            "accuracy": report.accuracy,
            "accuracy_balanced": report.balanced_accuracy,
            **{f"loss_bin_{row.bin}": row.loss for row in rows},
            "slope": report.slope(bins.counts),
            "gap": bin_gap(rows),
        }
        entry = {f"{self.prefix}/{name}": value for name, value in found.items() if value is not None}
        if self.trainer is not None:
            self.trainer.log(entry)
        else:
            state.log_history.append({**entry, "step": state.global_step})
