"""Weight decay and rare tokens: loss by frequency over lambda, beside other regularisers, on both kinds of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelwright.verify.claim import Bar, Claim, Context, Metric

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from modelwright.probing.fair_lm.bins import FrequencyBins

#: The seed that rates and strengths are chosen on; it is not among the claim's seeds.
TUNING_SEED = 1_000_003
#: Variant to lambda and the parameters that it acts on.
DECAYS: dict[str, tuple[float, Any]] = {
    "decay_1": (1.0, "all"),
    "decay_0.3": (0.3, "all"),
    "decay_0.1": (0.1, "all"),
    "decay_0": (0.0, "all"),
    "body_1": (1.0, "body"),
    "embeddings_1": (1.0, "embeddings"),
    "head_1": (1.0, "head"),
}
VARIANTS = {
    "decay_1": "λ = 1.0, all parameters",
    "decay_0.3": "λ = 0.3",
    "decay_0.1": "λ = 0.1 (usual in practice)",
    "decay_0": "λ = 0",
    "body_1": "λ = 1.0 on the blocks' matrices only",
    "embeddings_1": "λ = 1.0 on the embeddings only",
    "head_1": "λ = 1.0 on the head only",
    "dropout": "dropout, λ = 0",
    "smoothing": "label smoothing, λ = 0",
}


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        shape: Sizes of the model, as in ``GPT2Config``; embedding and head are apart.
        length: Tokens in a sequence.
        batch: Sequences in a step.
        steps: Steps of training.
        warmup: Steps of warm-up.
        rates: Learning rates that lambda 0 is tried with, on the tuning seed.
        dropouts: Strengths of which the one is taken whose average training loss is nearest to that of lambda 1.
        smoothings: Likewise.
        variants: Those that are run.
        types: Types of the Zipf law, or the size of the BPE on text.
        sequences: Sequences drawn from the law; 0 takes the standard library's text.
        world: Parameters of the world ``stdlib_text``.
        measured: Tokens of each split that are measured, at most.
    """

    shape: Mapping[str, int]
    length: int
    batch: int
    steps: int
    warmup: int
    rates: tuple[float, ...]
    dropouts: tuple[float, ...]
    smoothings: tuple[float, ...]
    variants: tuple[str, ...] = tuple(VARIANTS)
    types: int = 600
    sequences: int = 150
    world: Mapping[str, Any] = field(default_factory=dict)
    measured: int = 300_000


SETTINGS = {
    "miniature": Setting(
        shape={"n_embd": 16, "n_layer": 1, "n_head": 2},
        length=8,
        batch=4,
        steps=4,
        warmup=1,
        rates=(3e-3, 6e-3),
        dropouts=(0.1, 0.2),
        smoothings=(0.1,),
        types=40,
        sequences=20,
    ),
    # Text that can only be learnt by heart, as the paper's was (98.8% training accuracy).
    "cpu": Setting(
        shape={"n_embd": 64, "n_layer": 2, "n_head": 4},
        length=24,
        batch=16,
        steps=450,
        warmup=50,
        sequences=100,
        rates=(1.5e-3, 3e-3, 6e-3),
        dropouts=(0.02, 0.05),
        smoothings=(0.02, 0.1),
    ),
    "gpu": Setting(
        shape={"n_embd": 512, "n_layer": 8, "n_head": 8},
        length=128,
        batch=32,
        steps=1200,
        warmup=60,
        rates=(3e-4, 1e-3),
        dropouts=(0.1,),
        smoothings=(0.1,),
        variants=("decay_1", "decay_0.3", "decay_0.1", "decay_0", "dropout", "smoothing"),
        types=8192,
        sequences=0,
        world={"pool_chunks": 7000, "target_chunks": 1, "heldout_chunks": 1},
    ),
}


