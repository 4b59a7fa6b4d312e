"""Settings of the search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from modelwright.compression.budget import check_ratio
from modelwright.compression.selections import Mode
from modelwright.errors import UserError, did_you_mean

Estimator = Literal["reinmax", "gumbel_sigmoid", "straight_through"]
Noise = Literal["logistic", "gumbel"]
Network = Literal["gru", "linear", "none"]


@dataclass(frozen=True, kw_only=True)
class DispPruningConfig:
    """How the gates are searched for. The defaults are the paper's (appendix: implementation details).

    Attributes:
        keep_ratio: p, share of the blocks' parameters to keep.
        mode: Which gates there are: see :class:`~modelwright.compression.selections.Layout`. The paper's ablations
            are ``same`` and ``structural``; ``same_mlp`` is what the released code calls ``same``.
        network: Where logits come from: the hypernetwork with its GRU, one with a linear map in the GRU's place, or
            none (the logits are free parameters).
        estimator: How gradients pass the drawn gates: see :mod:`modelwright.compression.disp_llm.estimators`. The paper
            says ReinMax; the released code uses a Gumbel-sigmoid.
        noise: Of ``gumbel_sigmoid``: ``logistic`` (P(on) = sigmoid), or the release's single Gumbel draw.
        temperature: T of ``gumbel_sigmoid``.
        offset: b, added to all logits, so that almost everything is kept at first.
        penalty: lambda, weight of the loss of the ratio.
        steps: Steps of training.
        lr: Learning rate, constant, of AdamW.
        weight_decay: Weight decay of AdamW.
        inputs: Width of the fixed random inputs.
        hidden: Width of each direction of the GRU.
        round_to: Widths are multiples of this, for tensor cores.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        seed: Of the inputs, the first weights and all draws.

    Raises:
        UserError: A value is out of its range.
    """

    keep_ratio: float = 0.5
    mode: Mode = "independent"
    network: Network = "gru"
    estimator: Estimator = "reinmax"
    noise: Noise = "logistic"
    temperature: float = 0.4
    offset: float = 3.0
    penalty: float = 6.0
    steps: int = 10_000
    lr: float = 1e-3
    weight_decay: float = 0.05
    inputs: int = 32
    hidden: int = 64
    round_to: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        for name, known in (("mode", Mode), ("network", Network), ("estimator", Estimator), ("noise", Noise)):
            if getattr(self, name) not in get_args(known):
                raise UserError(
                    f"There is no {name} '{getattr(self, name)}': {did_you_mean(getattr(self, name), get_args(known))}"
                )
        for name in ("steps", "inputs", "hidden", "round_to"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("temperature", "lr", "penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0, and finite, not {getattr(self, name)}.")
