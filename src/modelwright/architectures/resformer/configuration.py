"""Configurations of ResFormer and SVFormer: a Llama, and how its layers share values.

Layers are counted from 0, as ``layer_idx`` does: the paper's layer ``n`` is layer ``n - 1`` here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from modelwright.errors import UserError, did_you_mean

Mode = Literal["none", "identity", "constant", "learnable", "learnable_plus", "sparse", "token_gate"]

#: ``(lambda_first, lambda_current)`` where a mode is not given any. Of "learnable_plus" only the second is used.
_DEFAULT_COEFFICIENTS: dict[str, tuple[float, float]] = {
    "none": (0.0, 1.0),
    "identity": (0.5, 0.5),
    "constant": (2.0, 1.0),
    "learnable": (0.5, 0.5),
    "learnable_plus": (0.5, 0.5),
    "sparse": (5.0, 1.0),
    "token_gate": (0.5, 0.5),
}


@dataclass
class ValueResidualConfig:
    """How the first layer's values ``V_1`` enter the values of later layers.

    Every mode is ``V'_n = lambda_first_n * V_1 + lambda_current_n * V_n``, before attention (arXiv 2410.17897 v5,
    section 3); they differ in where the two coefficients come from.

    - ``"none"``: ``(0, 1)``, a plain Llama.
    - ``"identity"``: ``(0.5, 0.5)``, the ResFormer of v1 and of the official code.
    - ``"constant"``: one fixed pair; the default ``(2, 1)`` is the best one of the ablation in v2 and v3.
    - ``"learnable"``: a pair of scalars per layer, starting from the given pair (v3 and later).
    - ``"learnable_plus"``: ``lambda_first_n = s * softmax(theta)_n`` over the mixing layers, with ``theta = 0`` and the
      shared ``s`` = number of layers at the start, and a free ``lambda_current_n``. The formula and its initial values
      are those of a third-party port of v4/v5; they were not checked against the paper. With ``layers`` given,
      the softmax runs over those layers only (our choice).
    - ``"sparse"``: fixed coefficients at a few late layers, ``(0, 1)`` at the others. Which layers and which numbers
      v4/v5 use was not checked: the pair defaults to the port's ``lambda_first = 5`` with ``lambda_current = 1``, and
      ``layers`` to the last third of the layers, rounded up (our choice: layers 6 to 8 of 8 in the paper's counting).
    - ``"token_gate"``: a gate per token and key/value head, ``lambda_current = sigmoid(W h + b)`` and
      ``lambda_first = 1 - lambda_current``, with ``h`` the layer's normalised input. It is not of the paper: small
      models in the wild use it (x-transformers). ``b`` starts so that the gate gives the chosen pair at ``W h = 0``.

    Attributes:
        mode: One of the above.
        lambda_first: Coefficient of ``V_1``, or the value it starts from. None means the mode's default.
        lambda_current: Coefficient of ``V_n``, or the value it starts from. None means the mode's default.
        layers: Layers that mix, between 1 and N - 1 counted from 0. None means every layer after the first (for
            ``"sparse"``: the last third).

    Raises:
        UserError: The mode is unknown, or the coefficients do not fit it.
    """

    mode: Mode = "identity"
    lambda_first: float | None = None
    lambda_current: float | None = None
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UserError(f"There is no value residual mode {self.mode!r}: {did_you_mean(self.mode, get_args(Mode))}")
        first, current = _DEFAULT_COEFFICIENTS[self.mode]
        if self.mode == "learnable_plus" and self.lambda_first is not None and self.lambda_first != first:
            raise UserError(
                "Mode 'learnable_plus' takes no lambda_first: it is scale * softmax(theta). Leave it out, or choose "
                "mode 'learnable'."
            )
        for name, value in (("lambda_first", self.lambda_first), ("lambda_current", self.lambda_current)):
            if value is not None and not isinstance(value, Real):
                raise UserError(f"The value residual's {name} must be a number, not {value!r}.")
        self.lambda_first = float(first if self.lambda_first is None else self.lambda_first)
        self.lambda_current = float(current if self.lambda_current is None else self.lambda_current)
        if not (math.isfinite(self.lambda_first) and math.isfinite(self.lambda_current)):
            raise UserError(
                f"The value residual's coefficients must be finite, not {self.lambda_first} and {self.lambda_current}."
            )
        if self.mode in ("none", "identity") and (self.lambda_first, self.lambda_current) != (first, current):
            raise UserError(
                f"Mode {self.mode!r} has the fixed coefficients ({first}, {current}), not ({self.lambda_first}, "
                f"{self.lambda_current}): choose mode 'constant' to set them."
            )
        if self.mode == "token_gate" and not (
            self.lambda_first > 0
            and self.lambda_current > 0
            and math.isclose(self.lambda_first + self.lambda_current, 1)
        ):
            raise UserError(
                "Mode 'token_gate' starts from two positive coefficients that add up to 1, not "
                f"({self.lambda_first}, {self.lambda_current})."
            )
        if self.layers is not None:
            self.layers = _checked_layers("The value residual's layers", self.layers)

    @classmethod
    def of(cls, value: ValueResidualConfig | Mapping[str, Any] | None) -> ValueResidualConfig:
        """Returns ``value`` as an instance: a mapping (from config.json) becomes one, None the default.

        Raises:
            UserError: It is neither, or a key is unknown.
        """
        if isinstance(value, ValueResidualConfig):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise UserError(
                f"value_residual must be a ValueResidualConfig or a mapping of its settings, such as "
                f"{{'mode': 'constant'}}, not {value!r}."
            )
        settings = dict(value or {})
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise UserError(f"The value residual has no setting '{key}': {did_you_mean(key, known)}")
        return cls(**settings)

    @property
    def coefficients(self) -> tuple[float, float]:
        """``(lambda_first, lambda_current)``."""
        assert self.lambda_first is not None
        assert self.lambda_current is not None
        return self.lambda_first, self.lambda_current

    def mixing_layers(self, num_layers: int, value_layers: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the layers that mix ``V_1`` into their values.

        Args:
            num_layers: Number of layers, N.
            value_layers: Layers that have a value projection.

        Raises:
            UserError: ``layers`` names one that cannot mix, or ``learnable_plus`` has none to mix.
        """
        if self.mode == "none":
            return ()
        candidates = [layer for layer in value_layers if layer > 0]
        if self.layers is not None:
            for layer in self.layers:
                if layer not in candidates:
                    raise UserError(
                        f"Value residual layer {layer} does not exist or cannot mix: with {num_layers} layers it must "
                        f"be one of {candidates} (counted from 0; layer 0 gives the values)."
                    )
            chosen = tuple(self.layers)
        elif self.mode == "sparse":
            first_late = num_layers - math.ceil(num_layers / 3)
            chosen = tuple(layer for layer in candidates if layer >= first_late)
        else:
            chosen = tuple(candidates)
        if self.mode == "learnable_plus" and not chosen:
            raise UserError(
                f"Mode 'learnable_plus' shares its scale among the layers after the first, but a model of {num_layers} "
                "layer(s) has none that mixes: use more layers, or another mode."
            )
        return chosen


def _checked_layers(what: str, layers: Any) -> list[int]:
    if not isinstance(layers, list | tuple) or not all(isinstance(layer, Integral) for layer in layers):
        raise UserError(f"{what} must be a list of whole numbers, such as [0, 2], not {layers!r}.")
    return sorted({int(layer) for layer in layers})


@strict
class ResFormerConfig(LlamaConfig):
    """A Llama whose later layers add the first layer's values to their own (ResFormer), and its baselines.

    All the fields of ``LlamaConfig``, and:

    Attributes:
        value_residual: Where ``V_1`` enters; a :class:`ValueResidualConfig` or a mapping of its fields.
        neutreno_lambda: NeuTRENO (baseline): ``lam * (V_1 - V_n)`` is added after attention and before the output
            projection; 0 switches it off. The paper's file uses 0.4, and 0.2 together with ResFormer.
        denseformer: DenseFormer (baseline): after each block the state becomes a learned weighted sum of the
            embeddings and of every block's output so far, initially just the last (arXiv 2402.02622; from memory).
        cla_group_size: Cross-layer attention (baseline): so many neighbouring layers share keys and values; 1 is
            off and 2 is CLA-2, which halves the cache.
        value_scale: Control: values of every layer after the first are multiplied by this constant. ``(2, 1)`` makes
            the values ``sqrt(5)`` times longer at initialisation; this does nothing else.

    Raises:
        UserError: Two settings contradict, or layers differ in their key/value width.
    """

    model_type = "resformer"
    # A pipeline stage passes on nothing but hidden states, so V_1 would not reach the next one.
    base_model_pp_plan = None

    value_residual: ValueResidualConfig | dict | None = None
    neutreno_lambda: float = 0.0
    denseformer: bool = False
    cla_group_size: int = 1
    value_scale: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.value_residual = ValueResidualConfig.of(self.value_residual)
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Checks the settings against each other; the model does so again, as configs may be edited.

        Raises:
            UserError: They contradict.
        """
        if getattr(self, "is_heterogeneous", False):
            widths = sorted({layer.num_key_value_heads * layer.head_dim for layer in self.per_layer_config})
            raise UserError(
                f"Values can only be shared between layers that are alike, but this configuration changes "
                f"{', '.join(sorted(self.per_layer_attributes))} per layer (widths of the values: {widths})."
            )
        if self.num_hidden_layers < 1:
            raise UserError(f"num_hidden_layers must be at least 1, not {self.num_hidden_layers}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        windows = set(getattr(self, "layer_types", None) or []) - {"full_attention"}
        if windows or getattr(self, "sliding_window", None) is not None:
            raise UserError(f"{self.model_type} has no sliding windows: leave out sliding_window and layer_types.")
        if not (math.isfinite(self.neutreno_lambda) and math.isfinite(self.value_scale)):
            raise UserError(
                f"neutreno_lambda and value_scale must be finite, not {self.neutreno_lambda} and {self.value_scale}."
            )
        if not 1 <= self.cla_group_size <= self.num_hidden_layers:
            raise UserError(
                f"cla_group_size must be between 1 and the number of layers ({self.num_hidden_layers}), not "
                f"{self.cla_group_size}."
            )
        if self.neutreno_lambda and len(self.value_layers) < self.num_hidden_layers:
            raise UserError(
                "NeuTRENO needs the values of every layer: set neutreno_lambda = 0 where layers share values."
            )
        _ = self.mixing_layers

    @property
    def key_layers(self) -> tuple[int, ...]:
        """Layers that have a key projection; the others use the keys of the last one before them."""
        return tuple(range(0, self.num_hidden_layers, self.cla_group_size))

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Layers that have a value projection; the others use the values of the last one before them."""
        return self.key_layers

    @property
    def mixing_layers(self) -> tuple[int, ...]:
        """Layers that mix the first layer's values into their own."""
        return ValueResidualConfig.of(self.value_residual).mixing_layers(self.num_hidden_layers, self.value_layers)

    @property
    def stores_keys_without_values(self) -> bool:
        """Whether some layer caches keys but no values, so that a :class:`SharedValueCache` is needed."""
        return bool(set(self.key_layers) - set(self.value_layers))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as they are written to config.json."""
        output = super().to_dict()
        output["value_residual"] = asdict(ValueResidualConfig.of(self.value_residual))
        return output


@strict
class SVFormerConfig(ResFormerConfig):
    """A Llama in which only a few layers compute values, and the rest use theirs (SVFormer).

    Attributes:
        value_anchors: Layers, counted from 0, that have a value projection. The headline SVFormer has the first
            only; the ablation's further anchors recompute values and share them up to the next anchor.

    Raises:
        UserError: An anchor does not exist, layer 0 is not one, or a value residual is asked for as well.
    """

    model_type = "svformer"

    value_anchors: list[int] | tuple[int, ...] = (0,)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.value_residual is None:
            self.value_residual = ValueResidualConfig(mode="none")
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """See :meth:`ResFormerConfig.check`."""
        keys = self.key_layers
        for anchor in _checked_layers("value_anchors", self.value_anchors):
            if anchor not in keys:
                raise UserError(
                    f"Value anchor {anchor} is not one of the layers that have keys of their own: {list(keys)} "
                    "(counted from 0)."
                )
        if 0 not in self.value_anchors:
            raise UserError(
                f"Layer 0 must be a value anchor, or it would have no values: got {list(self.value_anchors)}."
            )
        if ValueResidualConfig.of(self.value_residual).mode != "none" or self.neutreno_lambda or self.value_scale != 1:
            raise UserError(
                "SVFormer's layers have no values of their own to mix: leave out value_residual, neutreno_lambda and "
                "value_scale, or use ResFormerConfig."
            )
        super().check()

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Layers that have a value projection; the others use the values of the last one before them."""
        return tuple(_checked_layers("value_anchors", self.value_anchors))
