"""A callback that measures a model often while it begins to learn something else, and says what that cost."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from modelwright.errors import UserError
from modelwright.training.stability_gap.metrics import Direction, gap_report, probe_steps
from modelwright.training.stability_gap.updates import Form, LayerUpdates

#: A measurement: the model in evaluation mode to a number.
Probe = Callable[[nn.Module], float]
#: Under this key each row is kept in the trainer's log, and so in its checkpoints.
_KEY = "stability_gap"


class StabilityGapCallback(TrainerCallback):
    """Runs probes before training, densely at first, and then every so many tokens.

    Give it to the trainer's constructor: there it sees the weights from before a checkpoint is loaded. Rows are kept in
    ``trainer.state.log_history``, so a run that is resumed has those of its first part. Probes see the model in
    evaluation mode and without gradients, in the precision of the run (``bf16=True`` wraps the model's forward pass),
    and must not draw random numbers: then training is the same with and without them. In a
    distributed run every process runs them, on the whole model.

    Args:
        probes: Name to a function of the model whose result is better if higher, such as an accuracy.
        losses: The same, where lower is better. Both have gap metrics.
        every_tokens: Tokens between probes, after the first dense ones.
        tokens_per_step: Tokens of an optimizer step over all processes; needed unless the training set has a
            ``block_size``, as :class:`~modelwright.training.stability_gap.mixture.MixtureDataset` has.
        layer_groups: Layers in the lowest and highest groups; see
            :class:`~modelwright.training.stability_gap.updates.LayerUpdates`. 0 leaves the weights out, and spares the
            memory of their copy.
        form: Of the relative update.
        growth: Ratio of neighbouring early probes.

    Raises:
        UserError: No probe, or numbers that make no sense.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        every_tokens: int,
        *,
        losses: Mapping[str, Probe] | None = None,
        tokens_per_step: int | None = None,
        layer_groups: int = 5,
        form: Form = "ratio_of_means",
        growth: float = 1.5,
    ) -> None:
        self.probes = {**probes, **(losses or {})}
        self.better: dict[str, Direction] = {
            **dict.fromkeys(probes, "higher"),
            **dict.fromkeys(losses or {}, "lower"),
        }
        if not self.probes:
            raise UserError("There is no probe: give at least one score or loss to measure.")
        if every_tokens < 1:
            raise UserError(f"every_tokens must be at least 1, not {every_tokens}.")
        if growth <= 1:
            raise UserError(f"growth must be greater than 1, not {growth}.")
        self.every_tokens, self.tokens_per_step, self.growth = every_tokens, tokens_per_step, growth
        self.layer_groups, self.form = layer_groups, form
        self.history: list[dict[str, Any]] = []
        self._updates: LayerUpdates | None = None
        self._steps: set[int] = set()
        self._step_tokens = 0

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **keys: Any) -> None:
        """Remembers the weights."""
        if self.layer_groups and model is not None:
            self._updates = LayerUpdates(model, self.layer_groups, self.form)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **keys: Any
    ) -> None:
        """Plans the probes; measures the model before training, or takes up the rows of an earlier part."""
        self._step_tokens = self.tokens_per_step or _tokens_per_step(args, train_dataloader)
        self._steps = set(probe_steps(state.max_steps, self._step_tokens, self.every_tokens, self.growth))
        self.history = [entry[_KEY] for entry in state.log_history if _KEY in entry]
        if state.global_step == 0:
            if self.layer_groups and self._updates is None:
                self._updates = LayerUpdates(model, self.layer_groups, self.form)
            self._measure(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **keys: Any) -> None:
        """Measures, where that is planned."""
        if state.global_step in self._steps:
            self._measure(state, model)

    def report(self) -> dict[str, dict[str, Any]]:
        """Returns, by probe, drop, tokens to recover, area, peak and more, and ``updates``: the largest ratio of the
        lowest layers' relative update to the highest's, and the last.
        """
        found: dict[str, dict[str, Any]] = gap_report(self.history, self.better)
        ratios = [row["update_ratio"] for row in self.history if row.get("update_ratio") is not None]
        if ratios:
            found["updates"] = {"largest_ratio": max(ratios), "last_ratio": ratios[-1]}
        return found

    def _measure(self, state: Any, model: nn.Module) -> None:
        row: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self._step_tokens}
        with _evaluation(model):
            row |= {name: float(probe(model)) for name, probe in self.probes.items()}
        if self._updates is not None:
            # JSON has no nan: before anything moved there is no ratio.
            moved = self._updates.measure(model)
            row |= {name: value if math.isfinite(value) else None for name, value in moved.items()}
        self.history.append(row)
        state.log_history.append({"step": state.global_step, _KEY: row})


def _tokens_per_step(args: Any, loader: Any) -> int:
    data = getattr(loader, "dataset", None)
    while data is not None and not hasattr(data, "block_size"):
        data = getattr(data, "dataset", None)  # what shares an iterable out among processes wraps it
    block_size = getattr(data, "block_size", None)
    if block_size is None:
        raise UserError(
            "It is not known how many tokens a step has: give tokens_per_step, or train on a MixtureDataset."
        )
    return int(block_size) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        # A loop of one's own may be inside autocast; a trainer's bf16 is in the model's forward method instead.
        with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True
