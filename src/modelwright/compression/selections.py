"""What can be taken out of a model: gates, where each acts, and how many parameters they keep.

A block has six selections. Five are DISP-LLM's (arXiv 2410.11988, section 3): which residual dimensions the attention
reads (``attn_in``) and writes (``attn_out``), which the MLP reads (``mlp_in``) and writes (``mlp_out``), and which
intermediate units it keeps (``mlp_middle``). The sixth, ``heads``, keeps whole key/value groups, so no group of GQA is
ever split; DISP-LLM itself leaves it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from modelwright.errors import UserError, did_you_mean
from modelwright.models.roles import roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["independent", "same", "same_mlp", "structural"]
#: Selections of a block, in network order.
KINDS = ("attn_in", "heads", "attn_out", "mlp_in", "mlp_middle", "mlp_out")
#: Those that choose residual dimensions.
RESIDUAL = ("attn_in", "attn_out", "mlp_in", "mlp_out")
#: Families whose blocks add ``part(norm(x))`` to the residual stream, and nothing else.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox")


@dataclass(frozen=True)
class Block:
    """Sizes of one block.

    Attributes:
        hidden: Residual width d.
        groups: Key/value heads, each with the query heads that share it.
        query: Query width of one group (query heads of the group times head size).
        key_value: Key and value width of one group together.
        middle: MLP width f.
        into: Matrices into the MLP: 2 where it is gated, else 1.
    """

    hidden: int
    groups: int
    query: int
    key_value: int
    middle: int
    into: int

    def size(self, kind: str) -> int:
        """Gates of a selection."""
        return {"heads": self.groups, "mlp_middle": self.middle}.get(kind, self.hidden)

    def parameters(self, widths: Mapping[str, Any]) -> Any:
        """Numbers in the block's matrices (no biases, no norms) at given widths.

        With all heads it is ``|S1| (d_q + 2 d_kv) + |S2| d_q + into |S3| |S4| + |S4| |S5|``.

        Args:
            widths: Kind to width: integers, or tensors with a gradient. What is absent is whole.
        """
        s = {kind: widths.get(kind, self.size(kind)) for kind in KINDS}
        attention = s["heads"] * (s["attn_in"] * (self.query + self.key_value) + s["attn_out"] * self.query)
        return attention + s["mlp_middle"] * (self.into * s["mlp_in"] + s["mlp_out"])

    @property
    def total(self) -> int:
        """Numbers in the whole block's matrices."""
        return int(self.parameters({}))


def check_prunable(model: PreTrainedModel) -> None:
    """Refuses what cannot be pruned.

    Raises:
        UserError: Another family, quantised weights, or adapters that are not merged.
    """
    config = model.config
    if hasattr(model, "peft_config") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise UserError("The model carries adapters: merge them first (merge_and_unload), then prune.")
    if config.model_type not in FAMILIES:
        advice = (
            "it is pruned already" if config.model_type.startswith("pruned_") else "its blocks are laid out otherwise"
        )
        raise UserError(
            f"A '{config.model_type}' model cannot be pruned in width ({advice}); known families: "
            f"{', '.join(FAMILIES)}."
        )
    quantised = getattr(config, "quantization_config", None) or getattr(model, "hf_quantizer", None)
    if quantised or any(not p.dtype.is_floating_point or p.element_size() < 2 for p in model.parameters()):
        raise UserError(
            "The model's weights are quantised, so rows and columns cannot be taken out of them: prune the original "
            "checkpoint, and quantise the smaller model."
        )


def blocks_of(model: PreTrainedModel) -> tuple[Block, ...]:
    """Returns the sizes of a model's blocks.

    Raises:
        UserError: See :func:`check_prunable`.
    """
    check_prunable(model)
    return tuple(_block(layer, model.config) for layer in roles(model).layers)


def _block(layer: Any, config: Any) -> Block:
    query, key, value, up = layer.query, layer.key, layer.value, layer.up
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    middle, hidden = up.weight().shape
    return Block(
        hidden=hidden,
        groups=groups,
        query=query.weight().shape[0] // groups,
        key_value=(key.weight().shape[0] + value.weight().shape[0]) // groups,
        middle=middle,
        into=1 if layer.gate is None else 2,
    )


@dataclass(frozen=True)
class Selection:
    """A vector of gates, and where it acts.

    Attributes:
        name: Such as ``3.mlp_middle``, or ``residual`` where all blocks share it.
        size: Gates.
        uses: (block, kind) for each place.
    """

    name: str
    size: int
    uses: tuple[tuple[int, str], ...]

    @property
    def whole(self) -> bool:
        """Whether at least one gate must stay: an attention without any head cannot be run."""
        return any(kind == "heads" for _, kind in self.uses)


