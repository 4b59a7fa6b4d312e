"""What a sweep over weight decays says: each lambda beside the smallest, at equal steps and at equal training loss."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from modelwright.probing.fair_lm.sweep_run import SPLITS

_METRICS = ("average", "balanced", "accuracy", "balanced_accuracy", "slope", "gap")


def compare_lambdas(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a row for each lambda.

    Args:
        runs: As :func:`~modelwright.probing.fair_lm.sweep_run.run_once` gives them; one that diverged has the key
            ``diverged`` instead of results.

    Returns:
        ``reference`` (the smallest lambda that has results); ``rows`` with, for each lambda, ``sum_lr_lambda``, the
        last checkpoint's means and spreads on both splits (``train``, ``heldout``), their differences from the
        reference, ``equal_loss`` (see :func:`at_training_loss`) and the number of runs that diverged; and
        ``answers``, sentences.
    """
    lambdas = sorted({run["lambda"] for run in runs})
    whole = [run for run in runs if "diverged" not in run]
    equal = _at_equal_loss(whole)
    reference = min((run["lambda"] for run in whole), default=None)
    rows = []
    for value in lambdas:
        mine = [run for run in whole if run["lambda"] == value]
        row: dict[str, Any] = {"lambda": value, "seeds": len(mine)}
        row["diverged"] = sum(run["lambda"] == value for run in runs) - len(mine)
        if mine:
            row["sum_lr_lambda"] = mine[0]["sum_lr_lambda"]
            row["left_of_an_idle_weight"] = mine[0]["left_of_an_idle_weight"]
            for split in SPLITS:
                row[split] = _split(mine, split)
            row["equal_loss"] = _mean_of([equal[value, run["seed"]] for run in mine])
        rows.append(row)
    base = next((row for row in rows if row["lambda"] == reference), None)
    for row in rows:
        for split in SPLITS:
            if base is not None and split in row:
                row[split]["delta"] = _delta(row[split], base[split])
    return {"reference": reference, "rows": rows, "answers": _answers(rows, base)}


def _split(runs: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    last = [run["curve"][-1][split] for run in runs]
    found: dict[str, Any] = {}
    for name in _METRICS:
        found[name], found[f"{name}_sd"] = _mean(values := [one[name] for one in last]), _sd(values)
    labels = list(dict.fromkeys(bin_["label"] for one in last for bin_ in one["bins"]))
    found["bins"] = [
        {
            "label": label,
            "types": round(_mean([b["types"] for b in of]) or 0),
            "loss": _mean([b["loss"] for b in of]),
            "loss_sd": _sd([b["loss"] for b in of]),
            "share": _mean([b["share"] for b in of]),
        }
        for label in labels
        if (of := [b for one in last for b in one["bins"] if b["label"] == label])
    ]
    found["bins"].sort(key=lambda one: 0 if one["label"] == "0" else int(one["label"][1:].split(",")[0]))
    for method in ("auc", "minmax"):
        speeds = [run["learning_speed"][split][method] for run in runs]
        found[f"speed_{method}"] = {
            "mean": _mean([one["mean"] for one in speeds]),
            "gap": _mean([one["gap"] for one in speeds]),
            "bins": {
                label: _mean([one["bins"][label] for one in speeds if label in one["bins"]])
                for label in dict.fromkeys(label for one in speeds for label in one["bins"])
            },
        }
    return found


def _delta(mine: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    average, balanced = mine["average"] - base["average"], mine["balanced"] - base["balanced"]
    return {
        "average": average,
        "balanced": balanced,
        "ratio": balanced / average if average else None,
        "average_relative": mine["average"] / base["average"] - 1 if base["average"] else None,
        "balanced_relative": mine["balanced"] / base["balanced"] - 1 if base["balanced"] else None,
    }


def at_training_loss(curve: Sequence[Mapping[str, Any]], target: float) -> dict[str, float] | None:
    """Returns a run's state where its average training loss first came down to a target; None if it never did.

    Between two checkpoints everything is interpolated in proportion to that loss. Runs are compared at equal training
    loss because of two that stopped after the same steps, the slower one has rare types that are only not learnt yet.

    Args:
        curve: The run's checkpoints.
        target: Nats.

    Returns:
        ``step``, and for each split ``average``, ``balanced`` and ``gap``, as ``train_gap``.
    """

    def state(point: Mapping[str, Any]) -> dict[str, float]:
        found = {"step": float(point["step"])}
        for split in SPLITS:
            found |= {f"{split}_{n}": point[split][n] for n in ("average", "balanced", "gap")}
        return {name: value for name, value in found.items() if value is not None}

    before: dict[str, float] | None = None
    for point in curve:
        after = state(point)
        if after["train_average"] <= target:
            if before is None:
                return after
            part = (before["train_average"] - target) / (before["train_average"] - after["train_average"])
            return {n: before[n] + part * (after[n] - before[n]) for n in after if n in before}
        before = after
    return None


def _at_equal_loss(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[float, int], dict[str, float] | None]:
    found = {}
    for seed in {run["seed"] for run in runs}:
        mine = [run for run in runs if run["seed"] == seed]
        # The lowest that all of them reach.
        target = max(min(point["train"]["average"] for point in run["curve"]) for run in mine)
        for run in mine:
            found[run["lambda"], seed] = at_training_loss(run["curve"], target)
    return found


def _mean_of(states: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    present = [state for state in states if state is not None]
    names = [name for name in (present[0] if present else {}) if all(name in state for state in present)]
    return {name: statistics.fmean(state[name] for state in present) for name in names} or None


def _answers(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> list[str]:
    """Sentences for the top of the page; signs and sizes come from the numbers."""
    found = []
    others = [row for row in rows if base is not None and "train" in row and row["lambda"] != base["lambda"]]
    for split, name in (("train", "training"), ("heldout", "held-out")):
        for row in (others[0], others[-1]) if len(others) > 1 else others:
            delta = row[split]["delta"]
            if None in (delta["average_relative"], delta["balanced_relative"]):
                continue
            assert base is not None
            found.append(
                f"On {name} text, λ = {row['lambda']:g} against {base['lambda']:g} changes the average loss by "
                f"{_percent(delta['average_relative'])} and the token-balanced loss by "
                f"{_percent(delta['balanced_relative'])}; the gap between the rarest and the most frequent bin goes "
                f"from {_number(base[split]['gap'])} to {_number(row[split]['gap'])} nats."
            )
    if not found:
        found.append("There are not two weight decays with results, so nothing can be compared.")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-", "−")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return statistics.fmean(present) if present else None


def _sd(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return statistics.stdev(present) if len(present) > 1 else None
