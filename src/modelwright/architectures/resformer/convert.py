"""From a trained Llama-like checkpoint to a ResFormer or an SVFormer with its weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import fields
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from modelwright.architectures.resformer.configuration import ResFormerConfig, SVFormerConfig, ValueResidualConfig
from modelwright.architectures.resformer.modeling import ResFormerForCausalLM, SVFormerForCausalLM
from modelwright.errors import UserError

#: Families whose decoder is Llama's, up to biases.
_FAMILIES = ("llama", "mistral", "qwen2")
#: Where the modes start that can start from the given model's own function.
_NO_JUMP = {"constant": (0.0, 1.0), "learnable": (0.0, 1.0)}


def convert_to_resformer(
    model: PreTrainedModel,
    *,
    mode: str = "learnable",
    lambda_first: float | None = None,
    lambda_current: float | None = None,
    layers: list[int] | None = None,
) -> ResFormerForCausalLM:
    """Copies a Llama-like model's weights into a ResFormer; the given model is left as it is.

    With the default ("learnable", from ``(0, 1)``) the result computes exactly what the model did, and continued
    training moves the coefficients: no jump in the loss. Any other start changes the function at once, and the
    result needs training before it is of use; a warning says so.

    Args:
        model: A Llama, Mistral or Qwen2 causal language model without sliding windows.
        mode: See :class:`ValueResidualConfig`.
        lambda_first: Coefficient of ``V_1``; by default 0 for "learnable" and "constant", else the mode's own.
        lambda_current: Coefficient of ``V_n``; by default 1 for "learnable" and "constant", else the mode's own.
        layers: Layers that mix, counted from 0; None means the mode's default.

    Returns:
        The model, with the dtype, device and generation settings of the given one.

    Raises:
        UserError: The model is of another family, or uses something that ResFormer has not.
    """
    first, current = _NO_JUMP.get(mode, (None, None))
    residual = ValueResidualConfig(
        mode=mode,  # type: ignore[arg-type]
        lambda_first=first if lambda_first is None else lambda_first,
        lambda_current=current if lambda_current is None else lambda_current,
        layers=layers,
    )
    config = ResFormerConfig(**_llama_settings(model), value_residual=residual)
    unchanged = mode == "none" or (mode in _NO_JUMP and residual.coefficients == (0.0, 1.0))
    if not unchanged and config.mixing_layers:
        warnings.warn(
            f"The converted model starts from value coefficients other than (0, 1) (mode '{mode}'), so it no longer "
            "computes what the checkpoint did: train it before use, or convert with mode='learnable'.",
            stacklevel=2,
        )
    return _copy(model, config)


def convert_to_svformer(model: PreTrainedModel, *, value_anchors: list[int] | None = None) -> SVFormerForCausalLM:
    """Copies a Llama-like model's weights into an SVFormer without most value projections; it is left as it is.

    The result computes another function and needs training: this is a start for it, not a compression method.

    Args:
        model: A Llama, Mistral or Qwen2 causal language model without sliding windows.
        value_anchors: Layers that keep their value projection, counted from 0; None means the first only.

    Returns:
        The model, with the dtype, device and generation settings of the given one.

    Raises:
        UserError: The model is of another family, or an anchor does not exist.
    """
    config = SVFormerConfig(**_llama_settings(model), value_anchors=[0] if value_anchors is None else value_anchors)
    dropped = config.num_hidden_layers - len(config.value_layers)
    if dropped:
        warnings.warn(
            f"SVFormer drops the value projections of {dropped} layers, so the converted model no longer computes what "
            "the checkpoint did: train it before use.",
            stacklevel=2,
        )
    return _copy(model, config)


def _llama_settings(model: PreTrainedModel) -> dict[str, Any]:
    source = model.config
    if source.model_type not in _FAMILIES:
        raise UserError(
            f"A '{source.model_type}' model cannot be converted: ResFormer is a Llama, and takes the weights of "
            f"{', '.join(_FAMILIES)}. Train one from scratch instead."
        )
    windows = set(getattr(source, "layer_types", None) or []) - {"full_attention"}
    # Qwen2 carries a window that it does not use unless told to; its layer types say whether it does.
    if windows or (getattr(source, "sliding_window", None) is not None and source.model_type != "qwen2"):
        raise UserError(
            f"This '{source.model_type}' model attends within a sliding window, which ResFormer has not: set "
            "sliding_window to null in its config.json if full attention is meant."
        )
    names = {field.name for field in fields(LlamaConfig)} - {"architectures", "transformers_version"}
    settings = {name: value for name, value in source.to_dict().items() if name in names}
    # Qwen2 has biases on queries, keys and values but not on the output; there they are added as zeros.
    settings["attention_bias"] = any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())
    return settings


def _copy(model: PreTrainedModel, config: ResFormerConfig) -> Any:
    weights = dict(model.state_dict())
    if config.attention_bias:
        for i in range(config.num_hidden_layers):
            weights.setdefault(
                f"model.layers.{i}.self_attn.o_proj.bias", weights["model.norm.weight"].new_zeros(config.hidden_size)
            )
    for i in set(range(config.num_hidden_layers)) - set(config.value_layers):
        for part in ("weight", "bias"):
            weights.pop(f"model.layers.{i}.self_attn.v_proj.{part}", None)
    # Made in the model's dtype, not cast to it: a cast would round the rotary frequencies and the coefficients too.
    converted = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    missing, unexpected = converted.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith("model.value_residual.") and "value_gate" not in name]
    if missing or unexpected:
        raise UserError(
            f"The model's weights do not fit: {', '.join([*missing, *unexpected][:3])} … It must be a causal "
            "language model without adapters; merge them first."
        )
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.to(model.device).train(model.training)
