"""Least-squares edits of several down projections, from targets of the last layer's MLP output."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from modelwright.editing.spread_editor import SpreadEditor
from modelwright.editing.target import Optimisation
from modelwright.models.roles import Layer
from modelwright.options import Arg


@dataclass(kw_only=True)
class PMET(SpreadEditor):
    """MEMIT, but learn what the last layer's attention and MLP should give apart, and write only the MLP's part.

    Two vectors are learnt at once at the fact's token, added to the outputs of attention and MLP of the last of the
    layers. The attention's is thrown away: it takes up what the MLP should not store. What is missing at the MLP's
    output is divided by √(layers left) instead of (layers left). Once all tokens of the target are the most probable
    ones, their likelihood counts a tenth, and a small divergence (KL term at most 0.01) ends the optimisation. Needs
    key statistics. The defaults are the paper's for Llama-2 (layers 4 to 8 of 32; the same depth elsewhere).

    Several requests are one batch; `sequential=true` makes a batch of each, with those before it on the model.
    """

    name: ClassVar[str] = "pmet"

    nll_factor: Annotated[float, Arg("Weight of the target's likelihood.")] = 1.0
    steps: Annotated[int, Arg("Steps of Adam for the target, at most.")] = 20
    decay: Annotated[float, Arg("Weight of the target's distance from the model's own output.")] = 0.5
    clamp: Annotated[float, Arg("Largest distance, as a multiple of the output's norm.")] = 1.0

    def _optimisation(self) -> Optimisation:
        return dataclasses.replace(super()._optimisation(), settled_nll_factor=0.1, settled_kl=0.01)

    def _learnt_at(self, last: Layer) -> list[nn.Module]:
        assert last.down is not None  # down_projections saw it
        return [last.output.module, last.down.module]

    def _share(self, left: int) -> float:
        return math.sqrt(left)
