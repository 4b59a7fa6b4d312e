"""JEST against uniform, independent, hard-learner and easy-reference selection, on paired vectors with known truth.

Two views of 640 classes that lie in 40 clusters, so that the other classes of a cluster are hard negatives. In the
noisy world most pairs of the pool are mismatched; in the plain one few are, but most pairs are trivial. The learner is
a pair of small towers with the sigmoid loss; every rule of selection trains on as many examples, at its own best
learning rate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelwright.verify.claim import Bar, Claim, Context, Metric

if TYPE_CHECKING:
    import torch

    from modelwright.training.contrastive.encoded import Encoded

#: The seed that learning rates are chosen on; it is not among the claim's seeds.
TUNING_SEED = 1_000_003

VARIANTS = {
    "jest": "JEST, 16 chunks",
    "independent": "independent learnability (1 chunk)",
    "uniform": "uniform",
    "hard": "hard learner, 16 chunks",
    "easy_reference": "easy reference, 16 chunks",
    "normalized": "JEST, logits divided by their terms",
    "oracle": "oracle (matched pairs only, at random)",
    "reference": "the reference itself",
}

_JEST: dict[str, Any] = {"criterion": "learnability", "n_chunks": 16}
#: Variant to the options of its sampler; the oracle and the reference have none.
_SAMPLERS: dict[str, dict[str, Any]] = {
    "jest": _JEST,
    "independent": _JEST | {"n_chunks": 1},
    "uniform": {"criterion": "uniform"},
    "hard": _JEST | {"criterion": "hard"},
    "easy_reference": _JEST | {"criterion": "easy_reference"},
    "normalized": _JEST | {"normalize": True},
}
#: What is trained in each world.
_WORLDS = {
    "noisy": ("reference", "uniform", "jest", "independent", "hard", "easy_reference", "normalized", "oracle"),
    "plain": ("reference", "uniform", "jest", "independent", "easy_reference"),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        clusters: Clusters of 16 classes each.
        pool: Pairs of the pool.
        curated: Matched pairs that the reference is trained on.
        galleries: Test sets with a matched pair for each class on average; R@1 is their mean.
        hidden: Width of the towers' two hidden layers.
        batch: Size b of the training batch; the super-batch has five times as many.
        steps: Steps of training, for the reference too.
        evaluate_every: Steps between evaluations.
        rates: Learning rates that are tried for every variant.
        mismatched: Share of mismatched pairs in the pool, by world.
        trivial: Share of trivial pairs, by world: of 640 other classes, far apart and almost without noise.
    """

    clusters: int = 40
    pool: int = 40_000
    curated: int = 4000
    galleries: int = 4
    hidden: int = 128
    batch: int = 128
    steps: int = 600
    evaluate_every: int = 20
    # On the tuning seed 5e-4 was tried too, and was nobody's best.
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    mismatched: Mapping[str, float] = field(default_factory=lambda: {"noisy": 0.6, "plain": 0.15})
    trivial: Mapping[str, float] = field(default_factory=lambda: {"noisy": 0.0, "plain": 0.7})


