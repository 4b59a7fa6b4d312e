"""The one place that knows where each family keeps its parts.

A method asks for ``roles(model).layers[3].value`` and never for ``model.model.layers[3].self_attn.v_proj``: GPT-2 and
GPT-NeoX fuse query, key and value into one map, Gemma has four norms a layer, Mamba-2 has no attention at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelwright.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Projection:
    """A linear map in a model, or those outputs of a fused one that have a role.

    Attributes:
        name: Dotted name of the module in the unwrapped model.
        module: The module (``Linear``, GPT-2's ``Conv1D``, or an adapter around one): hook this. If it is fused, its
            output holds other roles as well: see ``rows``.
        rows: (out_features,) int64: which of the module's outputs belong to this role; None for all.
    """

    name: str
    module: nn.Module
    rows: torch.Tensor | None = None

    @property
    def base(self) -> Any:
        """The module that holds the weight: inside an adapter, the layer it adapts."""
        return getattr(self.module, "base_layer", self.module)

    @property
    def transposed(self) -> bool:
        """Whether the weight is kept as (in, out), as ``Conv1D`` does."""
        return any(cls.__name__ == "Conv1D" for cls in type(self.base).__mro__)

    def weight(self) -> torch.Tensor:
        """Returns (out_features, in_features), without adapters: the weight itself, or a copy where it is fused."""
        matrix = self.base.weight.T if self.transposed else self.base.weight
        return matrix if self.rows is None else matrix[self.rows.to(matrix.device)]

    def bias(self) -> torch.Tensor | None:
        """Returns (out_features,), or None without a bias."""
        bias = getattr(self.base, "bias", None)
        return bias if bias is None or self.rows is None else bias[self.rows.to(bias.device)]

    @torch.no_grad()
    def set_weight(self, value: torch.Tensor) -> None:
        """Writes (out_features, in_features) in place.

        Raises:
            ValueError: Another shape.
        """
        if value.shape != self.weight().shape:
            raise ValueError(
                f"{self.name}: the weight has shape {tuple(self.weight().shape)}, not {tuple(value.shape)}."
            )
        matrix = self.base.weight.T if self.transposed else self.base.weight
        if self.rows is None:
            matrix.copy_(value)
        else:
            matrix[self.rows.to(matrix.device)] = value.to(matrix)

    def take(self, output: torch.Tensor) -> torch.Tensor:
        """Returns this role's part, (…, out_features), of the module's output."""
        return output if self.rows is None else output[..., self.rows.to(output.device)]


@dataclass(frozen=True)
class Layer:
    """A block of the model; what its family does not have is None.

    Attributes:
        index: Number, from 0.
        name: Dotted name in the unwrapped model.
        block: The whole block.
        mixer: What mixes positions: the attention, or the state-space mixer.
        attention: The attention module.
        query: Query projection; ``key`` and ``value`` likewise (None where a layer uses another layer's).
        key: See above.
        value: See above.
        output: What brings the mixer's result back to the hidden size.
        mlp: The feed-forward module.
        gate: Its gate (the argument of the activation in gated MLPs).
        up: Its map to the intermediate size.
        down: Its map back.
        mixer_norm: Norm before the mixer.
        mlp_norm: Norm before the MLP.
        mixer_output_norm: Norm after the mixer, before the residual sum (Gemma 2 and 3).
        mlp_output_norm: Norm after the MLP, before the residual sum (Gemma 2 and 3).
    """

    index: int
    name: str
    block: nn.Module
    mixer: nn.Module
    attention: nn.Module | None
    query: Projection | None
    key: Projection | None
    value: Projection | None
    output: Projection
    mlp: nn.Module | None
    gate: Projection | None
    up: Projection | None
    down: Projection | None
    mixer_norm: nn.Module
    mlp_norm: nn.Module | None
    mixer_output_norm: nn.Module | None = None
    mlp_output_norm: nn.Module | None = None


@dataclass(frozen=True)
class Roles:
    """A model's parts.

    Attributes:
        family: Its ``model_type``.
        model: The model without wrappers.
        layers: The blocks in order.
        embedding: Token embedding.
        positions: Learned position embedding (GPT-2), or None.
        final_norm: Norm before the head.
        head: Output projection to the vocabulary; may share the embedding's weight.
    """

    family: str
    model: PreTrainedModel
    layers: tuple[Layer, ...]
    embedding: nn.Module
    positions: nn.Module | None
    final_norm: nn.Module
    head: nn.Module


@dataclass(frozen=True)
class _Names:
    """Where a family keeps its parts: dotted names, those of a layer relative to its block."""

    layers: str = "model.layers"
    positions: str | None = None
    final_norm: str = "model.norm"
    mixer: str = "self_attn"
    is_attention: bool = True
    query: str | None = "q_proj"
    key: str | None = "k_proj"
    value: str | None = "v_proj"
    fused: str | None = None
    split: Callable[[Any], Sequence[torch.Tensor]] | None = None
    output: str = "o_proj"
    shared: bool = False
    mlp: str | None = "mlp"
    gate: str | None = "gate_proj"
    up: str | None = "up_proj"
    down: str | None = "down_proj"
    mixer_norm: str = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    mixer_output_norm: str | None = None
    mlp_output_norm: str | None = None


def _thirds(config: Any) -> Sequence[torch.Tensor]:
    """GPT-2: all of query, then all of key, then all of value."""
    return torch.arange(3 * config.hidden_size).chunk(3)


def _by_head(config: Any) -> Sequence[torch.Tensor]:
    """GPT-NeoX: head after head, and in each its query, key and value."""
    rows = torch.arange(3 * config.hidden_size).view(config.num_attention_heads, 3, -1)
    return [rows[:, i].reshape(-1) for i in range(3)]


_LLAMA = _Names()
_GEMMA2 = _Names(
    mlp_norm="pre_feedforward_layernorm",
    mixer_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
_OURS = _Names(shared=True)
_FAMILIES: dict[str, _Names] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "pruned_llama": _LLAMA,
    "pruned_mistral": _LLAMA,
    "pruned_qwen2": _LLAMA,
    "pruned_qwen3": _LLAMA,
    "pruned_gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "resformer": _OURS,
    "svformer": _OURS,
    "gpt2": _Names(
        layers="transformer.h",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        mixer="attn",
        fused="c_attn",
        split=_thirds,
        output="c_proj",
        gate=None,
        up="c_fc",
        down="c_proj",
        mixer_norm="ln_1",
        mlp_norm="ln_2",
    ),
    "gpt_neox": _Names(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        mixer="attention",
        fused="query_key_value",
        split=_by_head,
        output="dense",
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
    ),
    "mamba2": _Names(
        layers="backbone.layers",
        final_norm="backbone.norm_f",
        mixer="mixer",
        is_attention=False,
        query=None,
        key=None,
        value=None,
        output="out_proj",
        mlp=None,
        gate=None,
        up=None,
        down=None,
        mixer_norm="norm",
        mlp_norm=None,
    ),
}

#: Model types whose parts are known.
KNOWN: tuple[str, ...] = tuple(sorted(_FAMILIES))


def unwrap(model: Any) -> Any:
    """Returns the Hugging Face model inside DDP, ``torch.compile`` and PEFT wrappers, in whatever order."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def roles(model: nn.Module, *, like: str | None = None) -> Roles:
    """Returns a model's parts by role.

    Args:
        model: A causal language model, wrapped or not.
        like: For an unknown ``model_type`` whose modules are named as those of a known one: that one.

    Raises:
        UserError: The family is unknown, or the model has not the parts that its family has.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    family = getattr(config, "model_type", type(inner).__name__)
    if (like or family) not in _FAMILIES:
        raise UserError(
            f"It is not known where a '{like or family}' model keeps its parts (known: {', '.join(KNOWN)}). "
            + (did_you_mean(like, KNOWN) if like else "If its modules are named as a known family's, say like=.")
        )
    names = _FAMILIES[like or family]
    return Roles(
        family=family,
        model=inner,
        layers=tuple(
            _layer(i, f"{names.layers}.{i}", block, names, config)
            for i, block in enumerate(_get(inner, names.layers, family))
        ),
        embedding=inner.get_input_embeddings(),
        positions=_get(inner, names.positions, family) if names.positions else None,
        final_norm=_get(inner, names.final_norm, family),
        head=inner.get_output_embeddings(),
    )


def _get(module: Any, name: str, family: str) -> Any:
    for part in name.split("."):
        found = getattr(module, part, None)
        if found is None:
            raise UserError(f"This '{family}' model has no '{name}': it is not laid out as its family is.")
        module = found
    return module


def _layer(index: int, name: str, block: nn.Module, names: _Names, config: Any) -> Layer:
    family = config.model_type
    mixer = _get(block, names.mixer, family)
    mlp = _get(block, names.mlp, family) if names.mlp else None

    def norm(attribute: str | None) -> Any:
        return _get(block, attribute, family) if attribute else None

    def part(parent: nn.Module | None, parent_name: str | None, attribute: str | None) -> Projection | None:
        if parent is None or attribute is None:
            return None
        # A layer that takes keys or values from another layer has no projection for them.
        if names.shared and getattr(parent, attribute, None) is None and attribute in (names.key, names.value):
            return None
        return Projection(f"{name}.{parent_name}.{attribute}", _get(parent, attribute, family))

    if names.fused and names.split:
        fused = _get(mixer, names.fused, family)
        projections: list[Projection | None] = [
            Projection(f"{name}.{names.mixer}.{names.fused}", fused, r) for r in names.split(config)
        ]
    else:
        projections = [part(mixer, names.mixer, a) for a in (names.query, names.key, names.value)]
    query, key, value = projections
    return Layer(
        index=index,
        name=name,
        block=block,
        mixer=mixer,
        attention=mixer if names.is_attention else None,
        query=query,
        key=key,
        value=value,
        output=Projection(f"{name}.{names.mixer}.{names.output}", _get(mixer, names.output, family)),
        mlp=mlp,
        gate=part(mlp, names.mlp, names.gate),
        up=part(mlp, names.mlp, names.up),
        down=part(mlp, names.mlp, names.down),
        mixer_norm=norm(names.mixer_norm),
        mlp_norm=norm(names.mlp_norm),
        mixer_output_norm=norm(names.mixer_output_norm),
        mlp_output_norm=norm(names.mlp_output_norm),
    )
