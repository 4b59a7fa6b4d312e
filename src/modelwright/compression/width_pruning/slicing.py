"""Slicing in the manner of SliceGPT (arXiv 2401.15024): rotate the residual stream, and drop its smallest directions.

A rotation between a block's parts changes nothing, as RMSNorm without weights commutes with it. Each part gets the
principal axes of what it reads, the stream keeps the first k of them, and a (k, k) matrix on each residual connection
leads from one part's axes to the next one's. Those matrices are counted as parameters here, so that k is smaller than
the ratio alone would say.

Simpler than the paper's in one point: the axes come from one pass of the whole model, not from a model whose earlier
parts are sliced already. Families: Llama, Mistral and Qwen2, whose norms are RMSNorms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from modelwright.compression.budget import check_ratio
from modelwright.compression.selections import Block, blocks_of
from modelwright.errors import UserError
from modelwright.models.loading import quiet
from modelwright.models.roles import roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SlicedLlamaConfig(LlamaConfig):
    """A Llama's config and the width that its residual stream has left.

    Attributes:
        sliced_size: That width, k; None for the whole.
        pruning: How it came about.
    """

    model_type = "sliced_llama"
    sliced_size: int | None = None
    pruning: dict | None = None


class SlicedMistralConfig(MistralConfig):
    """See :class:`SlicedLlamaConfig`."""

    model_type = "sliced_mistral"
    sliced_size: int | None = None
    pruning: dict | None = None


class SlicedQwen2Config(Qwen2Config):
    """See :class:`SlicedLlamaConfig`."""

    model_type = "sliced_qwen2"
    sliced_size: int | None = None
    pruning: dict | None = None


class _SlicedLayer:
    """Mixed into a decoder layer: a matrix on each residual connection."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + mixed
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


class _Sliced:
    """Mixed into a family's causal language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        k = config.sliced_size
        if k is None:
            return
        parts: Any = roles(self, like=config.model_type.removeprefix("sliced_"))  # type: ignore[arg-type]
        to = {"device": parts.final_norm.weight.device, "dtype": parts.final_norm.weight.dtype}

        def linear(old: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=old.bias is not None, **to)

        def norm(old: Any) -> None:
            # The mean is over k of d squares: with this eps and weights sqrt(d / k), it is the mean over d again.
            old.weight = nn.Parameter(torch.ones(k, **to))
            old.variance_epsilon = old.variance_epsilon * config.hidden_size / k

        for layer in parts.layers:
            block = layer.block
            for projection in (layer.query, layer.key, layer.value):
                setattr(block.self_attn, projection.name[-6:], linear(projection.base, k, projection.base.out_features))
            block.self_attn.o_proj = linear(layer.output.base, layer.output.base.in_features, k)
            for name in ("gate_proj", "up_proj"):
                setattr(block.mlp, name, linear(getattr(block.mlp, name), k, config.intermediate_size))
            block.mlp.down_proj = linear(block.mlp.down_proj, config.intermediate_size, k)
            block.attn_shortcut = nn.Linear(k, k, bias=False, **to)
            block.mlp_shortcut = nn.Linear(k, k, bias=False, **to)
            norm(layer.mixer_norm)
            norm(layer.mlp_norm)
            block.__class__ = _sliced_class(type(block))
        norm(parts.final_norm)
        self.model.embed_tokens = nn.Embedding(config.vocab_size, k, config.pad_token_id, **to)  # type: ignore[attr-defined]
        self.lm_head = nn.Linear(k, config.vocab_size, bias=False, **to)


_CLASSES: dict[type, type] = {}


def _sliced_class(cls: type) -> type:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Sliced{cls.__name__}", (_SlicedLayer, cls), {})
    return _CLASSES[cls]


class SlicedLlamaForCausalLM(_Sliced, LlamaForCausalLM):
    """A Llama with a narrower residual stream."""

    config_class = SlicedLlamaConfig


class SlicedMistralForCausalLM(_Sliced, MistralForCausalLM):
    """A Mistral with a narrower residual stream."""

    config_class = SlicedMistralConfig


class SlicedQwen2ForCausalLM(_Sliced, Qwen2ForCausalLM):
    """A Qwen2 with a narrower residual stream."""

    config_class = SlicedQwen2Config


CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (SlicedLlamaConfig, SlicedLlamaForCausalLM),
    "mistral": (SlicedMistralConfig, SlicedMistralForCausalLM),
    "qwen2": (SlicedQwen2Config, SlicedQwen2ForCausalLM),
}

for _config, _model in CLASSES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def sliced_parameters(block: Block, k: int) -> int:
    """Numbers in a block's matrices at k residual dimensions, with the two on its residual connections."""
    return int(block.parameters(dict.fromkeys(("attn_in", "attn_out", "mlp_in", "mlp_out"), k))) + 2 * k * k


