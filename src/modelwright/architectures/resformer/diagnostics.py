"""What the paper looks at: how concentrated attention is, and what its values look like.

These work on any Hugging Face causal language model that can return attention weights, ours and a plain Llama alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from modelwright.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ConcentrationReport:
    """Diagnostics by layer, first layer first; averages over the sequences of a batch, natural logarithms.

    Attributes:
        entropy_by_layer: Entropy of the tokens' importance, in nats; low = attention is concentrated on few tokens.
        entropy_limit: The largest entropy possible (all tokens equally important), in nats.
        sink_mass_by_layer: Share of all attention that goes to the first token.
        token_similarity_by_layer: Mean cosine similarity between the block's outputs at different tokens
            (1 = over-smoothed).
        value_norm_first_by_layer: Length of the attended value vector (all heads together) at the first token.
        value_norm_rest_by_layer: Its mean length at the other tokens. Much more than at the first: value-state drain.
        residual_norm_first_by_layer: Length of the block's output at the first token.
        residual_norm_rest_by_layer: Its mean length at the other tokens. Much less than at the first: residual peak.
        value_spectrum_by_layer: Eigenvalues, largest first, of ``(1 / l) sum_i v_i v_i^T`` over all tokens.
    """

    entropy_by_layer: list[float]
    entropy_limit: float
    sink_mass_by_layer: list[float]
    token_similarity_by_layer: list[float]
    value_norm_first_by_layer: list[float]
    value_norm_rest_by_layer: list[float]
    residual_norm_first_by_layer: list[float]
    residual_norm_rest_by_layer: list[float]
    value_spectrum_by_layer: list[list[float]]


def attention_entropy(attention: torch.Tensor) -> torch.Tensor:
    """Returns the entropy of the importance of tokens, in nats (the paper's attention concentration).

    With ``A`` averaged over heads, token ``j`` has importance ``a_j = sum_i A_ij``; the entropy is that of
    ``a / sum a``: ``log(tokens)`` when all are equally important and 0 when one takes everything.

    Args:
        attention: ``(heads, tokens, tokens)``, rows adding up to 1.

    Returns:
        A scalar, float64.
    """
    importance = attention.double().mean(0).sum(0)
    return torch.special.entr(importance / importance.sum()).sum()


def token_similarity(states: torch.Tensor) -> torch.Tensor:
    """Returns the mean cosine similarity of different rows of ``(tokens, width)``; NaN for a single row."""
    unit = nn.functional.normalize(states.double(), dim=-1)
    tokens = len(unit)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (tokens * (tokens - 1))


def value_spectrum(values: torch.Tensor) -> torch.Tensor:
    """Returns the eigenvalues, largest first, of ``(1 / l) sum_i v_i v_i^T`` for ``(tokens, width)`` values."""
    return torch.linalg.svdvals(values.double()).square() / len(values)


@torch.no_grad()
def attention_concentration(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor] | torch.Tensor
) -> ConcentrationReport:
    """Runs a batch through a model and measures its attention, values and hidden states by layer.

    The model is in evaluation mode with eager attention meanwhile, and afterwards as it was. The values are those that
    are attended over: for ResFormer the mixed ones, for SVFormer the anchor's. If there is padding, each sequence is
    run alone without it, so it cannot touch the numbers.

    Args:
        model: A causal language model with attention in every layer.
        batch: ``input_ids`` ``(batch, tokens)`` and, if there is padding on either side, ``attention_mask``; or just
            the ids. Other entries are ignored.

    Raises:
        UserError: The model does not return attention weights or keep values, or a sequence has fewer than 2 tokens.
    """
    ids = batch if isinstance(batch, torch.Tensor) else batch["input_ids"]
    mask = None if isinstance(batch, torch.Tensor) else batch.get("attention_mask")
    ids = ids.to(model.device)
    mask = torch.ones_like(ids) if mask is None else mask.to(model.device)
    if int(mask.sum(-1).min()) < 2:
        raise UserError("Attention concentration needs sequences of at least 2 tokens; one in the batch is shorter.")

    # Rows of padding, which attend to nothing, are NaN in float64, and GPT-2 counts its positions from the padding.
    kept = mask.bool()
    batches = [ids] if kept.all() else [row[keep].unsqueeze(0) for row, keep in zip(ids, kept)]
    measured: list[torch.Tensor] = []
    values: list[list[torch.Tensor]] = []
    with _as_measured(model):
        for part in batches:
            numbers, vectors = _measure(model, part)
            measured.append(numbers)
            values.append(vectors)
    entropy, sink, similarity, value_first, value_rest, state_first, state_rest = torch.cat(measured).mean(0).tolist()
    spectra = [value_spectrum(torch.cat(layer)).tolist() for layer in zip(*values)]
    return ConcentrationReport(
        entropy_by_layer=entropy,
        entropy_limit=float(mask.sum(-1).double().log().mean()),
        sink_mass_by_layer=sink,
        token_similarity_by_layer=similarity,
        value_norm_first_by_layer=value_first,
        value_norm_rest_by_layer=value_rest,
        residual_norm_first_by_layer=state_first,
        residual_norm_rest_by_layer=state_rest,
        value_spectrum_by_layer=spectra,
    )


def _measure(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns seven numbers of each sequence, ``(batch, 7, layers)``, and each layer's ``(tokens, width)`` values."""
    with _block_outputs(model) as states:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True, use_cache=True)
    attentions, cache = output.get("attentions"), output.get("past_key_values")
    if not attentions or len(attentions) != len(states) or any(a is None for a in attentions) or cache is None:
        raise UserError(
            f"A '{model.config.model_type}' model does not give attention weights in every layer to measure."
        )
    layers, vectors = [], []
    for layer, (attention, state) in enumerate(zip(attentions, states)):
        value = _values(cache, layer, ids.shape[-1]).transpose(1, 2).flatten(-2)
        norms, lengths = value.double().norm(dim=-1), state.double().norm(dim=-1)
        numbers = [
            torch.stack([attention_entropy(one) for one in attention]),
            attention[..., 0].double().mean((1, 2)),
            torch.stack([token_similarity(one) for one in state]),
            norms[:, 0], norms[:, 1:].mean(-1), lengths[:, 0], lengths[:, 1:].mean(-1),
        ]  # fmt: skip
        # On the processor: with a device map, layers may be on several devices.
        layers.append(torch.stack(numbers, dim=-1).cpu())
        vectors.append(value.flatten(0, 1).cpu())
    return torch.stack(layers, dim=-1), vectors