def prepare(context: Context) -> dict[str, Any]:
    """Chooses, on a seed of its own, the learning rate of lambda 0 and the strengths of the other regularisers.

    The rate is everyone's, as in the paper, where only lambda changes. Dropout and label smoothing are taken as strong
    as costs the training average most nearly what lambda 1 costs it, so that they differ in whom they hurt and less in
    how much.
    """
    setting = SETTINGS[context.scale]
    data = _data(setting, TUNING_SEED)

    def average(variant: str, rate: float, strength: float = 0.0) -> float:
        found, _ = _run(variant, setting, TUNING_SEED, data, rate, strength, context.device)
        value = found["curve"][-1]["train"]["average"]
        context.report(f"{variant} at {rate:g}, strength {strength:g}: {value:.4f} nats")
        return value

    losses: dict[str, Any] = {"decay_0": {f"{rate:g}": average("decay_0", rate) for rate in setting.rates}}
    rate = float(min(losses["decay_0"], key=lambda rate: losses["decay_0"][rate]))
    chosen: dict[str, Any] = {"learning_rate": rate, "training_loss": losses}
    grids = {"dropout": setting.dropouts, "smoothing": setting.smoothings}
    if any(len(grid) > 1 for grid in grids.values()):
        losses["decay_1"] = average("decay_1", rate)
    for variant, grid in grids.items():
        chosen[variant] = grid[0]
        if len(grid) > 1:
            losses[variant] = {f"{strength:g}": average(variant, rate, strength) for strength in grid}
            target = losses["decay_1"]
            chosen[variant] = min(grid, key=lambda strength: abs(losses[variant][f"{strength:g}"] - target))
    return chosen


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Trains every variant on the same sequences in the same order, and measures training and held-out text."""
    from modelwright.probing.fair_lm.sweep_compare import at_training_loss

    setting = SETTINGS[context.scale]
    data = _data(setting, seed)
    runs = {}
    for variant in setting.variants:
        strength = prepared.get(variant, 0.0)
        runs[variant] = _run(variant, setting, seed, data, prepared["learning_rate"], strength, context.device)
        context.report(f"{variant}: {runs[variant][0]['curve'][-1]['train']['balanced']:.4f} nats, token-balanced")
    swept = [v for v in setting.variants if DECAYS.get(v, (0, ""))[1] == "all"]
    # The lowest average training loss that every lambda reaches.
    target = max(min(p["train"]["average"] for p in runs[v][0]["curve"]) for v in swept)
    measured: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
    for variant, (found, bins) in runs.items():
        values = measured[variant] = _measure(found, bins)
        if (equal := at_training_loss(found["curve"], target)) is not None:
            values["equal_balanced"] = equal["train_balanced"]
    base = dict(measured["decay_0"])
    for variant in runs:
        values = measured[variant]
        for name in ("average", "balanced", "rare", "frequent"):
            values[f"{name}_over"] = values[name] / base[name]
        values["uneven"] = values["balanced_over"] / values["average_over"]
        values["rare_uneven"] = values["rare_over"] / values["frequent_over"]
        values["heldout_rare_over"] = values["heldout_rare"] / base["heldout_rare"]
    return measured


def _measure(found: Mapping[str, Any], bins: FrequencyBins) -> dict[str, float]:
    last = found["curve"][-1]
    values = {}
    for split, prefix in (("train", ""), ("heldout", "heldout_")):
        trained = [row for row in last[split]["bins"] if row["bin"] > 0]
        values[f"{prefix}average"] = last[split]["average"]
        values[f"{prefix}balanced"] = last[split]["balanced"]
        values[f"{prefix}rare"], values[f"{prefix}frequent"] = trained[0]["loss"], trained[-1]["loss"]
    values["accuracy"], values["balanced_accuracy"] = last["train"]["accuracy"], last["train"]["balanced_accuracy"]
    values["slope"] = last["train"]["slope"]
    values["speed_gap"] = found["learning_speed"]["train"]["auc"]["gap"]
    values["sum_lr_lambda"] = found["sum_lr_lambda"]
    return values


@dataclass(frozen=True)
class Data:
    """Training tokens, ``(tokens,)``, and sequences of both splits to measure on, ``(n, length)``."""

    train: np.ndarray
    splits: Mapping[str, np.ndarray]


def _data(setting: Setting, seed: int) -> Data:
    import numpy as np

    from modelwright.probing.fair_lm.sweep_run import pick_blocks

    if setting.sequences:
        weights = np.arange(1, setting.types + 1) ** -1.2
        generator = np.random.default_rng(seed)
        size = (2, setting.sequences * setting.length)
        train, heldout = generator.choice(setting.types, size, p=weights / weights.sum()).astype(np.uint16)
    else:
        train, heldout = _text(setting, seed)
    blocks = {n: pick_blocks(s, setting.length, setting.measured) for n, s in (("train", train), ("heldout", heldout))}
    return Data(train, blocks)


def _text(setting: Setting, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from modelwright.models.tokenizers import train_bpe
    from modelwright.training.packing import tokenize
    from modelwright.worlds.stdlib_text import stdlib_text

    pool = stdlib_text(seed, **setting.world).pool
    # Every tenth file or topic: chunks of one file are too alike to be on both sides.
    held = set(sorted({row["name"] for row in pool})[seed % 10 :: 10])
    texts = {flag: [row["text"] for row in pool if (row["name"] in held) is flag] for flag in (False, True)}
    tokenizer = train_bpe(texts[False], setting.types)
    return tokenize(texts[False], tokenizer).tokens, tokenize(texts[True], tokenizer).tokens


def build(setting: Setting, seed: int, dropout: float = 0.0) -> PreTrainedModel:
    """Returns an untrained GPT-2: of the families that are there, the one with dropout everywhere."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from modelwright.models.tiny import seeded

    # GPT-2's 0.02 is for widths from 512 on; below, weights begin larger, so that activations start as large as there.
    spread = max(0.02, 0.02 * math.sqrt(512 / setting.shape["n_embd"]))
    config = GPT2Config(
        initializer_range=spread,
        vocab_size=setting.types, n_positions=setting.length, tie_word_embeddings=False, attn_pdrop=dropout,
        embd_pdrop=dropout, resid_pdrop=dropout, bos_token_id=None, eos_token_id=None, **setting.shape,
    )  # fmt: skip
    with seeded(seed):
        return GPT2LMHeadModel(config)


