"""The small network that makes the logits of all gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Hypernetwork(nn.Module):
    """Logits of every selection (section 3.3): fixed inputs, a bidirectional GRU, LayerNorm, GELU, a linear map each.

    The inputs are random and stay as they are, as the paper says (the release trains them by oversight). The sequence
    is the selections in network order, so that a block's gates can follow those of its neighbours.

    Args:
        sizes: Gates of each selection.
        network: ``gru``; ``linear``: a linear map in the GRU's place; ``none``: the logits themselves are parameters.
        inputs: Width of the inputs.
        hidden: Width of each direction.
        offset: Added to all logits.
        seed: Of inputs and first weights; the global random state is left as it was.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        network: str = "gru",
        inputs: int = 32,
        hidden: int = 64,
        offset: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.offset = network, offset
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            if network == "none":
                self.logits = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
                return
            self.register_buffer("inputs", torch.randn(len(sizes), inputs))
            self.mix: nn.Module = (
                nn.GRU(inputs, hidden, bidirectional=True) if network == "gru" else nn.Linear(inputs, 2 * hidden)
            )
            self.norm = nn.LayerNorm(2 * hidden)
            self.heads = nn.ModuleList([nn.Linear(2 * hidden, size, bias=False) for size in sizes])

    def forward(self) -> list[torch.Tensor]:
        """Returns the logits, offset included: one (size,) float32 tensor a selection."""
        if self.network == "none":
            return [logits + self.offset for logits in self.logits]
        mixed = self.mix(self.inputs)
        features = nn.functional.gelu(self.norm(mixed[0] if self.network == "gru" else mixed))
        return [head(row) + self.offset for head, row in zip(self.heads, features, strict=True)]
