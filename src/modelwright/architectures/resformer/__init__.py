"""ResFormer and SVFormer: value residual learning (arXiv 2410.17897).

Importing this package makes the Auto classes of transformers know both.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modelwright.architectures.resformer.cache import SharedValueCache, kv_cache_bytes
from modelwright.architectures.resformer.configuration import ResFormerConfig, SVFormerConfig, ValueResidualConfig
from modelwright.architectures.resformer.modeling import (
    ResFormerForCausalLM,
    ResFormerModel,
    SVFormerForCausalLM,
    SVFormerModel,
)

for _config, _model, _causal in (
    (ResFormerConfig, ResFormerModel, ResFormerForCausalLM),
    (SVFormerConfig, SVFormerModel, SVFormerForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)

__all__ = [
    "ResFormerConfig",
    "ResFormerForCausalLM",
    "ResFormerModel",
    "SVFormerConfig",
    "SVFormerForCausalLM",
    "SVFormerModel",
    "SharedValueCache",
    "ValueResidualConfig",
    "kv_cache_bytes",
]