def _run(
    variant: str, setting: Setting, seed: int, data: Data, rate: float, strength: float, device: str
) -> tuple[dict[str, Any], FrequencyBins]:
    from modelwright.probing.fair_lm.bins import frequency_bins
    from modelwright.probing.fair_lm.sweep_run import count_blocks, run_once
    from modelwright.training.options import TrainingOptions

    model = build(setting, seed, strength if variant == "dropout" else 0.0)
    if variant == "smoothing":
        model.loss_function = _smoothed(strength)
    decay, on = DECAYS.get(variant, (0.0, "all"))
    bins = frequency_bins(count_blocks(data.train, setting.length, setting.types))
    options = TrainingOptions(
        steps=setting.steps, batch_size=setting.batch, block_size=setting.length, learning_rate=rate,
        schedule="linear", warmup=setting.warmup, weight_decay=decay, seed=seed, log_every=setting.steps,
        save_minutes=0, device=device,
    )  # fmt: skip
    found, _ = run_once(model, data.train, data.splits, bins, options, decay_on=on)
    return found, bins


def _smoothed(strength: float) -> Any:
    def loss(logits: Any, labels: Any, vocab_size: int, **keys: Any) -> Any:
        import torch

        return torch.nn.functional.cross_entropy(
            logits[:, :-1].float().reshape(-1, vocab_size), labels[:, 1:].reshape(-1), label_smoothing=strength
        )

    return loss


