"""Train on short sequences of real text, read 4 and 16 times as long ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelwright.verify.claim import Bar, Claim, Context, Metric

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

VARIANTS = {
    "harmonic": "RoPE × ALiBi, harmonic slopes (A)",
    "harmonic_distance": "RoPE × ALiBi, harmonic distance (B)",
    "geometric": "RoPE × ALiBi, ALiBi's slopes",
    "alibi": "ALiBi",
    "rope": "RoPE",
    "ntk": "RoPE, NTK by the factor of the length",
    "yarn": "RoPE, YaRN by the factor of the length",
}
#: Variants that are trained; the others are the rotary model, read differently.
TRAINED = tuple(VARIANTS)[:5]
#: Length as a multiple of the training length: metric.
TIMES = {1: "once", 4: "four", 16: "sixteen"}
TUNING_SEED = 99


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        context: Bytes of a training sequence.
        hidden: Width of the model.
        layers: Layers.
        heads: Attention heads.
        steps: Steps of training.
        batch: Sequences in a step.
        rates: Learning rates to choose from.
        heldout: Bytes of held-out text that are read at each length.
        chunks: Chunks of text to train on.
    """

    context: int
    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    heldout: int
    chunks: int


SETTINGS = {
    "miniature": Setting(16, 16, 1, 2, 3, 2, (1e-3, 1e-2), 1024, 20),
    "cpu": Setting(64, 64, 2, 4, 200, 16, (3e-3, 1e-2), 16_384, 600),
    # Not yet run. Some 30 trainings of 400 steps, whose time is launches.
    "gpu": Setting(512, 256, 6, 8, 400, 32, (1e-3, 2e-3, 4e-3), 40_960, 3000),
}


