"""Tiny random models of every family that is supported: for tests, examples and dry runs on a laptop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError, did_you_mean
from modelwright.models.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}

# GPT-2 alone has dropout by default, which would make its tests differ from all others.
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

#: Family to its ``model_type`` and the options of its tiny config.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "qwen2": ("qwen2", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": None}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", {**_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        {**_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 16, "sliding_window_pattern": 2},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **_NO_DROPOUT}),
    "gpt_neox": ("gpt_neox", _SHAPE),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "expand": 2,
            "head_dim": 16,
            "num_heads": 4,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
}

__all__ = ["FAMILIES", "byte_tokenizer", "seeded", "tiny_config", "tiny_model"]

#: Families of :func:`tiny_model`.
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Returns the config of a tiny model: 259 tokens (those of :func:`~modelwright.models.tokenizers.byte_tokenizer`).

    Args:
        family: One of :data:`FAMILIES`.
        **overrides: Fields of the family's config.

    Raises:
        UserError: Unknown family.
    """
    from transformers import AutoConfig

    if family not in _CONFIGS:
        raise UserError(f"There is no tiny model of the family '{family}': {did_you_mean(family, FAMILIES)}")
    model_type, options = _CONFIGS[family]
    ids = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **{**ids, **options, **overrides})


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Returns a tiny model with random weights (20 to 60 thousand parameters, float32, CPU, evaluation mode).

    Args:
        family: One of :data:`FAMILIES`.
        seed: Seed of the weights; the global random state is left as it was.
        **overrides: Fields of the family's config.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    with seeded(seed):
        return AutoModelForCausalLM.from_config(config).eval()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator inside the block and restores it afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
