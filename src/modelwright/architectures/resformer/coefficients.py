"""The small learned parts: value residual coefficients, the token gate, and DenseFormer's averages."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization as init

from modelwright.architectures.resformer.configuration import ResFormerConfig, ValueResidualConfig


class ValueResidualCoefficients(nn.Module):
    """The learned coefficients ``(lambda_first_n, lambda_current_n)`` of the modes "learnable" and "learnable_plus".

    They are kept in fp32 whatever the model's dtype, as one vector each over the mixing layers.
    """

    # Trainer leaves a parameter out of weight decay only by name, and "bias" is one of the names: hence the suffix.
    def __init__(self, config: ResFormerConfig) -> None:
        super().__init__()
        residual = ValueResidualConfig.of(config.value_residual)
        count = len(config.mixing_layers)
        self.initial = residual.coefficients
        self.initial_scale = float(config.num_hidden_layers)
        self.plus = residual.mode == "learnable_plus"
        if self.plus:
            self.theta_bias = nn.Parameter(torch.empty(count, dtype=torch.float32))
            self.scale_bias = nn.Parameter(torch.empty(1, dtype=torch.float32))
        else:
            self.lambda_first_bias = nn.Parameter(torch.empty(count, dtype=torch.float32))
        self.lambda_current_bias = nn.Parameter(torch.empty(count, dtype=torch.float32))

    def reset(self) -> None:
        """Sets the initial values, except where a checkpoint has been loaded."""
        if self.plus:
            init.zeros_(self.theta_bias)
            init.constant_(self.scale_bias, self.initial_scale)
        else:
            init.constant_(self.lambda_first_bias, self.initial[0])
        init.constant_(self.lambda_current_bias, self.initial[1])

    def forward(self) -> torch.Tensor:
        """Returns the coefficients, ``(mixing layers, 2)``: of ``V_1`` and of ``V_n``."""
        first = self.scale_bias * self.theta_bias.softmax(0) if self.plus else self.lambda_first_bias
        return torch.stack([first, self.lambda_current_bias], dim=-1)


class ValueGate(nn.Linear):
    """The gate of mode "token_gate": one logit per token and key/value head."""

    def __init__(self, config: ResFormerConfig) -> None:
        super().__init__(config.hidden_size, config.num_key_value_heads)
        residual = ValueResidualConfig.of(config.value_residual)
        first, current = residual.coefficients
        self.initial_logit = math.log(current / first)


class LayerAverage(nn.Module):
    """DenseFormer's depth-weighted average: after block ``i``, the sum over ``j <= i`` of ``alpha_ij X_j``.

    ``X_0`` are the embeddings, the other ``X_j`` the blocks' outputs before averaging. ``alpha`` starts as the
    identity, and is kept in fp32.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        # Row i holds the i + 2 weights after block i; the rest is padding that nothing reads.
        self.alpha_bias = nn.Parameter(torch.empty(num_layers, num_layers + 1, dtype=torch.float32))

    def reset(self) -> None:
        """Sets the identity, except where a checkpoint has been loaded."""
        identity = torch.zeros(self.num_layers, self.num_layers + 1)
        identity[:, 1:] = torch.eye(self.num_layers)
        init.copy_(self.alpha_bias, identity)

    def forward(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Averages ``[X_0, ..., X_i]``, each ``(batch, tokens, hidden)``."""
        weights = self.alpha_bias[len(states) - 2].to(states[0].dtype)
        average = weights[0] * states[0]
        for j, state in enumerate(states[1:], start=1):
            average = torch.addcmul(average, weights[j], state)
        return average
