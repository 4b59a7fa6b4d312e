"""ResFormer, SVFormer and their baselines in one modelling file (arXiv 2410.17897 v5).

A Llama whose blocks take the first layer's values ``V_1``, and shared keys and values, as inputs. Norm, MLP and rotary
embeddings are transformers' own Llama classes; attention goes through the registered attention function, so every
backend works. ``V_1`` is returned by the first block and handed to the others as an argument: nothing is stored
on a module during ``forward``, so gradient checkpointing and ``torch.compile(fullgraph=True)`` work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
    rotate_half,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from modelwright.architectures.resformer.cache import SharedValueCache
from modelwright.architectures.resformer.coefficients import LayerAverage, ValueGate, ValueResidualCoefficients
from modelwright.architectures.resformer.configuration import ResFormerConfig, SVFormerConfig, ValueResidualConfig
from modelwright.errors import UserError


class ResFormerAttention(nn.Module):
    """Attention whose values may be mixed with the first layer's, or come from an earlier layer altogether."""

    def __init__(self, config: ResFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=config.attention_bias)

        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = linear(config.hidden_size, kv_width) if layer_idx in config.key_layers else None
        self.v_proj = linear(config.hidden_size, kv_width) if layer_idx in config.value_layers else None
        self.o_proj = linear(config.num_attention_heads * self.head_dim, config.hidden_size)

        last = layer_idx + 1 == config.num_hidden_layers
        self.gives_key = self.k_proj is not None and not last and layer_idx + 1 not in config.key_layers
        self.gives_value = self.v_proj is not None and not last and layer_idx + 1 not in config.value_layers
        self.gives_first_value = layer_idx == 0 and bool(config.mixing_layers or config.neutreno_lambda)

        residual = ValueResidualConfig.of(config.value_residual)
        mixes = layer_idx in config.mixing_layers
        self.value_gate = ValueGate(config) if mixes and residual.mode == "token_gate" else None
        #: Fixed (lambda_first, lambda_current), or None where they are learned or nothing is mixed.
        self.fixed_mix: tuple[float, float] | None = None
        if mixes and residual.mode in ("identity", "constant", "sparse") and residual.coefficients != (0.0, 1.0):
            self.fixed_mix = residual.coefficients
        self.neutreno_lambda = config.neutreno_lambda if layer_idx > 0 else 0.0
        self.value_scale = config.value_scale if layer_idx > 0 else 1.0

    def mix_values(
        self,
        value: torch.Tensor,
        first_value: torch.Tensor | None,
        coefficients: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Returns ``V'_n = lambda_first V_1 + lambda_current V_n``, before heads are split.

        Args:
            value: ``V_n``, ``(batch, tokens, kv_heads * head_dim)``.
            first_value: ``V_1``, likewise.
            coefficients: ``(2,)`` learned coefficients, or None.
            hidden_states: The layer's normalised input, ``(batch, tokens, hidden)``.

        Raises:
            UserError: The two differ in width.
        """
        if first_value is None:
            return value
        if first_value.shape != value.shape:
            raise UserError(
                f"Layer {self.layer_idx} has values of shape {tuple(value.shape)}, but the first layer's are "
                f"{tuple(first_value.shape)}: the value residual needs the same width in all layers."
            )
        if self.value_gate is not None:
            heads = (*value.shape[:-1], -1, self.head_dim)
            gate = self.value_gate(hidden_states).sigmoid().unsqueeze(-1)
            return torch.lerp(first_value.view(heads), value.view(heads), gate).flatten(-2)
        if coefficients is not None:
            coefficients = coefficients.to(value.dtype)
            return torch.addcmul(coefficients[1] * value, coefficients[0], first_value)
        if self.fixed_mix is not None:
            first, current = self.fixed_mix
            # One fused operation where there is one: this runs in every layer of every step.
            if first + current == 1:
                return torch.lerp(value, first_value, first)
            return torch.add(value if current == 1 else current * value, first_value, alpha=first)
        return value

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_value: torch.Tensor | None = None,
        shared_key: torch.Tensor | None = None,
        shared_value: torch.Tensor | None = None,
        coefficients: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Attends. See :meth:`ResFormerDecoderLayer.forward` for the arguments.

        Returns:
            Output ``(batch, tokens, hidden)``, attention weights or None, and what the layer gives to later ones,
            each or None: ``V_1``, keys, values.
        """
        assert position_embeddings is not None
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        cos, sin = position_embeddings

        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        if self.k_proj is not None:
            key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        else:
            key = None
            query = query * cos.unsqueeze(1) + rotate_half(query) * sin.unsqueeze(1)

        flat_value = raw_value = self.v_proj(hidden_states) if self.v_proj is not None else None
        value = None
        if flat_value is not None:
            if self.layer_idx > 0:
                flat_value = self.mix_values(flat_value, first_value, coefficients, hidden_states)
                if self.value_scale != 1:
                    flat_value = flat_value * self.value_scale
            value = flat_value.view(heads).transpose(1, 2)

        if past_key_values is not None and key is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        given = (
            raw_value if self.gives_first_value else None,
            key if self.gives_key else None,
            value if self.gives_value else None,
        )
        key = shared_key if key is None else key
        value = shared_value if value is None else value

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if self.neutreno_lambda and first_value is not None and flat_value is not None:
            # The official file adds key/value heads to query heads as they are, which only fits without GQA.
            difference = (first_value - flat_value).view(heads).repeat_interleave(self.num_key_value_groups, dim=-2)
            output = torch.add(output.view(difference.shape), difference, alpha=self.neutreno_lambda)
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights, *given


class ResFormerDecoderLayer(GradientCheckpointingLayer):
    """A Llama block with ``V_1`` and shared keys and values as inputs and outputs."""

    def __init__(self, config: ResFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = ResFormerAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_value: torch.Tensor | None = None,
        shared_key: torch.Tensor | None = None,
        shared_value: torch.Tensor | None = None,
        coefficients: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Runs the block. Whatever may need a gradient is positional, as re-entrant checkpointing asks.

        Args:
            hidden_states: ``(batch, tokens, hidden)``.
            first_value: ``V_1`` of these tokens, ``(batch, tokens, kv_heads * head_dim)``; None at the first layer.
            shared_key: Keys, cached ones included, of the layer before that has a key projection,
                ``(batch, kv_heads, all tokens, head_dim)``; None where nobody shares.
            shared_value: Values, likewise.
            coefficients: ``(2,)`` learned coefficients of ``V_1`` and ``V_n``; None where they are fixed.
            attention_mask: As the attention function wants it.
            past_key_values: Cache, updated in place.
            position_embeddings: Cosine and sine.
            **kwargs: Passed to the attention function.

        Returns:
            Hidden states, and what the layer gives to later ones, each or None: ``V_1``, keys, values.
        """
        attended, _, *given = self.self_attn(
            self.input_layernorm(hidden_states),
            first_value,
            shared_key,
            shared_value,
            coefficients,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, *given


class ResFormerPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model family."""

    config_class = ResFormerConfig
    config: ResFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("ResFormerDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ("value_residual", "layer_average")
    _can_record_outputs = {"hidden_states": ResFormerDecoderLayer, "attentions": ResFormerAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ValueGate):
            init.constant_(module.bias, module.initial_logit)
        elif isinstance(module, ValueResidualCoefficients | LayerAverage):
            module.reset()

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the learned coefficients, which weight decay would pull towards a plain zero."""
        return {name for name, _ in self.named_parameters() if "value_residual." in name or "layer_average." in name}


class ResFormerModel(ResFormerPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: ResFormerConfig) -> None:
        super().__init__(config)
        config.check()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(ResFormerDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        learned = ValueResidualConfig.of(config.value_residual).mode in ("learnable", "learnable_plus")
        self.value_residual = ValueResidualCoefficients(config) if learned and config.mixing_layers else None
        self.layer_average = LayerAverage(config.num_hidden_layers) if config.denseformer else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder; arguments and output are those of ``LlamaModel``.

        Raises:
            UserError: The cache cannot hold keys without values, or belongs to a model with other anchors.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if past_key_values is not None:
            _check_cache(past_key_values, self.config)
        elif use_cache:
            past_key_values = _new_cache(self.config)

        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        learned = dict(zip(self.config.mixing_layers, self.value_residual())) if self.value_residual is not None else {}
        hidden_states = inputs_embeds
        outputs = [hidden_states]
        first_value = shared_key = shared_value = None
        for i, layer in enumerate(self.layers):
            hidden_states, new_first_value, new_key, new_value = layer(
                hidden_states,
                first_value,
                shared_key,
                shared_value,
                learned.get(i),
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            first_value = first_value if new_first_value is None else new_first_value
            shared_key = shared_key if new_key is None else new_key
            shared_value = shared_value if new_value is None else new_value
            if self.layer_average is not None:
                outputs.append(hidden_states)
                hidden_states = self.layer_average(outputs)

        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class ResFormerForCausalLM(ResFormerPreTrainedModel, GenerationMixin):
    """A ResFormer (or one of its baselines) with a language model head: what ``LlamaForCausalLM`` is to Llama."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: ResFormerConfig) -> None:
        super().__init__(config)
        self.model = ResFormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits, and the loss where labels are given; as ``LlamaForCausalLM``.

        Args:
            input_ids: ``(batch, tokens)``.
            attention_mask: ``(batch, tokens)``, 1 where there is a token and 0 where there is padding.
            position_ids: ``(batch, tokens)``.
            past_key_values: Cache of earlier tokens. SVFormer needs a :class:`SharedValueCache`.
            inputs_embeds: ``(batch, tokens, hidden)`` instead of ``input_ids``.
            labels: ``(batch, tokens)``, -100 where there is no loss; they are shifted here.
            use_cache: Whether to return a cache.
            logits_to_keep: So many last positions, or indices of positions, to compute logits for; 0 means all.
            **kwargs: Passed to the decoder and the loss function.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # A private hook, but the one that transformers' own models with another cache override, and the only one
        # that runs before chunked prefill. A cache that was asked for and does not fit is refused in `forward`.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made: Any = model_kwargs.get("past_key_values")
        if (
            self.config.stores_keys_without_values
            and type(made) is DynamicCache
            and not made.offloading
            and not getattr(made, "_is_user_defined", False)
        ):
            model_kwargs["past_key_values"] = SharedValueCache(self.config)


class SVFormerPreTrainedModel(ResFormerPreTrainedModel):
    """What transformers asks of a model family."""

    config_class = SVFormerConfig
    config: SVFormerConfig
    # Compiled generation wants a static cache, and there is none that shares values.
    _can_compile_fullgraph = False


class SVFormerModel(SVFormerPreTrainedModel, ResFormerModel):
    """SVFormer's decoder: only anchor layers have a value projection."""


class SVFormerForCausalLM(SVFormerPreTrainedModel, ResFormerForCausalLM):
    """SVFormer with a language model head. ``generate`` makes a :class:`SharedValueCache` by itself."""


def _new_cache(config: ResFormerConfig) -> Cache:
    return SharedValueCache(config) if config.stores_keys_without_values else DynamicCache(config=config)


def _check_cache(cache: Cache, config: ResFormerConfig) -> None:
    if config.stores_keys_without_values:
        if not isinstance(cache, SharedValueCache):
            raise UserError(
                f"{config.model_type} keeps values of its anchor layers only, which a {type(cache).__name__} cannot "
                "hold: pass past_key_values=SharedValueCache(model.config), or none."
            )
        if cache.value_layers != config.value_layers:
            raise UserError(
                f"This cache has values of the layers {list(cache.value_layers)}, but the model's anchors are "
                f"{list(config.value_layers)}: make it with SharedValueCache(model.config)."
            )
    elif isinstance(cache, SharedValueCache):
        raise UserError(
            f"A SharedValueCache drops values that {config.model_type} needs: pass a DynamicCache, or none."
        )
