"""A model from scratch: a named architecture, sized by overriding fields of its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from modelwright import catalog
from modelwright.errors import UserError, did_you_mean
from modelwright.models.tiny import seeded
from modelwright.values import parse_value

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: Accepted by configs with rotary positions although they are no attributes of them.
_ROTARY = ("rope_theta", "rope_scaling")


def new_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Returns a model with random weights (float32, CPU); the global random state is left as it was.

    Raises:
        UserError: The config does not make a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with seeded(seed):
            return AutoModelForCausalLM.from_config(config).float()
    except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"No {config.model_type} model can be made with these settings: {_sentence(error)}") from error


def new_config(
    architecture: str, settings: Mapping[str, Any] | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """Makes a config.

    Args:
        architecture: A ``model_type`` of transformers (``llama``, ``qwen2`` …), or a method of the catalog
            (``resformer``).
        settings: Fields of the config by name; ``a.b`` is field ``b`` inside field ``a``. Text is read as YAML.
        tokenizer: Gives vocabulary size and special tokens, where ``settings`` does not.

    Raises:
        UserError: Unknown architecture or field, or a value of the wrong type.
    """
    make = _maker(architecture)
    try:
        default = make()
    except Exception as error:
        raise UserError(f"The architecture '{architecture}' has no default config: {_sentence(error)}") from error
    options: dict[str, Any] = {}
    if tokenizer is not None:
        options["vocab_size"] = len(tokenizer)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            options[name] = getattr(tokenizer, name)
    for key, value in (settings or {}).items():
        _check_known(default, key, architecture)
        _put(options, default, key, _typed(value))
    try:
        config = make(**options)
    except Exception as error:  # each config class has its own errors for bad values
        raise UserError(f"The settings for {architecture} are not valid: {_sentence(error)}") from error
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise UserError(f"vocab_size is {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens.")
    _check_causal(config)
    return config


def check_source(
    model: object | None, architecture: str | None, settings: Mapping[str, Any] | None, tokenizer: object | None
) -> None:
    """Checks the options that say what is trained: a checkpoint, or a new model with a tokenizer.

    Raises:
        UserError: Both or neither is named, a checkpoint's config is to be changed, or a new model has no tokenizer.
    """
    if (model is None) == (architecture is None):
        raise UserError("Give either --model (continue a checkpoint) or --architecture (train from scratch).")
    if model is not None and settings:
        raise UserError("--set changes the config of a new model: give it with --architecture, not with --model.")
    if tokenizer is None and model is None:
        raise UserError(
            "A new model needs --tokenizer: make one with `modelwright tokenize train`, or name an existing one."
        )


def _check_causal(config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # BERT and its kin are causal only on request; without, a model learns to copy the token it should predict.
    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if both_ways and getattr(config, "is_decoder", True) is False:
        raise UserError(
            f"A {config.model_type} model sees the tokens it should predict unless it is made a decoder: "
            f"add --set is_decoder=true."
        )


def _maker(architecture: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ours = catalog.provided("architectures")
    if architecture.lower().replace("_", "-") in ours:
        return catalog.load("architectures", architecture)
    name = architecture.lower().replace("-", "_")
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name in CONFIG_MAPPING:
        return lambda **options: AutoConfig.for_model(name, **options)
    raise UserError(
        f"There is no architecture '{architecture}': {did_you_mean(name, [*ours, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])}"
    )


def _typed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_value(value)
    except yaml.YAMLError as error:
        raise UserError(f"The setting {value!r} is not valid YAML: {_sentence(error)}") from error


def _fields(value: Any) -> list[str] | None:
    """Names inside a config, a dataclass or a dict; None for anything else, which has no inside."""
    if isinstance(value, Mapping):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [f.name for f in dataclasses.fields(value)]
    return None


def _check_known(default: PreTrainedConfig, key: str, architecture: str) -> None:
    # A config keeps any name it does not know, so a typing error would change nothing and say nothing.
    first, *rest = key.split(".")
    known = [*default.to_dict(), *type(default).attribute_map]
    if getattr(default, "rope_parameters", None) is not None:
        known += _ROTARY
    if first not in known:
        raise UserError(f"{architecture} has no setting '{first}': {did_you_mean(first, known)}")
    value = getattr(default, first, None)
    for name in rest:
        inside = _fields(value)
        if inside is not None and name not in inside:
            raise UserError(f"{architecture} has no setting '{key}': {did_you_mean(name, inside)}")
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _put(options: dict[str, Any], default: Any, key: str, value: Any) -> None:
    first, *rest = key.split(".")
    if not rest:
        options[first] = value
        return
    if first not in options:
        now = getattr(default, first, None)
        # A dataclass fills in what is not given, and may do so by what is: value_residual.mode decides the others.
        options[first] = {} if dataclasses.is_dataclass(now) else dict(now or {})
    inner = options[first]
    for name in rest[:-1]:
        inner = inner.setdefault(name, {})
    inner[rest[-1]] = value


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]).rstrip(".")[:300] + "." if lines else f"{type(error).__name__}."