SETTINGS = {
    "cpu": Setting(),
    "gpu": Setting(
        clusters=160,
        pool=400_000,
        curated=40_000,
        galleries=1,
        hidden=512,
        batch=1024,
        steps=300,
        evaluate_every=10,
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "miniature": Setting(
        clusters=2, pool=400, curated=64, galleries=1, hidden=16, batch=16, steps=6, evaluate_every=2, rates=(1e-3,)
    ),
}

FILTER_RATIO = 0.8
_LATENT, _VIEW, _OUT = 24, 48, 32
_FINE, _NOISE = 0.4, 0.3


@dataclass
class Pairs:
    """Both views, (n, 48) each, and whether a pair is matched, (n,) bool."""

    left: torch.Tensor
    right: torch.Tensor
    matched: torch.Tensor

    def __len__(self) -> int:
        return len(self.left)


class World:
    """Draws pairs of views of classes.

    Args:
        setting: Sizes.
        kind: ``noisy`` or ``plain``.
        seed: Of classes, views and pairs.
        device: Torch device.
    """

    def __init__(self, setting: Setting, kind: str, seed: int, device: str = "cpu") -> None:
        import torch

        self.setting, self.kind, self.device = setting, kind, device
        self.random = torch.Generator().manual_seed(seed)
        centres = self._normal(setting.clusters, 1, _LATENT)
        classes = (centres + _FINE * self._normal(setting.clusters, 16, _LATENT)).flatten(0, 1)
        others = 2 * self._normal(len(classes), _LATENT)
        self.classes, self.proper = torch.cat([classes, others]), len(classes)
        self.maps = [(self._normal(_LATENT, 64) / _LATENT**0.5, self._normal(64, _VIEW) / 8) for _ in range(2)]
        self.test = [self._pairs(self.proper, 0.0, 0.0) for _ in range(setting.galleries)]
        # The curated pairs are like the pool's, but for the mismatched ones.
        self.curated = self._pairs(setting.curated, 0.0, setting.trivial[kind])
        self.pool = self._pairs(setting.pool, setting.mismatched[kind], setting.trivial[kind])

    def _normal(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.randn(*shape, generator=self.random)

    def _pairs(self, count: int, mismatched: float, trivial: float) -> Pairs:
        import torch

        chance = torch.rand(2, count, generator=self.random)
        labels = torch.randint(self.proper, (count,), generator=self.random)
        labels = torch.where(chance[0] < trivial, labels + self.proper, labels)
        matched = chance[1] >= mismatched
        other = labels[torch.randint(count, (count,), generator=self.random)]
        right = torch.where(matched, labels, other)
        views = [self._view(i, which) for i, which in enumerate((labels, right))]
        return Pairs(views[0].to(self.device), views[1].to(self.device), matched.to(self.device))

    def _view(self, side: int, labels: torch.Tensor) -> torch.Tensor:
        import torch

        first, second = self.maps[side]
        noise = torch.where(labels < self.proper, _NOISE, _NOISE / 6)[:, None]
        return (self.classes[labels] @ first).tanh() @ second + noise * self._normal(len(labels), _VIEW)


def _towers(hidden: int, seed: int, device: str) -> torch.nn.Module:
    import math

    import torch
    from torch import nn

    from modelwright.training.contrastive.encoded import Encoded

    def tower() -> nn.Module:
        return nn.Sequential(
            nn.Linear(_VIEW, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, _OUT)
        )

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = tower(), tower()
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
            self.bias = nn.Parameter(torch.tensor(-10.0))

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> Encoded:
            queries = nn.functional.normalize(self.left(left), dim=1)
            keys = nn.functional.normalize(self.right(right), dim=1)
            return Encoded(queries, keys, None, self.log_scale.exp(), self.bias)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Towers().to(device)


def _encode(model: torch.nn.Module, pairs: Pairs, rows: torch.Tensor | slice = slice(None)) -> Encoded:
    return model(pairs.left[rows], pairs.right[rows])


def recall_at_1(model: torch.nn.Module, galleries: list[Pairs]) -> float:
    """Returns the share of pairs whose own partner is the nearest: both directions, mean over the galleries."""
    import torch

    found = []
    with torch.no_grad():
        for pairs in galleries:
            out = _encode(model, pairs)
            cosines = out.queries @ out.keys.T
            own = torch.arange(len(pairs), device=cosines.device)
            found += [float((cosines.argmax(axis) == own).float().mean()) for axis in (0, 1)]
    return sum(found) / len(found)


@dataclass
class Trained:
    """A run: R@1 at the steps that were evaluated, and what selection did.

    Attributes:
        model: The towers.
        curve: Step to R@1.
        matched: Share of matched pairs among the chosen, mean over the steps.
        seconds: Processor seconds of training and of scoring, without evaluation.
        learnability: For each sampler that was compared on this run's learner: mean over the evaluated steps.
    """

    model: torch.nn.Module
    curve: dict[int, float]
    matched: float
    seconds: tuple[float, float]
    learnability: dict[str, float]


def train(
    world: World,
    variant: str,
    rate: float,
    seed: int,
    reference: torch.nn.Module | None = None,
    compared: tuple[str, ...] = (),
) -> Trained:
    """Trains a learner by one rule of selection.

    Args:
        world: Where pairs come from.
        variant: Key of :data:`VARIANTS`.
        rate: Learning rate of Adam: linear warm-up over 20 steps, then constant.
        seed: Of weights, super-batches and draws; the super-batches are the same for every variant.
        reference: The reference model, frozen; only its embeddings of the pool are used, computed once.
        compared: Variants whose choice from the same super-batches, by this run's learner, is measured too.
    """
    import torch

    from modelwright.curation.jest.sampler import JointSampler
    from modelwright.curation.jest.scores import pairwise_sigmoid_nll

    setting, device = world.setting, world.device
    pairs = world.curated if variant == "reference" else world.pool
    rows_of_matched = pairs.matched.nonzero()[:, 0]
    model = _towers(setting.hidden, seed, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    batches, noise = (torch.Generator().manual_seed(seed + n) for n in (1, 2))
    samplers = {v: JointSampler(filter_ratio=FILTER_RATIO, **_SAMPLERS[v]) for v in {variant, *compared} & {*_SAMPLERS}}
    sampler = samplers.get(variant)
    cached: Encoded | None = None
    if reference is not None:
        with torch.no_grad():
            cached = _encode(reference, world.pool)
    count = JointSampler(filter_ratio=FILTER_RATIO).super_batch_size(setting.batch)
    curve: dict[int, float] = {}
    learnabilities: dict[str, list[float]] = {v: [] for v in compared}
    matched, training, scoring = 0.0, 0.0, 0.0
    for step in range(1, setting.steps + 1):
        started = _clock(device)
        drawn = torch.randint(len(pairs), (count,), generator=batches).to(device)
        learner = super_reference = None
        if cached is not None:
            super_reference = cached._replace(queries=cached.queries[drawn], keys=cached.keys[drawn])
        if sampler is None or sampler.criterion == "uniform":
            chosen = drawn[: setting.batch]
            if variant == "oracle":
                chosen = rows_of_matched[chosen % len(rows_of_matched)]
        else:
            if sampler.needs_learner:
                with torch.no_grad():
                    learner = _encode(model, pairs, drawn)
            chosen = drawn[sampler.select(learner, super_reference, setting.batch, noise)]
        selected = _clock(device)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20)
        out = _encode(model, pairs, chosen)
        assert out.bias is not None
        loss = pairwise_sigmoid_nll(out.queries, out.keys, out.scale, out.bias).sum() / setting.batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scoring, training = scoring + selected - started, training + _clock(device) - selected
        matched += float(pairs.matched[chosen].float().mean())
        if step % setting.evaluate_every == 0 or step == setting.steps:
            curve[step] = recall_at_1(model, world.test)
            for name in compared:
                with torch.no_grad():
                    learner = _encode(model, pairs, drawn)
                assert super_reference is not None
                again = torch.Generator().manual_seed(seed + step)  # the same noise for each
                indices = samplers[name].select(learner, super_reference, setting.batch, again)
                learnabilities[name].append(learnability(learner, super_reference, indices))
    means = {name: sum(values) / len(values) for name, values in learnabilities.items()}
    return Trained(model, curve, matched / setting.steps, (training, scoring), means)


def learnability(learner: Encoded, reference: Encoded, indices: torch.Tensor) -> float:
    """Returns the learnability of a batch: the learner's sigmoid loss minus the reference's."""
    import torch

    from modelwright.curation.jest.scores import pairwise_sigmoid_nll

    losses = []
    with torch.no_grad():
        for out in (learner, reference):
            assert out.bias is not None
            losses.append(pairwise_sigmoid_nll(out.queries[indices], out.keys[indices], out.scale, out.bias).sum())
    return float(losses[0] - losses[1]) / len(indices)


def _clock(device: str) -> float:
    """Seconds: of this process on a CPU, where others may be at work; of the device's queue on a GPU."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def steps_to(curve: Mapping[int, float], target: float) -> float:
    """Returns the first evaluated step from which on the curve stays at or above the target; NaN if it ends below it.

    The first time it is touched would reward a noisy curve.
    """
    found = float("nan")
    for step in sorted(curve, reverse=True):
        if curve[step] < target:
            break
        found = float(step)
    return found


def cost(variant: str) -> float:
    """FLOPs of a step over those of a step without selection, counted as in the paper.

    In units of the learner's forward pass of b examples, training is 3 and scoring the others of a super-batch of 5b is
    4. The reference's embeddings are cached.
    """
    scored = _SAMPLERS.get(variant, {}).get("criterion") in ("learnability", "hard")
    return (3 + FILTER_RATIO / (1 - FILTER_RATIO)) / 3 if scored else 1.0


def prepare(context: Context) -> dict[str, Any]:
    """Chooses every variant's learning rate in each world from the same grid, by final R@1 on a seed of its own."""
    setting = SETTINGS[context.scale]
    rates: dict[str, dict[str, float]] = {}
    tried: dict[str, dict[str, dict[str, float]]] = {}
    for kind, variants in _WORLDS.items():
        world = World(setting, kind, TUNING_SEED, context.device)
        reference = None
        rates[kind], tried[kind] = {}, {}
        for variant in variants:
            runs = {rate: train(world, variant, rate, TUNING_SEED, reference) for rate in setting.rates}
            recalls = {rate: run.curve[setting.steps] for rate, run in runs.items()}
            best = max(recalls, key=lambda rate: recalls[rate])
            if variant == "reference":
                reference = runs[best].model
            rates[kind][variant] = best
            tried[kind][variant] = {f"{rate:g}": recall for rate, recall in recalls.items()}
            context.report(f"{kind} world, {VARIANTS[variant]}: learning rate {best:g}, R@1 {recalls[best]:.3f}")
    edges = [
        f"{kind}: {variant}"
        for kind, chosen in rates.items()
        for variant, rate in chosen.items()
        if rate in (min(setting.rates), max(setting.rates))
    ]
    return {"rates": rates, "tried": tried, "grid": list(setting.rates), "at_an_edge_of_the_grid": edges}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Trains every variant on one seed, and measures it."""
    setting = SETTINGS[context.scale]
    measured: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
    for kind, variants in _WORLDS.items():
        world, rates = World(setting, kind, seed, context.device), prepared["rates"][kind]
        runs: dict[str, Trained] = {}
        reference = None
        for variant in variants:
            compared = tuple(v for v in variants if v in _SAMPLERS) if (kind, variant) == ("noisy", "uniform") else ()
            runs[variant] = train(world, variant, rates[variant], seed, reference, compared)
            if variant == "reference":
                reference = runs[variant].model
            context.report(f"{kind} world, {VARIANTS[variant]}: R@1 {runs[variant].curve[setting.steps]:.3f}")
        uniform = runs["uniform"]
        for variant, trained in runs.items():
            found = measured[variant]
            recall = trained.curve[setting.steps]
            if kind == "plain":
                found["recall_plain"] = recall
                continue
            found["recall"] = recall
            if variant == "reference":
                continue
            share = steps_to(trained.curve, uniform.curve[setting.steps]) / setting.steps
            found["samples"] = share
            found["flops"] = share * cost(variant)
            found["time"] = share * sum(trained.seconds) / sum(uniform.seconds)
            found["scoring"] = trained.seconds[1] / sum(trained.seconds)
            found["matched"] = trained.matched
            if variant in uniform.learnability:
                found["learnability"] = uniform.learnability[variant]
    return measured


CLAIM = Claim(
    method="jest",
    statement=(
        "From a pool where most pairs are mismatched, batches chosen jointly by learnability train a better model than "
        "uniform ones, reach the uniform run's recall with at most half its examples, and are more learnable than "
        "batches of examples chosen one by one."
    ),
    paper=(
        "JEST++ and Flexi-JEST++ reach SigLIP's quality with up to 13 times fewer iterations and 10 times fewer FLOPs; "
        "at filter ratio 80% a run of 1B examples equals a uniform one of 3B; joint selection is better than "
        "independent, learnability better than easy reference, and the hard-learner criterion hurts."
    ),
    metrics={
        "recall": Metric(name="R@1, noisy world", better="higher"),
        "samples": Metric(name="examples until the uniform run's final R@1, as a share of its run"),
        "flops": Metric(name="FLOPs until then, uniform run = 1 (the paper's accounting)"),
        "time": Metric(name="processor time until then, uniform run = 1"),
        "learnability": Metric(
            name="learnability of the chosen batch, same learner and super-batches for all",
            unit="nats per example",
            better="higher",
        ),
        "matched": Metric(name="matched pairs among the chosen", better="higher"),
        "scoring": Metric(name="share of processor time spent on scoring and choosing", better=None),
        "recall_plain": Metric(name="R@1, world with few mismatched and many trivial pairs", better="higher"),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="A jointly chosen batch is more learnable than an independently chosen one.",
            method="jest", baseline="independent", metric="learnability",
        ),
        Bar(
            statement="JEST reaches the uniform run's final R@1 with at most half its examples.",
            method="jest", baseline="uniform", metric="samples", margin=0.5,
        ),
        Bar(
            statement="JEST reaches it with fewer FLOPs, scoring counted as in the paper.",
            method="jest", baseline="uniform", metric="flops",
        ),
        Bar(
            statement="After as many examples JEST's R@1 is above uniform's.",
            method="jest", baseline="uniform", metric="recall",
        ),
        Bar(
            statement="After as many examples JEST's R@1 is above that of independent selection.",
            method="jest", baseline="independent", metric="recall",
        ),
        Bar(
            statement="Hard-learner selection is worse than uniform.",
            method="uniform", baseline="hard", metric="recall",
        ),
        Bar(
            statement="The JEST learner is better than its own reference.",
            method="jest", baseline="reference", metric="recall",
        ),
        Bar(
            statement="Where few pairs are mismatched and many trivial, learnability is better than easy reference.",
            method="jest", baseline="easy_reference", metric="recall_plain",
        ),
    ),
    run=run,
    prepare=prepare,
    notes=(
        "Paired vectors and small towers stand in for pictures, captions and a SigLIP. The pool's mismatched pairs are "
        "drawn at random, and the reference is trained on matched pairs of the same distribution, which real curated "
        "sets are not. 'As many examples' counts trained ones: JEST reads five times as many. The paper's accounting "
        "lets the chosen examples' scoring pass count for nothing; this implementation does not reuse it, so that a "
        "step costs 8/3 and not 7/3 of a uniform one in FLOPs. A run has reached a value at the evaluation "
        "from which on it stays there. The reference's own cost is left out, as in the paper: training it takes one "
        "uniform run here, and with it JEST's savings in FLOPs and time are gone unless the reference serves several "
        "runs. Where all noise is mismatched pairs, easy-reference selection ends above JEST, and independent "
        "selection is cheaper in time. Not shown: pictures, large batches, and the paper's numbers."
    ),
)  # fmt: skip