CLAIM = Claim(
    method="fair-lm",
    statement=(
        "Raising weight decay moves the average training loss little and the loss averaged over token types much more: "
        "rare types pay, frequent ones do not, and they are learnt more slowly; at 0.1 there is next to nothing to see."
    ),
    paper=(
        "λ 0.0 to 1.0, one model on IMDB: average training loss 0.051 to 0.068, token-balanced 0.066 to 0.163, "
        "balanced accuracy 98.80% to 98.71% (Table 1); training text only."
    ),
    metrics={
        "balanced": Metric(name="token-balanced training loss", unit="nats"),
        "average": Metric(name="average training loss", unit="nats"),
        "rare": Metric(name="training loss, rarest bin", unit="nats"),
        "frequent": Metric(name="training loss, most frequent bin", unit="nats"),
        "balanced_over": Metric(name="token-balanced training loss over that of λ = 0"),
        "average_over": Metric(name="average training loss over that of λ = 0"),
        "rare_over": Metric(name="rarest bin's training loss over that of λ = 0"),
        "frequent_over": Metric(name="most frequent bin's training loss over that of λ = 0"),
        "uneven": Metric(name="growth of the balanced loss over growth of the average"),
        "rare_uneven": Metric(name="growth of the rarest bin's loss over growth of the most frequent bin's"),
        "equal_balanced": Metric(name="token-balanced training loss at equal average training loss", unit="nats"),
        "slope": Metric(name="slope of a type's training loss on ln(count)", better=None),
        "speed_gap": Metric(name="learning speed, most frequent bin minus rarest"),
        "accuracy": Metric(name="training accuracy", better="higher"),
        "balanced_accuracy": Metric(name="token-balanced training accuracy", better="higher"),
        "heldout_average": Metric(name="average held-out loss", unit="nats"),
        "heldout_balanced": Metric(name="token-balanced held-out loss", unit="nats"),
        "heldout_rare": Metric(name="held-out loss, rarest bin", unit="nats"),
        "heldout_frequent": Metric(name="held-out loss, most frequent bin", unit="nats"),
        "heldout_rare_over": Metric(name="rarest bin's held-out loss over that of λ = 0"),
        "sum_lr_lambda": Metric(name="sum of learning rate times λ", better=None),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="at λ = 1.0 the token-balanced training loss is at least 2.5 times that of λ = 0",
            method="decay_0",
            baseline="decay_1",
            metric="balanced_over",
            margin=1.5,
        ),
        Bar(
            statement="it grows at least 1.5 times as much as the average does",
            method="decay_0",
            baseline="decay_1",
            metric="uneven",
            margin=0.5,
        ),
        Bar(
            statement="the rarest bin's loss grows at least 3 times as much as the most frequent bin's",
            method="decay_0",
            baseline="decay_1",
            metric="rare_uneven",
            margin=2.0,
        ),
        Bar(
            statement="frequent types are learnt faster than rare ones by more at λ = 1.0 than at λ = 0",
            method="decay_0",
            baseline="decay_1",
            metric="speed_gap",
        ),
        Bar(
            statement="also at equal average training loss the balanced loss is higher at λ = 1.0 than at λ = 0",
            method="decay_0",
            baseline="decay_1",
            metric="equal_balanced",
        ),
        Bar(
            statement="at λ = 0.1 the token-balanced training loss is at most 1.1 times that of λ = 0",
            method="decay_0.1",
            baseline="decay_0",
            metric="balanced_over",
            margin=-0.1,
        ),
        Bar(
            statement="at λ = 0.1 the average training loss is at most 1.1 times that of λ = 0",
            method="decay_0.1",
            baseline="decay_0",
            metric="average_over",
            margin=-0.1,
        ),
        Bar(
            statement="at λ = 0.1 the rarest bin's training loss is at most 1.1 times that of λ = 0",
            method="decay_0.1",
            baseline="decay_0",
            metric="rare_over",
            margin=-0.1,
        ),
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (0, 1, 2), "gpu": (0, 1), "miniature": (0, 1)},
    notes=(
        "Training text is drawn from a Zipf law and can only be learnt by heart; held-out text of the same law cannot "
        "be predicted beyond its frequencies, so there decay may help rare types, and no bar speaks of it: read both. "
        "The learning rate is the best of a grid for λ = 0 and kept for every λ, as in the paper. "
        "Of a few strengths, dropout and label smoothing have the one that costs the average most nearly what "
        "λ = 1.0 does. Decay acts as learning rate times λ: at another rate or length the same λ does something else. "
        "Not shown: models above this size, IMDB, or anything about people."
    ),
)
