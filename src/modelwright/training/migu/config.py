"""Options of MIGU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from torch import nn

    from modelwright.training.migu.mask import MIGUMask

#: Stands for the linear layers inside the blocks.
BLOCK_LINEAR = "block-linear"
#: What rows may be chosen by: the method, and the paper's and our controls.
SELECTIONS = ("magnitude", "low-magnitude", "random", "gradient", "weight")


@dataclass(kw_only=True)
class MIGUConfig:
    """Options of :class:`~modelwright.training.migu.MIGUMask`.

    The paper's thresholds: 0.7 for full fine-tuning, LoRA and incremental LoRA, 0.4 for LoRA with 2% replay, 0.05 (its
    list of hyperparameters) or 0.1 (its ablation) for O-LoRA.

    Attributes:
        threshold: T in [0, 1): share of the output rows of each layer that a step leaves alone.
        target_modules: ``block-linear`` is the linear layers inside the blocks: query, key, value, output and
            feed-forward, as the paper lists them, without embeddings and head. Else names, as peft takes them (a module
            whose dotted name is one of them or ends in ``.name``), or one regular expression for the whole dotted name.
            A head whose weight is the embedding's is taken only where it is named.
        mode: ``grad`` zeroes gradients (the official code; an optimizer's momentum and weight decay still move frozen
            rows), ``param`` also puts frozen rows back after the step (the paper's equation 6 for any optimizer).
        select: By what rows are chosen: ``magnitude`` of outputs is MIGU; the others are controls: the rows of least
            magnitude, drawn anew in each step, or those with the largest gradient or weight (sums of absolute values).
        active: Whether to mask; the official code leaves it off during the first task of a stream.
        include_padding: Whether padding counts in the magnitudes, as in the paper. False needs the ``attention_mask``
            of the model's call.
        seed: Of ``random``.
    """

    threshold: Annotated[float, Arg("Share of each layer's output rows that a step leaves alone.")] = 0.7
    target_modules: Annotated[
        str | list[str], Arg("block-linear, names of modules with commas between, or a regular expression.")
    ] = BLOCK_LINEAR
    mode: Annotated[Literal["grad", "param"], Arg("Zero gradients, or also put frozen rows back after a step.")] = (
        "grad"
    )
    select: Annotated[
        Literal["magnitude", "low-magnitude", "random", "gradient", "weight"], Arg("By what rows are chosen.")
    ] = "magnitude"
    active: Annotated[bool, Arg("Whether to mask.")] = True
    include_padding: Annotated[bool, Arg("Whether padding counts in the magnitudes, as in the paper.")] = True
    seed: Annotated[int, Arg("Seed of the random rows.")] = 0

    def __post_init__(self) -> None:
        """Raises :class:`UserError` for the first option that makes no sense."""
        if not 0 <= self.threshold < 1:
            raise UserError(
                f"The threshold is {self.threshold}: it is the share of rows that stay frozen, so give at least 0 and "
                f"less than 1."
            )
        if self.mode not in ("grad", "param"):
            raise UserError(f"There is no mode '{self.mode}': choose grad or param.")
        if self.select not in SELECTIONS:
            raise UserError(f"Rows cannot be chosen by '{self.select}': choose one of {', '.join(SELECTIONS)}.")
        if isinstance(self.target_modules, str) and "," in self.target_modules:
            self.target_modules = [name.strip() for name in self.target_modules.split(",") if name.strip()]
        if isinstance(self.target_modules, str) and self.target_modules != BLOCK_LINEAR:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise UserError(
                    f"target_modules is '{self.target_modules}', which is no regular expression ({error}): give "
                    f"{BLOCK_LINEAR}, a list of names, or a regular expression."
                ) from error

    def on(self, model: nn.Module) -> MIGUMask:
        """Returns the mask of these options on a model."""
        from modelwright.training.migu.mask import MIGUMask

        return MIGUMask(model, self)

    def matches(self, name: str) -> bool:
        """Returns whether a linear layer of this dotted name is a target."""
        if self.target_modules == BLOCK_LINEAR:
            # Blocks are numbered in every family: "model.layers.3.mlp.up_proj", "encoder.block.0.layer.1…".
            return any(part.isdigit() for part in name.split("."))
        if isinstance(self.target_modules, str):
            plain = re.fullmatch(self.target_modules, name) is not None
            return plain or name == self.target_modules or name.endswith(f".{self.target_modules}")
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)

    @property
    def named(self) -> bool:
        """Whether layers are named one by one."""
        return self.target_modules != BLOCK_LINEAR