@dataclass(frozen=True)
class Layout:
    """All gates of a model under a mode.

    Modes: ``"independent"`` (DISP-LLM: five selections of each block's own), ``"same"`` (one set of residual dimensions
    for all blocks, and nothing else: the freedom of SliceGPT), ``"same_mlp"`` (that, and MLP units of each block, as a
    control: what differs from ``"independent"`` is the dependence alone; the released code's ``same`` is this one), and
    ``"structural"`` (that, and whole heads of each block: the freedom of LLM-Pruner).

    Attributes:
        blocks: The model's blocks.
        selections: The gates in network order.
    """

    blocks: tuple[Block, ...]
    selections: tuple[Selection, ...]

    @classmethod
    def of(cls, blocks: Sequence[Block], mode: str = "independent") -> Layout:
        """Lays out the gates.

        Raises:
            UserError: Unknown mode.
        """
        if mode not in get_args(Mode):
            raise UserError(f"There is no mode '{mode}': {did_you_mean(mode, get_args(Mode))}")
        found: list[Selection] = []
        if mode != "independent":
            places = tuple((i, kind) for i in range(len(blocks)) for kind in RESIDUAL)
            found.append(Selection("residual", blocks[0].hidden, places))
        kinds = {
            "independent": [kind for kind in KINDS if kind != "heads"],
            "same": [],
            "same_mlp": ["mlp_middle"],
            "structural": ["heads", "mlp_middle"],
        }[mode]
        for i, block in enumerate(blocks):
            found += [Selection(f"{i}.{kind}", block.size(kind), ((i, kind),)) for kind in kinds]
        return cls(tuple(blocks), tuple(found))

    @property
    def total(self) -> int:
        """Parameters of all blocks when nothing is taken out."""
        return sum(block.total for block in self.blocks)

    def spread(self, values: Sequence[Any]) -> list[dict[str, Any]]:
        """Hands one value a selection to the places where it acts: for each block, kind to value."""
        found: list[dict[str, Any]] = [{} for _ in self.blocks]
        for selection, value in zip(self.selections, values, strict=True):
            for block, kind in selection.uses:
                found[block][kind] = value
        return found

    def parameters(self, widths: Sequence[Any]) -> Any:
        """Parameters of all blocks, T(s), at one width a selection (integers, or tensors with a gradient)."""
        return sum(block.parameters(own) for block, own in zip(self.blocks, self.spread(widths), strict=True))

    def share(self, gates: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns T(s) divided by the whole, as a scalar float32 tensor through which the gates' gradients flow."""
        parts = [
            block.parameters({kind: total / 1.0 for kind, total in own.items()}) / self.total
            for block, own in zip(self.blocks, self.spread([gate.sum() for gate in gates]), strict=True)
        ]
        return torch.stack([torch.as_tensor(part, dtype=torch.float32, device=gates[0].device) for part in parts]).sum()

    def masks(self, kept: Sequence[torch.Tensor]) -> Masks:
        """Turns one boolean vector a selection into masks of the model."""
        return Masks(self.blocks, tuple({k: v.bool().cpu() for k, v in own.items()} for own in self.spread(kept)))


@dataclass(frozen=True)
class Masks:
    """What stays of every block.

    Attributes:
        blocks: The model's blocks.
        kept: For each block, kind to (size,) bool on the CPU; what is absent is whole.
    """

    blocks: tuple[Block, ...]
    kept: tuple[dict[str, torch.Tensor], ...]

    def __post_init__(self) -> None:
        for i, (block, own) in enumerate(zip(self.blocks, self.kept, strict=True)):
            for kind, mask in own.items():
                if kind not in KINDS or mask.shape != (block.size(kind),) or mask.dtype != torch.bool:
                    raise ValueError(f"Block {i} has no selection '{kind}' of {tuple(mask.shape)} {mask.dtype}.")

    def index(self, block: int, kind: str) -> torch.Tensor:
        """Returns the kept gates of a selection, sorted, (width,) int64."""
        mask = self.kept[block].get(kind)
        return torch.arange(self.blocks[block].size(kind)) if mask is None else mask.nonzero().flatten()

    def widths(self) -> list[dict[str, int]]:
        """Returns, for each block, kind to width."""
        return [{kind: len(self.index(i, kind)) for kind in KINDS} for i in range(len(self.blocks))]

    @property
    def parameters(self) -> int:
        """Numbers that stay in the blocks' matrices."""
        return sum(int(b.parameters(w)) for b, w in zip(self.blocks, self.widths(), strict=True))

    @property
    def ratio(self) -> float:
        """Share of the blocks' matrices that stays."""
        return self.parameters / sum(block.total for block in self.blocks)
