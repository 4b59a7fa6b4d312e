"""Integrated gradients of neurons, and which of them a fact depends on (arXiv 2104.08696, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

import torch

#: A neuron: its layer and its number in that layer's intermediate units.
Neuron = tuple[int, int]


def points(steps: int, rule: Literal["paper", "official"] = "paper") -> torch.Tensor:
    """Returns the shares of the activations at which gradients are taken, (steps,) float64.

    Args:
        steps: How many (the paper's m).
        rule: ``paper``: j / m for j = 1 … m. ``official``: evenly from 0 to 1, as the official code has it; with one
            step that is the gradient at 0 alone.
    """
    if rule == "official":
        return torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


def integrated_gradients(
    probability: Callable[[torch.Tensor], torch.Tensor],
    activations: torch.Tensor,
    steps: int = 20,
    rule: Literal["paper", "official"] = "paper",
    batch_size: int = 20,
) -> torch.Tensor:
    """Returns each neuron's attribution: its activation times the mean of its gradient on the way from 0.

    All neurons of the layer are scaled together, so that the attributions sum to P(w̄) − P(0) as the steps grow.

    Args:
        probability: From activations (rows, n) to the answer's probability (rows,), differentiable, row by row.
        activations: (n,), the neurons' own activations w̄.
        steps: Points of the sum.
        rule: See :func:`points`.
        batch_size: Points at once.

    Returns:
        (n,) float32.
    """
    total = torch.zeros_like(activations, dtype=torch.float32)
    for shares in points(steps, rule).to(activations).split(batch_size):
        scaled = (shares[:, None] * activations).requires_grad_()
        (gradient,) = torch.autograd.grad(probability(scaled).sum(), scaled)
        total += gradient.float().sum(0)
    return activations.float() * total / steps


def strongest(attributions: torch.Tensor, threshold: float = 0.2) -> set[Neuron]:
    """Returns the neurons whose attribution is above a share of the largest one.

    Args:
        attributions: (layers, n).
        threshold: That share. Where no attribution is positive there is no such neuron.
    """
    largest = attributions.max()
    if largest <= 0:
        return set()
    return {(layer, neuron) for layer, neuron in (attributions > threshold * largest).nonzero().tolist()}


def refine(found: Iterable[set[Neuron]], share: float = 0.4) -> list[Neuron]:
    """Returns the neurons that more than a share of the prompts have in common, sorted.

    Args:
        found: The neurons of each prompt of one fact.
        share: The paper's p. With a single prompt all its neurons are kept.
    """
    sets = list(found)
    counts = Counter(neuron for neurons in sets for neuron in neurons)
    return sorted(neuron for neuron, count in counts.items() if count > share * len(sets))
