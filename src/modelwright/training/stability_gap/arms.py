"""The recipe, its parts and its rivals for one loop: which tokens, how often, at which rate, and what is frozen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from modelwright.errors import UserError, did_you_mean
from modelwright.training.stability_gap.mixture import Mixture
from modelwright.training.stability_gap.updates import decoder_layers

#: Arm to what a reader is told of it. The first is the recipe; I, II and III are the paper's strategies.
ARMS: dict[str, str] = {
    "stability-gap": "recipe (I+II+III): best subset, several epochs, original mixture",
    "plain": "whole domain, one epoch",
    "subset": "I: random subset, several epochs",
    "ranked": "I+II: best subset, several epochs",
    "replay": "whole domain with replay of general text",
    "rewarm": "whole domain, re-warmed and re-decayed",
    "freeze-top": "whole domain, top layers frozen",
    "freeze-bottom": "whole domain, bottom layers frozen",
    "control": "general text alone, as long as the recipe",
}
#: The domain's whole pool and its best part, among the names of sources.
DOMAIN, BEST = "domain", "best of the domain"


#: Arms that go over a subset's worth of tokens several times.
_REPEATED = ("stability-gap", "subset", "ranked", "control")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers that the arms share.

    Attributes:
        budget: Tokens of an arm that trains on the whole domain (the paper's 50 billion).
        subset: Tokens of the subset, which is an epoch of the recipe (5 billion).
        epochs: Epochs of the recipe (4).
        general: General source to its share of the recipe's tokens; what is left of 1 is the domain's.
        replay: Share of general tokens in ``replay``.
        dynamic: Whether the domain's part of the mixture is drawn anew for each epoch.
        frozen: Layers that ``freeze-top`` and ``freeze-bottom`` hold still.
        learning_rate: Peak.
        rewarm_learning_rate: Peak of ``rewarm``; None: that of pre-training is not known, so the same.
        equal_tokens: Whether all arms train on as many tokens as the recipe.
    """

    budget: int
    subset: int
    epochs: int
    general: Mapping[str, float]
    replay: float = 0.1
    dynamic: bool = True
    frozen: int = 5
    learning_rate: float
    rewarm_learning_rate: float | None = None
    equal_tokens: bool = False

    def check(self) -> None:
        """Raises :class:`UserError` for numbers that do not fit."""
        for name in ("budget", "subset", "epochs", "frozen"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.subset * self.epochs > self.budget:
            raise UserError(
                f"The recipe would train on {self.subset * self.epochs:,} tokens ({self.epochs} epochs of "
                f"{self.subset:,}), more than the budget of {self.budget:,}: take a smaller subset or fewer epochs."
            )
        if not 0 < self.replay < 1:
            raise UserError(f"The share of replay must lie between 0 and 1, not {self.replay}.")
        total = math.fsum(self.general.values())
        if total > 1 - 1e-9:
            raise UserError(f"The general sources' rates sum to {total:g}: nothing is left for the domain.")

    def epochs_of(self, arm: str) -> int:
        """Returns the epochs of an arm: one of those on the whole domain."""
        return self.epochs if arm in _REPEATED else 1

    def peak(self, arm: str) -> float:
        """Returns an arm's peak learning rate."""
        return self.rewarm_learning_rate or self.learning_rate if arm == "rewarm" else self.learning_rate

    def stream(self, arm: str, sources: Mapping[str, np.ndarray], block_size: int, seed: int) -> Mixture:
        """Makes an arm's blocks.

        Args:
            arm: One of :data:`ARMS`.
            sources: Tokens of :data:`DOMAIN`, :data:`BEST` and the general sources.
            block_size: Tokens of a block.
            seed: Seed of draws and order.

        Raises:
            UserError: No such arm, or one that needs general sources and has none.
        """
        if arm not in ARMS:
            raise UserError(f"There is no arm '{arm}': {did_you_mean(arm, ARMS)}")
        total = math.fsum(self.general.values())
        if total <= 0 and arm in ("replay", "control"):
            raise UserError(f"'{arm}' needs general text: give its sources (--general).")
        if arm in _REPEATED:
            epoch = self.subset
        elif self.equal_tokens:
            epoch = self.epochs * (self.subset // block_size) * block_size  # to the block
        else:
            epoch = self.budget
        if arm == "stability-gap":
            rates = {BEST: 1 - total, **self.general}
        elif arm == "ranked":
            rates = {BEST: 1.0}
        elif arm == "control":
            rates = {name: rate / total for name, rate in self.general.items()}
        elif arm == "replay":
            rates = {DOMAIN: 1 - self.replay}
            rates |= {name: self.replay * rate / total for name, rate in self.general.items()}
        else:
            rates = {DOMAIN: 1.0}
        drawn = {BEST} & set(rates) if self.dynamic and arm == "stability-gap" else set()
        return Mixture(
            {name: sources[name] for name in rates},
            rates,
            tokens_per_epoch=epoch,
            block_size=block_size,
            resample=drawn,
            seed=seed,
        )


@contextlib.contextmanager
def frozen(model: nn.Module, which: Literal["top", "bottom"] | None, layers: int = 5) -> Iterator[list[int]]:
    """Holds the top or bottom layers of a model still while the block runs; yields their numbers.

    Embeddings and head go on learning: the paper speaks of layers only.

    Raises:
        UserError: Fewer than ``layers`` + 1 layers, so that none would learn.
    """
    blocks = decoder_layers(model)
    if which is not None and layers >= len(blocks):
        raise UserError(
            f"Freezing {layers} of {len(blocks)} layers would leave none to learn: freeze fewer (--frozen-layers)."
        )
    numbers = {"top": range(len(blocks) - layers, len(blocks)), "bottom": range(layers), None: range(0)}[which]
    held = [p for i in numbers for p in blocks[i].parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield list(numbers)
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def frozen_part(arm: str) -> Literal["top", "bottom"] | None:
    """Returns which layers an arm freezes."""
    return "top" if arm == "freeze-top" else "bottom" if arm == "freeze-bottom" else None
