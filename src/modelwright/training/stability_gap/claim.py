"""The stability gap and its cure, in a world where knowledge and the format of a question are two things.

Every arm starts from the same pre-trained model and has the same warm-up, schedule and optimizer. Rates are chosen from
one grid for each arm on another seed, but for the three runs that show the gap itself, which share the highest.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright import catalog
from modelwright.models.tiny import tiny_model
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.stability_gap.arms import BEST, DOMAIN, Plan, frozen, frozen_part
from modelwright.training.stability_gap.callback import StabilityGapCallback
from modelwright.training.stability_gap.entities import LENGTH, EntityWorld, entity_world, texts
from modelwright.verify.claim import Bar, Claim, Context, Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The seed that learning rates are chosen on; it is not among the claim's seeds.
TUNING_SEED = 1_000_003
_GENERAL = "general"

VARIANTS = {
    "stability-gap": "recipe (I+II+III), 40% of the tokens",
    "plain": "whole domain, 100%",
    "plain-equal": "whole domain, 40%",
    "subset": "I: random subset, 40%",
    "ranked": "I+II: best subset, 40%",
    "replay": "whole domain with 10% replay, 100%",
    "replay-equal": "whole domain with 10% replay, 40%",
    "freeze-top": "whole domain, top layer frozen, 100%",
    "freeze-bottom": "whole domain, bottom layer frozen, 100%",
    "shared-recipe": "recipe, 40%, at the shared rate",
    "shared-plain": "whole domain, 100%, at the shared rate",
    "shared-control": "general text alone, 40%, at the shared rate",
    "base": "before continuing",
}
_TUNED = tuple(v for v in VARIANTS if not v.startswith("shared") and v != "base")


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        world: Parameters of the world.
        hidden: Width of the model.
        layers: Its layers.
        pretraining: Steps of pre-training, at the rate 3e-3.
        steps: Steps of an arm on the whole domain; the pool is that many batches.
        batch: Documents a step.
        rates: Peak rates that are tried for every arm; the last is the shared one.
    """

    world: dict[str, Any]
    hidden: int
    layers: int
    pretraining: int
    steps: int
    batch: int
    rates: tuple[float, ...]


SETTINGS = {
    "cpu": Setting({}, 48, 2, 700, 250, 64, (1.5e-3, 3e-3, 6e-3)),
    "gpu": Setting(
        {"general": 1600, "domain": 640, "values": 32, "pretraining": 1_000_000, "pool": 128_000},
        256, 6, 2000, 250, 512, (5e-4, 1e-3, 2e-3),
    ),
    "miniature": Setting(
        {"general": 8, "domain": 6, "values": 3, "pretraining": 200, "pool": 80}, 16, 2, 4, 10, 8, (3e-3,)
    ),
}  # fmt: skip


def best_first(world: EntityWorld) -> np.ndarray:
    """Ranks the pool by perplexity under an n-gram model of the reference: indices, best first, ties in pool order."""
    selector = catalog.load("selectors", "perplexity")(order=LENGTH, min_tokens=1).fit(texts(world.reference))
    return np.argsort(-selector.score(texts(world.pool)), kind="stable")