@torch.no_grad()
def slice_model(
    model: PreTrainedModel, ratio: float, batches: Iterable[dict[str, torch.Tensor]], *, round_to: int = 1
) -> PreTrainedModel:
    """Returns a model with fewer residual dimensions.

    Args:
        model: A Llama, Mistral or Qwen2; left as it is.
        ratio: Share of the blocks' parameters to keep; the matrices on the residual connections count. The embedding
            and the head become narrower too, and are not counted, as in every method here.
        batches: Calibration text, finite, with ``input_ids``.
        round_to: The width is a multiple of this.

    Raises:
        UserError: Another family, or no whole number of dimensions fits.
    """
    check_ratio(ratio)
    blocks = blocks_of(model)
    family = model.config.model_type
    if family not in CLASSES:
        raise UserError(
            f"A '{family}' model cannot be sliced by rotation here: its norms are not plain RMSNorms (known: "
            f"{', '.join(CLASSES)}). Use magnitude or wanda."
        )
    total = sum(block.total for block in blocks)
    fitting = [
        k
        for k in range(round_to, blocks[0].hidden + 1, round_to)
        if sum(sliced_parameters(block, k) for block in blocks) <= ratio * total
    ]
    if not fitting:
        raise UserError(f"A ratio of {ratio:g} leaves no {round_to} residual dimensions: raise it.")
    k = fitting[-1]
    axes = [own[:, :k] for own in _axes(model, batches)]
    weights = _rotated(model, axes)
    # Norms are plain now; their weights undo that the mean is over k numbers.
    scale = (blocks[0].hidden / k) ** 0.5
    for name in [n for n in weights if n.endswith("norm.weight")]:
        weights[name] = torch.full((k,), scale, dtype=model.dtype)
    kept = sum(sliced_parameters(block, k) for block in blocks)
    config_class, model_class = CLASSES[family]
    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    pruning = {
        "method": "slicegpt", "ratio": kept / total, "block_parameters": kept, "block_parameters_before": total,
        "settings": {"round_to": round_to},
    }  # fmt: skip
    config = config_class(**{**settings, "tie_word_embeddings": False}, sliced_size=k, pruning=pruning)
    with quiet():
        made = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )  # fmt: skip
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()


def _axes(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Principal axes of the normalised stream at each norm, (d, d) float64, largest first, in network order."""
    parts: Any = roles(model)
    norms = [n for layer in parts.layers for n in (layer.mixer_norm, layer.mlp_norm)] + [parts.final_norm]
    sums = [torch.zeros(0)] * len(norms)

    def hook(i: int) -> Any:
        def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)).double()
            product = (x.T @ x).cpu()
            sums[i] = product if not sums[i].numel() else sums[i] + product

        return add

    handles = [norm.register_forward_pre_hook(hook(i)) for i, norm in enumerate(norms)]
    try:
        for batch in batches:
            model(input_ids=batch["input_ids"].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.linalg.eigh(own).eigenvectors.flip(1) for own in sums]


def _rotated(model: PreTrainedModel, axes: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's weights in the new axes, with the norms' weights moved into the maps that read them."""
    parts: Any = roles(model)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    given = set(weights)

    def put(name: str, value: torch.Tensor) -> None:
        weights[name] = value.to(model.dtype).contiguous()
        given.discard(name)

    def reads(projection: Any, norm: Any, basis: torch.Tensor) -> None:
        put(f"{projection.name}.weight", projection.weight().double().cpu() * norm.weight.double().cpu() @ basis)

    def writes(projection: Any, basis: torch.Tensor) -> None:
        put(f"{projection.name}.weight", basis.T @ projection.weight().double().cpu())
        if (bias := projection.bias()) is not None:
            put(f"{projection.name}.bias", basis.T @ bias.double().cpu())

    for i, layer in enumerate(parts.layers):
        before, between, after = axes[2 * i : 2 * i + 3]
        for projection in (layer.query, layer.key, layer.value):
            reads(projection, layer.mixer_norm, before)
        writes(layer.output, between)
        reads(layer.gate, layer.mlp_norm, between)
        reads(layer.up, layer.mlp_norm, between)
        writes(layer.down, after)
        put(f"{layer.name}.attn_shortcut.weight", between.T @ before)
        put(f"{layer.name}.mlp_shortcut.weight", after.T @ between)
    put("model.embed_tokens.weight", parts.embedding.weight.double().cpu() @ axes[0])
    put("lm_head.weight", parts.head.weight.double().cpu() * parts.final_norm.weight.double().cpu() @ axes[-1])
    for name in given:  # biases: as they were, but copies, so that training this model does not train the given one
        weights[name] = weights[name].clone()
    return weights