def text(chunks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes to train on and held-out ones, both of the language reference of Python, of different topics."""
    import numpy as np

    from modelwright.worlds.stdlib_text import stdlib_text

    world = stdlib_text(seed, pool_chunks=chunks, target_chunks=1, heldout_chunks=60)
    train = "\n\n".join(row["text"] for row in world.pool if row["kind"] == "reference")
    heldout = "\n\n".join(row["text"] for row in world.heldout)
    return tuple(np.frombuffer(part.encode(), dtype=np.uint8).astype(np.int64) for part in (train, heldout))  # type: ignore[return-value]


def build(variant: str, setting: Setting, seed: int) -> PreTrainedModel:
    """Returns an untrained model of a variant that is trained."""
    from transformers import LlamaConfig

    from modelwright.attention.rope_alibi import RopeAlibiConfig
    from modelwright.models.new import new_model

    config = LlamaConfig(
        vocab_size=256, hidden_size=setting.hidden, intermediate_size=8 * setting.hidden // 3,
        num_hidden_layers=setting.layers, num_attention_heads=setting.heads, max_position_embeddings=setting.context,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = new_model(config, seed)
    if variant == "alibi":
        model.model.rotary_emb.inv_freq.zero_()  # turns nothing
    if variant in ("geometric", "alibi"):
        RopeAlibiConfig(slopes="geometric").install(model)
    elif variant != "rope":
        RopeAlibiConfig(distance="harmonic" if variant == "harmonic_distance" else "linear").install(model)
    return model


def trained(variant: str, setting: Setting, seed: int, rate: float, data: np.ndarray, device: str) -> PreTrainedModel:
    """Returns a model trained on sequences that are the same, in the same order, for every variant."""
    from modelwright.training.causal_lm import train
    from modelwright.training.options import TrainingOptions

    model = build(variant, setting, seed)
    options = TrainingOptions(
        steps=setting.steps, batch_size=setting.batch, block_size=setting.context, learning_rate=rate, warmup=0.1,
        seed=seed, precision="float32", device=device,
    )  # fmt: skip
    train(model, data, options)
    return model.to(device)


def nats(model: PreTrainedModel, data: np.ndarray, length: int, device: str) -> float:
    """Returns the mean loss, nats a byte, over windows of a length that do not overlap, each read anew."""
    import torch

    windows = torch.from_numpy(data[: len(data) // length * length]).view(-1, length)
    total = 0.0
    with torch.no_grad():
        for part in windows.split(max(1, 8192 // length)):
            ids = part.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
    return total / (windows.shape[0] * (length - 1))


def prepare(context: Context) -> dict[str, Any]:
    """Chooses each trained variant's learning rate from the same grid, at the training length, on a seed of its own."""
    setting = SETTINGS[context.scale]
    data, heldout = text(setting.chunks, TUNING_SEED)
    losses: dict[str, dict[str, float]] = {}
    for variant in TRAINED:
        losses[variant] = {}
        for rate in setting.rates:
            model = trained(variant, setting, TUNING_SEED, rate, data, context.device)
            losses[variant][f"{rate:g}"] = nats(model, heldout[: setting.heldout], setting.context, context.device)
            context.report(f"{variant} at {rate:g}: {losses[variant][f'{rate:g}']:.3f} nats per byte")
    chosen = {variant: float(min(found, key=lambda rate: found[rate])) for variant, found in losses.items()}
    return {"learning_rates": chosen, "nats_at_the_training_length": losses, "grid": list(setting.rates)}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Trains every variant on the same sequences and reads the same held-out text at three lengths."""
    setting = SETTINGS[context.scale]
    data, heldout = text(setting.chunks, seed)
    measured: dict[str, dict[str, float]] = {}
    model: Any = None
    for variant in VARIANTS:
        if variant in TRAINED:
            model = trained(variant, setting, seed, prepared["learning_rates"][variant], data, context.device)
        measured[variant] = {}
        for times, metric in TIMES.items():
            with _rescaled(model, variant, times):
                found = nats(model, heldout[: setting.heldout], times * setting.context, context.device)
            measured[variant][metric] = math.exp(found)
        cells = ", ".join(f"{value:.2f}" for value in measured[variant].values())
        context.report(f"{variant}: perplexity {cells}")
    return measured


def _rescaled(model: Any, variant: str, times: int) -> contextlib.AbstractContextManager[Any]:
    from modelwright.attention.string.baselines import rescaled

    if variant not in ("ntk", "yarn") or times == 1:
        return contextlib.nullcontext()
    return rescaled(model, variant, float(times))


CLAIM = Claim(
    method="rope-alibi",
    statement="A small model that is trained with RoPE × ALiBi and harmonic slopes is as good as one with RoPE at the "
    "training length, and keeps that perplexity at 4 and 16 times the length, where RoPE falls apart.",
    paper="No numbers. The abstract proposes to factor RoPE and ALiBi together with a harmonic series.",
    metrics={
        "once": Metric(name="perplexity at the training length", unit="per byte"),
        "four": Metric(name="perplexity at 4 times the length", unit="per byte"),
        "sixteen": Metric(name="perplexity at 16 times the length", unit="per byte"),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="At 16 times the length A's perplexity is below RoPE's by 1",
            method="harmonic",
            baseline="rope",
            metric="sixteen",
            margin=1.0,
        ),
        Bar(
            statement="At the training length A is at most 0.1 worse than RoPE",
            method="harmonic",
            baseline="rope",
            metric="once",
            margin=-0.1,
        ),
        Bar(
            statement="At the training length A is better than ALiBi: the rotation is of use",
            method="harmonic",
            baseline="alibi",
            metric="once",
        ),
        Bar(
            statement="At 16 times the length A is better than the rotary model rescaled by YaRN",
            method="harmonic",
            baseline="yarn",
            metric="sixteen",
        ),
        Bar(
            statement="At 16 times the length A is better than with ALiBi's slopes: the harmonic series is of use",
            method="harmonic",
            baseline="geometric",
            metric="sixteen",
        ),
        Bar(
            statement="At 16 times the length A is better than B, so that A is the default",
            method="harmonic",
            baseline="harmonic_distance",
            metric="sixteen",
        ),
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (0, 1, 2), "gpu": (0, 1, 2), "miniature": (0, 1)},
    notes="The formula is a reconstruction, and a prototype of it on another text is what the margins were set by. NTK "
    "and YaRN read the rotary model with its frequencies rescaled by the factor of the length, and equal it at the "
    "training length. Small models on few bytes hardly use what is far away: what this shows is that far text does no "
    "harm, not that it is used. Nothing is said of large models.",
)
