"""Least-squares edits of several down projections, from targets of the last block's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from modelwright.editing.spread_editor import SpreadEditor
from modelwright.models.roles import Layer


@dataclass(kw_only=True)
class MEMIT(SpreadEditor):
    """Write many facts at once into the MLPs of several layers: Δ = R Kᵀ (λ C + K Kᵀ)⁻¹ in each.

    For every request z is learnt, what the last of the layers should give at the fact's token (the residual stream
    after its block). From the lowest layer up, each then closes its share of what is still missing there, with the
    least change to the keys of ordinary text. λ counts how many tokens of that text stand against a fact: larger is
    safer and weaker. Needs key statistics. The defaults are HalluEditBench's for Llama-2-7B (layers 4 to 8 of 32; the
    same depth elsewhere).

    Several requests are one batch; `sequential=true` makes a batch of each, with those before it on the model. The two
    differ a lot.
    """

    name: ClassVar[str] = "memit"

    def _learnt_at(self, last: Layer) -> list[nn.Module]:
        return [last.block]

    def _share(self, left: int) -> float:
        return left
