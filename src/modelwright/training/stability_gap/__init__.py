"""Continual pre-training without the fall at its beginning: the stability-gap recipe (arXiv 2406.14833v2).

A small best subset of the domain, several epochs of it, and the rest of each epoch as the model was pre-trained on.
"""

from modelwright.training.stability_gap.arms import ARMS, Plan, frozen
from modelwright.training.stability_gap.callback import StabilityGapCallback
from modelwright.training.stability_gap.metrics import gap_metrics, gap_report, probe_steps
from modelwright.training.stability_gap.mixture import Mixture, MixtureDataset, interleave
from modelwright.training.stability_gap.probes import BitsPerByte, ChoiceAccuracy, Item, read_items
from modelwright.training.stability_gap.updates import LayerUpdates

__all__ = [
    "ARMS",
    "BitsPerByte",
    "ChoiceAccuracy",
    "Item",
    "LayerUpdates",
    "Mixture",
    "MixtureDataset",
    "Plan",
    "StabilityGapCallback",
    "frozen",
    "gap_metrics",
    "gap_report",
    "interleave",
    "probe_steps",
    "read_items",
]
