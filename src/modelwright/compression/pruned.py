"""Pruned models: the family's own class with narrower maps, and indices of what each block reads and writes.

Importing this module makes the Auto classes know them. ``config.widths`` gives each block's widths, from which the
shapes follow; the indices are integer buffers in the checkpoint. Everything else is inherited: caches, generation,
padding, gradient checkpointing, attention functions, tied embeddings, and adapters, whose targets are plain ``Linear``
modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from modelwright.compression.selections import KINDS, Block, _block
from modelwright.errors import UserError
from modelwright.models.roles import Projection, roles

PREFIX = "pruned_"


class Indexed:
    """Mixed into a family's attention or MLP: reads some residual dimensions, and writes some.

    Buffers (None where all are read or written):
        input_index: (width,) int64, the dimensions read.
        output_place: (hidden,) int64, for each dimension its place among those written, or their number if it is not.
    """

    input_index: torch.Tensor | None
    output_place: torch.Tensor | None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Gathers, computes as the family does, and scatters; (..., hidden) to (..., hidden)."""
        if self.input_index is not None:
            hidden_states = hidden_states.index_select(-1, self.input_index)
        found = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if self.output_place is None:
            return found
        # A gather from one more column of zeros: deterministic, unlike index_add on CUDA, and no slower.
        out, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, None)
        out = pad(out, (0, 1)).index_select(-1, self.output_place)
        return out if rest is None else (out, *rest)


_CLASSES: dict[type, type] = {}


def _indexed(cls: type) -> type:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Indexed{cls.__name__}", (Indexed, cls), {"__doc__": Indexed.__doc__})
    return _CLASSES[cls]


def output_place(index: torch.Tensor, size: int) -> torch.Tensor:
    """Turns kept dimensions into the buffer ``output_place``."""
    place = torch.full((size,), len(index))
    place[index] = torch.arange(len(index))
    return place


class _EmptyConv1D(Conv1D):
    """A ``Conv1D`` that reads nothing, which the original cannot reshape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(*x.shape[:-1], self.nf)


def _narrow(projection: Projection, inputs: int, outputs: int, model: nn.Module) -> None:
    old = projection.base
    had_bias = old.bias is not None
    to = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, Conv1D):
        new: Any = (Conv1D if inputs else _EmptyConv1D)(outputs, inputs).to(**to)
    else:
        # An empty map is legal here: nothing to initialise, which torch would warn of.
        with torch.device("meta"):
            new = nn.Linear(max(inputs, 1), max(outputs, 1), bias=had_bias)
        new.in_features, new.out_features = inputs, outputs
        new.weight = nn.Parameter(torch.empty(outputs, inputs, **to))
        if had_bias:
            new.bias = nn.Parameter(torch.zeros(outputs, **to))
        nn.init.normal_(new.weight, std=0.02)
    parent, _, name = projection.name.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _narrow_layer(layer: Any, block: Block, widths: dict[str, int], model: nn.Module) -> None:
    query, down = layer.query, layer.down
    query_width, key_value = widths["heads"] * block.query, widths["heads"] * block.key_value
    if query.rows is not None:
        _narrow(query, widths["attn_in"], query_width + key_value, model)
        if hasattr(layer.attention, "split_size"):  # GPT-2 splits its one map by it
            layer.attention.split_size = query_width
    else:
        _narrow(query, widths["attn_in"], query_width, model)
        for projection in (layer.key, layer.value):
            _narrow(projection, widths["attn_in"], key_value // 2, model)
    _narrow(layer.output, query_width, widths["attn_out"], model)
    for projection in (layer.gate, layer.up):
        if projection is not None:
            _narrow(projection, widths["mlp_in"], widths["mlp_middle"], model)
    _narrow(down, widths["mlp_middle"], widths["mlp_out"], model)
    for module, read, written in ((layer.attention, "attn_in", "attn_out"), (layer.mlp, "mlp_in", "mlp_out")):
        module.__class__ = _indexed(type(module))
        device = layer.output.base.weight.device
        full = block.hidden
        index = None if widths[read] == full else torch.zeros(widths[read], dtype=torch.long, device=device)
        place = None if widths[written] == full else torch.zeros(full, dtype=torch.long, device=device)
        module.register_buffer("input_index", index)
        module.register_buffer("output_place", place)


class _Pruned:
    """Mixed into a family's causal language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if config.widths is None:
            return
        parts = roles(self, like=config.model_type.removeprefix(PREFIX))  # type: ignore[arg-type]
        if len(config.widths) != len(parts.layers) or any(set(w) != set(KINDS) for w in config.widths):
            raise UserError(f"The config's widths must name {', '.join(KINDS)} for each of {len(parts.layers)} blocks.")
        for layer, widths in zip(parts.layers, config.widths, strict=True):
            _narrow_layer(layer, _block(layer, config), widths, self)  # type: ignore[arg-type]