def make_probes(world: EntityWorld, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns accuracies of questions (general and of the domain), and the loss of the domain's true statements."""
    import torch

    def final(model: Any, rows: torch.Tensor) -> torch.Tensor:
        return model(input_ids=rows[:, :-1], use_cache=False).logits[:, -1].float()

    def accuracy(rows: torch.Tensor, model: Any) -> float:
        return (final(model, rows).argmax(-1) == rows[:, -1]).float().mean().item()

    def loss(rows: torch.Tensor, model: Any) -> float:
        return torch.nn.functional.cross_entropy(final(model, rows), rows[:, -1]).item()

    def on(function: Callable[..., float], documents: np.ndarray) -> Any:
        return functools.partial(function, torch.from_numpy(documents).to(device))

    scores = {"general": on(accuracy, world.questions(False)), "domain": on(accuracy, world.questions(True))}
    return scores, {"domain_loss": on(loss, world.statements())}


@dataclass
class Start:
    """A pre-trained model and the domain's data, from which every arm starts."""

    world: EntityWorld
    model: PreTrainedModel
    sources: dict[str, np.ndarray]
    plan: Plan
    precision: float


def options(setting: Setting, tokens: int, rate: float, seed: int, device: str) -> TrainingOptions:
    """Returns the options that all runs share but for length and rate."""
    return TrainingOptions(
        tokens=tokens,
        batch_size=setting.batch,
        block_size=LENGTH,
        learning_rate=rate,
        warmup=0.1,
        min_lr_ratio=0.1,
        weight_decay=0.01,
        log_every=10_000,
        seed=seed,
        precision="float32",
        device=device,
    )


def start(setting: Setting, seed: int, device: str) -> Start:
    """Makes the world, pre-trains, and ranks the pool."""
    world = entity_world(seed, **setting.world)
    model = tiny_model(
        "gpt_neox",
        seed=seed,
        vocab_size=world.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=4 * setting.hidden,
        num_hidden_layers=setting.layers,
    )
    tokens = setting.pretraining * setting.batch * LENGTH
    train(model, world.pretraining.reshape(-1), options(setting, tokens, 3e-3, seed, device))
    subset = len(world.pool) // 10
    best = best_first(world)[:subset]
    sources = {DOMAIN: world.pool, BEST: world.pool[best], _GENERAL: world.pretraining}
    plan = Plan(
        budget=world.pool.size,
        subset=subset * LENGTH,
        epochs=4,
        general={_GENERAL: 0.18},
        frozen=1,
        learning_rate=0.0,
    )
    flat = {name: documents.reshape(-1) for name, documents in sources.items()}
    return Start(world, model, flat, plan, float(world.good[best].mean()))


def run_arm(
    variant: str, rate: float, begin: Start, setting: Setting, seed: int, device: str
) -> tuple[dict[str, float], StabilityGapCallback]:
    """Trains one arm and measures it."""
    name = variant.removeprefix("shared-").removesuffix("-equal")
    arm = {"recipe": "stability-gap"}.get(name, name)
    plan = dataclasses.replace(begin.plan, equal_tokens=variant.endswith("-equal"))
    stream = plan.stream(arm, begin.sources, LENGTH, seed)
    scores, losses = make_probes(begin.world, device)
    callback = StabilityGapCallback(scores, setting.batch * LENGTH * max(1, setting.steps // 12), losses=losses)
    model = copy.deepcopy(begin.model)
    tokens = plan.epochs_of(arm) * stream.tokens_per_epoch
    with frozen(model, frozen_part(arm), plan.frozen):
        train(model, stream, options(setting, tokens, rate, seed, device), callbacks=[callback])
    report = callback.report()
    worst = min(callback.history, key=lambda row: row["general"])
    found = {
        "general_end": report["general"]["end"],
        "general_drop": report["general"]["drop"],
        "shortfall": report["general"]["area"] / tokens,
        "domain_end": report["domain"]["end"],
        "domain_peak": report["domain"]["peak"],
        "loss_at_worst": worst["domain_loss"],
    }
    if "updates" in report:  # with the top frozen there is no ratio
        found["update_ratio"] = report["updates"]["largest_ratio"]
    return found, callback


def merit(found: Mapping[str, float]) -> float:
    """What a rate is chosen by, the same for every arm: both scores at the end, less what was lost on the way."""
    return found["general_end"] + found["domain_end"] - found["general_drop"]


def prepare(context: Context) -> dict[str, Any]:
    """Chooses every arm's peak rate from the same grid, on a seed of its own."""
    setting = SETTINGS[context.scale]
    begin = start(setting, TUNING_SEED, context.device)
    chosen, tried = {}, {}
    for variant in _TUNED:
        merits = {
            rate: merit(run_arm(variant, rate, begin, setting, TUNING_SEED, context.device)[0])
            for rate in setting.rates
        }
        chosen[variant] = max(merits, key=merits.__getitem__)
        tried[variant] = {f"{rate:g}": value for rate, value in merits.items()}
        context.report(f"{VARIANTS[variant]}: peak rate {chosen[variant]:g}")
    return {"rates": chosen, "tried": tried}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Measures every arm on one seed."""
    setting = SETTINGS[context.scale]
    begin = start(setting, seed, context.device)
    found: dict[str, dict[str, float]] = {}
    first: dict[str, Any] = {}
    for variant in VARIANTS:
        if variant == "base":
            continue
        rate = prepared["rates"].get(variant, setting.rates[-1])
        found[variant], callback = run_arm(variant, rate, begin, setting, seed, context.device)
        first = callback.history[0]
        context.report(
            f"{VARIANTS[variant]}: general {found[variant]['general_end']:.2f} (drop "
            f"{found[variant]['general_drop']:.2f}), domain {found[variant]['domain_end']:.2f}"
        )
    found["stability-gap"]["precision"] = begin.precision
    found["base"] = {
        "general_end": first["general"],
        "general_drop": 0.0,
        "shortfall": 0.0,
        "domain_end": first["domain"],
        "domain_peak": first["domain"],
        "loss_at_worst": first["domain_loss"],
    }
    return found


CLAIM = Claim(
    method="stability-gap",
    statement=(
        "Continued on a domain at a high rate, a model loses the old format of questions and regains it late, while "
        "its loss on the domain falls; a small best subset, several epochs and the original mixture spare it that "
        "fall, and answer more of the domain's questions, with 40% of the tokens."
    ),
    paper=(
        "OpenLLaMA-3B, medicine, zero-shot average: 40.7 after 20B tokens against 37.4 after the whole 50B (base "
        "36.2); re-warm 37.7, replay 37.5, frozen top 37.6, frozen bottom 36.5, each at 50B. Bottom layers' relative "
        "update above 1.35 times the top layers' early in a plain run."
    ),
    metrics={
        "general_end": Metric(name="general questions at the end", better="higher"),
        "general_drop": Metric(name="drop of general questions"),
        "shortfall": Metric(name="mean shortfall of general questions"),
        "domain_end": Metric(name="domain's questions at the end", better="higher"),
        "domain_peak": Metric(name="domain's questions, best", better="higher"),
        "loss_at_worst": Metric(name="loss on the domain where general questions are worst", unit="nats"),
        "update_ratio": Metric(name="largest ratio of bottom to top update", better=None),
        "precision": Metric(name="share of true documents in the subset", better="higher"),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="At the shared rate the plain run's general questions fall by 0.2 more than the control's.",
            method="shared-control", baseline="shared-plain", metric="general_drop", margin=0.2,
        ),
        Bar(
            statement="They come back: at its end the plain run has at most 0.1 less than before.",
            method="shared-plain", baseline="base", metric="general_end", margin=-0.1,
        ),
        Bar(
            statement="Where they are worst, the plain run's loss on the domain is already below its start.",
            method="shared-plain", baseline="base", metric="loss_at_worst",
        ),
        Bar(
            statement="At the shared rate the recipe ends 0.15 above the plain run in the domain's questions.",
            method="shared-recipe", baseline="shared-plain", metric="domain_end", margin=0.15,
        ),
        Bar(
            statement="The recipe's general questions drop by at most 0.1.",
            method="stability-gap", baseline="base", metric="general_drop", margin=-0.1,
        ),
        Bar(
            statement="Both tuned, the recipe's drop is 0.2 smaller than the plain run's.",
            method="stability-gap", baseline="plain", metric="general_drop", margin=0.2,
        ),
        Bar(
            statement="Both tuned, the recipe answers no fewer of the domain's questions than the plain run.",
            method="stability-gap", baseline="plain", metric="domain_end",
        ),
        Bar(
            statement="At equal tokens, both tuned, it answers 0.15 more of them than the plain run.",
            method="stability-gap", baseline="plain-equal", metric="domain_end", margin=0.15,
        ),
        Bar(
            statement="At equal tokens, both tuned, it answers no fewer of them than with 10% replay.",
            method="stability-gap", baseline="replay-equal", metric="domain_end",
        ),
        Bar(
            statement="Without the original mixture (I+II) it answers at least 0.15 fewer of the domain's questions.",
            method="stability-gap", baseline="ranked", metric="domain_end", margin=0.15,
        ),
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (0, 1, 2), "gpu": (0, 1, 2), "miniature": (0, 1)},
    notes=(
        "A two-layer model of 224 entities stands in for a language model, and a format of questions for what its "
        "benchmarks ask; the domain's pool is half wrong. The n-gram model is fitted on the domain's facts and "
        "sorts the pool almost as an oracle would. Re-warming is the plain run at the rate of pre-training "
        "(3e-3), which is in the grid. Medical benchmarks and pre-trained language models are not shown."
    ),
)  # fmt: skip