def _values(cache: Any, layer: int, tokens: int) -> torch.Tensor:
    # The cache holds exactly what is attended over, whatever the family calls its projections.
    if hasattr(cache, "values_of"):
        return cache.values_of(layer)
    for candidate in range(layer, -1, -1):  # a layer that stores none uses those of one before it
        values = getattr(cache.layers[candidate], "values", None)
        if values is not None and values.numel():
            if values.shape[-2] != tokens:
                raise UserError(
                    "The model's sliding window is shorter than the batch, so not all values are kept: use less."
                )
            return values
    raise UserError("The model's cache holds no values to measure.")


@contextlib.contextmanager
def _as_measured(model: PreTrainedModel) -> Iterator[None]:
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


@contextlib.contextmanager
def _block_outputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    # Hooks rather than output_hidden_states, whose last entry has been through the final norm.
    count = model.config.num_hidden_layers
    blocks = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if blocks is None:
        raise UserError(f"The blocks of a '{model.config.model_type}' model were not found, so it cannot be measured.")
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def relative_loss(
    log_a: Sequence[float] | Sequence[Mapping[str, Any]],
    log_b: Sequence[float] | Sequence[Mapping[str, Any]],
    window: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smoothed training loss of a run minus that of its baseline, at the steps that both logged.

    Args:
        log_a: The run: losses by step, or rows with ``step`` and ``loss`` (such as ``training_log.jsonl`` or
            ``trainer.state.log_history``; rows without a loss are skipped).
        log_b: The baseline, likewise.
        window: Losses are averaged over the last so many steps (fewer at the start).

    Returns:
        Steps, int64, and differences ``a - b``, float64, both ``(n,)``; negative = the run is better.

    Raises:
        UserError: The window is below 1, or the logs have no step in common.
    """
    if window < 1:
        raise UserError(f"The smoothing window must be at least 1 step, not {window}.")
    a, b = (_smoothed(log, window) for log in (log_a, log_b))
    steps = sorted(a.keys() & b.keys())
    if not steps:
        raise UserError("The two training logs have no step in common, so their losses cannot be compared.")
    return np.array(steps, dtype=np.int64), np.array([a[s] - b[s] for s in steps], dtype=np.float64)


def _smoothed(log: Sequence[Any], window: int) -> dict[int, float]:
    rows = [(row["step"], row["loss"]) if isinstance(row, Mapping) else (i, row)
            for i, row in enumerate(log) if not isinstance(row, Mapping) or "loss" in row]  # fmt: skip
    steps = np.array([step for step, _ in rows], dtype=np.int64)
    total = np.concatenate([[0.0], np.cumsum([float(loss) for _, loss in rows])])
    begin = np.searchsorted(steps, steps - window, side="right")
    end = np.arange(1, len(steps) + 1)
    return dict(zip(steps.tolist(), ((total[end] - total[begin]) / (end - begin)).tolist()))