class PrunedLlamaConfig(LlamaConfig):
    """A Llama's config and the widths that its blocks have left.

    Attributes:
        widths: For each block, kind to width (see :data:`~modelwright.compression.selections.KINDS`); None for all.
        pruning: How it came about: method, ratio, parameters before and after.
    """

    model_type = "pruned_llama"
    widths: list | None = None
    pruning: dict | None = None


class PrunedMistralConfig(MistralConfig):
    """See :class:`PrunedLlamaConfig`."""

    model_type = "pruned_mistral"
    widths: list | None = None
    pruning: dict | None = None


class PrunedQwen2Config(Qwen2Config):
    """See :class:`PrunedLlamaConfig`."""

    model_type = "pruned_qwen2"
    widths: list | None = None
    pruning: dict | None = None


class PrunedQwen3Config(Qwen3Config):
    """See :class:`PrunedLlamaConfig`."""

    model_type = "pruned_qwen3"
    widths: list | None = None
    pruning: dict | None = None


class PrunedGemmaConfig(GemmaConfig):
    """See :class:`PrunedLlamaConfig`."""

    model_type = "pruned_gemma"
    widths: list | None = None
    pruning: dict | None = None


class PrunedGPT2Config(GPT2Config):
    """See :class:`PrunedLlamaConfig`."""

    model_type = "pruned_gpt2"
    widths: list | None = None
    pruning: dict | None = None


class PrunedGPTNeoXConfig(GPTNeoXConfig):
    """See :class:`PrunedLlamaConfig`."""

    model_type = "pruned_gpt_neox"
    widths: list | None = None
    pruning: dict | None = None


class PrunedLlamaForCausalLM(_Pruned, LlamaForCausalLM):
    """A Llama with narrower blocks."""

    config_class = PrunedLlamaConfig


class PrunedMistralForCausalLM(_Pruned, MistralForCausalLM):
    """A Mistral with narrower blocks."""

    config_class = PrunedMistralConfig


class PrunedQwen2ForCausalLM(_Pruned, Qwen2ForCausalLM):
    """A Qwen2 with narrower blocks."""

    config_class = PrunedQwen2Config


class PrunedQwen3ForCausalLM(_Pruned, Qwen3ForCausalLM):
    """A Qwen3 with narrower blocks."""

    config_class = PrunedQwen3Config


class PrunedGemmaForCausalLM(_Pruned, GemmaForCausalLM):
    """A Gemma with narrower blocks."""

    config_class = PrunedGemmaConfig


class PrunedGPT2LMHeadModel(_Pruned, GPT2LMHeadModel):
    """A GPT-2 with narrower blocks."""

    config_class = PrunedGPT2Config


class PrunedGPTNeoXForCausalLM(_Pruned, GPTNeoXForCausalLM):
    """A GPT-NeoX with narrower blocks."""

    config_class = PrunedGPTNeoXConfig


#: Family to the config and model class of its pruned form, and of the plain one.
CLASSES: dict[str, tuple[Any, Any, Any, Any]] = {
    "llama": (PrunedLlamaConfig, PrunedLlamaForCausalLM, LlamaConfig, LlamaForCausalLM),
    "mistral": (PrunedMistralConfig, PrunedMistralForCausalLM, MistralConfig, MistralForCausalLM),
    "qwen2": (PrunedQwen2Config, PrunedQwen2ForCausalLM, Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (PrunedQwen3Config, PrunedQwen3ForCausalLM, Qwen3Config, Qwen3ForCausalLM),
    "gemma": (PrunedGemmaConfig, PrunedGemmaForCausalLM, GemmaConfig, GemmaForCausalLM),
    "gpt2": (PrunedGPT2Config, PrunedGPT2LMHeadModel, GPT2Config, GPT2LMHeadModel),
    "gpt_neox": (PrunedGPTNeoXConfig, PrunedGPTNeoXForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM),
}

for _config, _model, _, _ in CLASSES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
