"""One run of a sweep: train with a weight decay, measure training and held-out text at checkpoints on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainerCallback

from modelwright.errors import UserError
from modelwright.probing.fair_lm.bins import FrequencyBins
from modelwright.probing.fair_lm.decay import DecayOn, decay_groups, decay_over_run, describe_groups
from modelwright.probing.fair_lm.measure import measure_blocks
from modelwright.probing.fair_lm.report import TokenLossReport
from modelwright.probing.fair_lm.speed import learning_speed
from modelwright.progress import Progress
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.trainer import rate

#: Both, always: a regulariser that hurts rare types on the first may help them on the second.
SPLITS = ("train", "heldout")


def checkpoint_steps(total: int, intervals: int) -> list[int]:
    """Returns the steps at which a run is measured: 0, the last, and ``intervals - 1`` between, equally spaced."""
    return sorted({round(i * total / intervals) for i in range(intervals + 1)})


class LossCheckpoints(TrainerCallback):
    """Measures losses by type at chosen steps of training, and keeps them in files so that a resumed run has them too.

    Args:
        splits: Name to packed blocks (n, length).
        steps: Steps to measure at; 0 is the untrained model.
        folder: Where to keep the reports; None keeps them in memory only.
        batch_size: Blocks at once.

    Attributes:
        reports: Step to split to report.
    """

    def __init__(
        self, splits: Mapping[str, np.ndarray], steps: Sequence[int], folder: Path | None = None, batch_size: int = 8
    ) -> None:
        self.splits, self.steps, self.folder, self.batch_size = splits, set(steps), folder, batch_size
        self.reports: dict[int, dict[str, TokenLossReport]] = {}
        if folder is not None:
            for step in self.steps:
                paths = {split: self._path(step, split) for split in splits}
                if all(path.exists() for path in paths.values()):
                    self.reports[step] = {s: TokenLossReport.from_parquet(path) for s, path in paths.items()}

    def _path(self, step: int, split: str) -> Path:
        assert self.folder is not None
        return self.folder / f"losses-{step}.{split}.parquet"

    def on_train_begin(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
        """Measures the untrained model."""
        self._measure(state.global_step, keys["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
        """Measures at the chosen steps."""
        self._measure(state.global_step, keys["model"])

    def _measure(self, step: int, model: Any) -> None:
        if step not in self.steps or step in self.reports:
            return
        found = {s: measure_blocks(model, b, batch_size=self.batch_size).compute() for s, b in self.splits.items()}
        if self.folder is not None:
            for split, report in found.items():
                report.to_parquet(self._path(step, split), force=True)
        self.reports[step] = found


def run_once(
    model: PreTrainedModel,
    tokens: np.ndarray,
    splits: Mapping[str, np.ndarray],
    bins: FrequencyBins,
    options: TrainingOptions,
    *,
    decay_on: DecayOn = "matrices",
    intervals: int = 8,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, TokenLossReport]]:
    """Trains ``model`` in place and returns what the sweep keeps of it.

    Args:
        model: A causal language model in float32.
        tokens: (tokens,) the training stream.
        splits: ``train`` and ``heldout``: packed blocks to measure on.
        bins: Of the training stream.
        options: Of the run; ``weight_decay`` is lambda.
        decay_on: Which parameters decay.
        intervals: K, between the K + 1 checkpoints that are measured.
        folder: Where the run's checkpoints go and are resumed from; None keeps none.
        progress: Shows steps.

    Returns:
        A JSON-able dict (``parts``, ``sum_lr_lambda``, ``curve``, ``learning_speed`` …), and the last report of each
        split.

    Raises:
        UserError: See :func:`~modelwright.training.causal_lm.train`; the message says "diverged" if the loss did.
    """
    total = options.total_steps(len(tokens))
    steps = checkpoint_steps(total, intervals)
    watch = LossCheckpoints(splits, steps, folder, batch_size=max(8, options.batch_size))
    parts = describe_groups(decay_groups(model, options.weight_decay, decay_on))
    result = train(
        model, tokens, options, folder=folder, progress=progress, callbacks=[watch],
        decay_groups=lambda network: decay_groups(network, options.weight_decay, decay_on),
    )  # fmt: skip
    spent = [options.learning_rate * rate(step, total, options) for step in range(total)]
    amount, left = decay_over_run(spent, options.weight_decay)
    speeds: dict[str, Any] = {}
    for split in splits:
        reports = [watch.reports[step][split] for step in steps]
        speeds[split] = {}
        for method in ("auc", "minmax"):
            speed = learning_speed(reports, method, steps)
            by_bin = {bins.label(number): value for number, value in speed.by_bin(bins).items()}
            speeds[split][method] = {"mean": speed.mean, "gap": speed.gap(bins), "bins": by_bin}
    found = {
        "lambda": options.weight_decay,
        "seed": options.seed,
        "steps": total,
        "sum_lr_lambda": amount,
        "left_of_an_idle_weight": left,
        "parts": parts,
        "final_logged_loss": result.final_loss,
        "train_seconds": result.train_seconds,
        "curve": [{"step": s, **{split: watch.reports[s][split].summary(bins) for split in splits}} for s in steps],
        "learning_speed": speeds,
    }
    return found, watch.reports[steps[-1]]


def pick_blocks(tokens: np.ndarray, block_size: int, most: int) -> np.ndarray:
    """Returns packed blocks (n, block_size) of a stream: all, or evenly spaced ones of about ``most`` tokens in all."""
    count = len(tokens) // block_size
    kept = np.linspace(0, count - 1, min(count, max(1, most // block_size))).round().astype(np.int64)
    return tokens[: count * block_size].reshape(count, block_size)[kept]


def count_blocks(tokens: np.ndarray, block_size: int, vocab_size: int) -> np.ndarray:
    """Returns how often each type is a target when a stream is trained on in blocks, (vocab_size,) int64."""
    count = len(tokens) // block_size
    blocks = tokens[: count * block_size].reshape(count, block_size)
    found = np.zeros(vocab_size, np.int64)
    step = max(1, (1 << 22) // block_size)
    for start in range(0, count, step):
        found += np.bincount(blocks[start : start + step, 1:].ravel(), minlength=vocab_size)
    return found


def diverged(error: UserError) -> bool:
    """Returns whether a run ended because its loss was no number: a result of a sweep, not a mistake."""
    return "diverged" in str(error) or "not finite" in str(error)
