"""ZIP-FIT against DSIR, TF-IDF, random and oracle: what is chosen, and what a model learns from it.

The pool is the domain world's: 15% target documents, half of it a distractor with the target's bigram statistics, the
rest other kinds. Every selection gives a language model the same number of bytes and steps; its learning rate is chosen
on another seed from the same grid.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from modelwright import catalog
from modelwright.verify.claim import Bar, Claim, Context, Metric
from modelwright.worlds.domains import DomainWorld, domains, graded

if TYPE_CHECKING:
    import torch

#: The seed that learning rates are chosen on; it is not among the claim's seeds.
TUNING_SEED = 1_000_003
#: Between documents; no document holds it.
_END_OF_DOCUMENT = b"\0"

VARIANTS = {
    "zip-fit": "ZIP-FIT (zlib, level 1)",
    "zip-fit-lz4": "ZIP-FIT (LZ4, level 0)",
    "dsir": "DSIR, top-k",
    "dsir-gumbel": "DSIR, resampling",
    "tfidf": "TF-IDF",
    "random": "random",
    "oracle": "oracle (in-domain documents only)",
}

# The world's documents have 30 to 150 tokens, so DSIR's usual minimum of 100 would drop most of the target domain; one
# token is the minimum here.
_SELECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "zip-fit": ("zip-fit", {"compressor": "zlib", "level": 1, "engine": "library"}),
    "zip-fit-lz4": ("zip-fit", {"compressor": "lz4", "level": 0, "engine": "library"}),
    "dsir": ("dsir", {"top_k": True, "min_tokens": 1}),
    "dsir-gumbel": ("dsir", {"top_k": False, "min_tokens": 1}),
    "tfidf": ("tfidf", {}),
    "random": ("random", {}),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        world: Parameters of the domain world.
        level_size: Documents in each of the 8 graded data sets.
        hidden: Width of the GRU.
        steps: Training steps.
        batch: Sequences per step.
        length: Bytes per sequence.
        rates: Learning rates that are tried for every variant.
    """

    world: dict[str, Any]
    level_size: int
    hidden: int
    steps: int
    batch: int
    length: int
    rates: tuple[float, ...]


SETTINGS = {
    "cpu": Setting({"pool_size": 800, "target_size": 20}, 120, 128, 250, 16, 64, (0.01, 0.02, 0.04)),
    "gpu": Setting(
        {"pool_size": 20_000, "target_size": 100, "heldout_size": 1000, "min_chars": 300, "max_chars": 900},
        2000, 512, 1500, 64, 256, (0.002, 0.005, 0.01),
    ),
    "miniature": Setting({"pool_size": 60, "target_size": 5, "heldout_size": 5}, 8, 16, 4, 4, 32, (0.01,)),
}  # fmt: skip


def rank(variant: str, world: DomainWorld, seed: int) -> tuple[np.ndarray, float]:
    """Ranks the pool by a variant's selector, reached through the catalog.

    Returns:
        Indices of the pool, best first, and the seconds that fitting and scoring took on one core.
    """
    pool, target = [row["text"] for row in world.pool], [row["text"] for row in world.target]
    if variant == "oracle":
        wanted = np.array([row["kind"] == "target" for row in world.pool], dtype=float)
        order = np.random.default_rng(seed).permutation(len(pool))
        return order[np.argsort(-wanted[order], kind="stable")], 0.0
    name, options = _SELECTORS[variant]
    selector_class = catalog.load("selectors", name)
    if "seed" in selector_class.__dataclass_fields__:
        options = {**options, "seed": seed}
    selector = selector_class(**options)
    # Imports are not the method's time.
    selector_class(**options).fit(target, pool[:20]).score(pool[:20])
    started = time.perf_counter()
    selector.fit(target, pool if selector.needs_pool else None)
    scores = selector.score(pool)
    seconds = time.perf_counter() - started
    return np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable"), seconds


def stream(texts: Sequence[str], size: int | None = None) -> bytes:
    """Joins documents and cuts the result to ``size`` bytes."""
    return b"".join(text.encode() + _END_OF_DOCUMENT for text in texts)[:size]


def cross_entropy(data: bytes, heldout: bytes, setting: Setting, rate: float, seed: int, device: str = "cpu") -> float:
    """Trains a byte-level GRU and returns its cross-entropy on held-out text.

    Args:
        data: Training text.
        heldout: Text to evaluate on.
        setting: Sizes, steps.
        rate: Peak learning rate: linear warm-up over 20 steps, then linear decay to 0.
        seed: Of weights and batches; the batches' places are the same for every variant.
        device: Torch device.

    Returns:
        Nats per byte.
    """
    import torch

    torch.manual_seed(seed)
    model = _model(setting.hidden).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    places = np.random.default_rng(seed)
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().to(device)
    window = torch.arange(setting.length + 1, device=device)
    for step in range(setting.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / setting.steps)
        starts = torch.from_numpy(places.integers(0, len(text) - setting.length, setting.batch)).to(device)
        loss = _loss(model, text[starts[:, None] + window])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    count = (len(heldout) - 1) // setting.length
    target = torch.frombuffer(bytearray(heldout), dtype=torch.uint8).long().to(device)
    rows = target[torch.arange(count, device=device)[:, None] * setting.length + window]
    with torch.no_grad():
        losses = [_loss(model, part).item() * len(part) for part in rows.split(256)]
    return sum(losses) / count


def _model(hidden: int) -> torch.nn.Module:
    import torch

    class ByteGru(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(256, hidden // 2)
            self.gru = torch.nn.GRU(hidden // 2, hidden, batch_first=True)
            self.out = torch.nn.Linear(hidden, 256)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.gru(self.embed(ids))[0])

    return ByteGru()


def _loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def _in_domain(world: DomainWorld) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([row["kind"] == "target" for row in world.pool]),
        np.array([len(row["text"].encode()) for row in world.pool]),
    )


def _training_text(world: DomainWorld, order: np.ndarray) -> bytes:
    """The best documents, cut to as many bytes as the in-domain documents have: the same for every variant."""
    wanted, sizes = _in_domain(world)
    return stream([world.pool[i]["text"] for i in order], int((sizes[wanted] + 1).sum()))


def prepare(context: Context) -> dict[str, Any]:
    """Chooses every variant's learning rate from the same grid, on a seed of its own."""
    setting = SETTINGS[context.scale]
    world = domains(TUNING_SEED, **setting.world)
    heldout = stream([row["text"] for row in world.heldout])
    chosen, tried = {}, {}
    for variant in VARIANTS:
        data = _training_text(world, rank(variant, world, TUNING_SEED)[0])
        losses = {
            rate: cross_entropy(data, heldout, setting, rate, TUNING_SEED, context.device) for rate in setting.rates
        }
        chosen[variant] = min(losses, key=lambda rate: losses[rate])
        tried[variant] = {str(rate): loss for rate, loss in losses.items()}
        context.report(f"{VARIANTS[variant]}: learning rate {chosen[variant]:g}")
    return {"rates": chosen, "tried": tried}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Measures every variant on one seed."""
    setting, rates = SETTINGS[context.scale], prepared["rates"]
    world = domains(seed, **setting.world)
    heldout = stream([row["text"] for row in world.heldout])
    wanted, sizes = _in_domain(world)
    count, budget = int(wanted.sum()), int(sizes[wanted].sum())
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        order, seconds = rank(variant, world, seed)
        within = order[np.cumsum(sizes[order]) <= budget]
        loss = cross_entropy(_training_text(world, order), heldout, setting, rates[variant], seed, context.device)
        found[variant] = {
            "precision": float(wanted[order[:count]].mean()),
            "byte_precision": float(sizes[within][wanted[within]].sum() / sizes[within].sum()),
            "cross_entropy": loss,
            "seconds": seconds,
        }
        context.report(f"{VARIANTS[variant]}: precision {found[variant]['precision']:.2f}, {loss:.3f} nats per byte")
    for variant, value in _r_squared(context, seed, setting, rates["zip-fit"]).items():
        found[variant]["r_squared"] = value
    return found


def _r_squared(context: Context, seed: int, setting: Setting, rate: float) -> dict[str, float]:
    """Squared correlation of a data set's alignment with the cross-entropy after training on it, over 8 data sets."""
    options = {key: setting.world[key] for key in setting.world if key != "pool_size"}
    world = graded(seed, levels=8, level_size=setting.level_size, **options)
    heldout, target = stream([row["text"] for row in world.heldout]), [row["text"] for row in world.target]
    levels = [[row["text"] for row in world.level(i)] for i in range(8)]
    size = min(len(stream(texts)) for texts in levels)
    # Half the steps: eight more models would cost as much as all variants together.
    setting = replace(setting, steps=max(1, setting.steps // 2))
    losses = [cross_entropy(stream(texts, size), heldout, setting, rate, seed, context.device) for texts in levels]
    found = {}
    for variant in ("zip-fit", "zip-fit-lz4"):
        name, selector_options = _SELECTORS[variant]
        selector = catalog.load("selectors", name)(**selector_options).fit(target)
        alignments = [float(selector.score(texts).mean()) for texts in levels]
        found[variant] = float(np.corrcoef(alignments, losses)[0, 1] ** 2)
    return found


CLAIM = Claim(
    method="zip-fit",
    statement=(
        "From a pool half of which only has the target's bigram statistics, ZIP-FIT chooses more in-domain documents "
        "than DSIR, and a model trained on its choice predicts held-out target text about as well as one trained on "
        "in-domain documents only."
    ),
    paper=(
        "Lowest test cross-entropy up to 85.1% sooner than DSIR and D4 on code (CodeGemma-2B, Gemma2-2B), up to 62.79% "
        "sooner than DSIR on autoformalisation; selection up to 65.8% faster than DSIR; R² of alignment with "
        "cross-entropy 0.90 (GPT-2) and 0.75 (Mistral-7B) on ProofNet."
    ),
    metrics={
        "precision": Metric(name="precision at K in-domain documents", better="higher"),
        "byte_precision": Metric(name="precision at equal bytes", better="higher"),
        "cross_entropy": Metric(name="held-out cross-entropy", unit="nats per byte"),
        "seconds": Metric(name="time to select", unit="s", digits=2),
        "r_squared": Metric(name="R² of alignment with cross-entropy, 8 mixes", better="higher"),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="ZIP-FIT's precision is above that of DSIR (top-k).",
            method="zip-fit", baseline="dsir", metric="precision",
        ),
        Bar(
            statement="ZIP-FIT's precision is above that of DSIR (resampling).",
            method="zip-fit", baseline="dsir-gumbel", metric="precision",
        ),
        Bar(
            statement="ZIP-FIT's precision is above that of TF-IDF.",
            method="zip-fit", baseline="tfidf", metric="precision",
        ),
        Bar(
            statement="Training on ZIP-FIT's choice beats a random one by at least 0.05 nats per byte.",
            method="zip-fit", baseline="random", metric="cross_entropy", margin=0.05,
        ),
        Bar(
            statement="Training on ZIP-FIT's choice is at most 0.03 nats per byte worse than on the oracle's.",
            method="zip-fit", baseline="oracle", metric="cross_entropy", margin=-0.03,
        ),
        Bar(
            statement="Training on ZIP-FIT's choice beats DSIR's (top-k).",
            method="zip-fit", baseline="dsir", metric="cross_entropy",
        ),
        Bar(
            statement="Training on ZIP-FIT's choice beats DSIR's (resampling).",
            method="zip-fit", baseline="dsir-gumbel", metric="cross_entropy",
        ),
        Bar(
            statement="Training on ZIP-FIT's choice beats TF-IDF's.",
            method="zip-fit", baseline="tfidf", metric="cross_entropy",
        ),
        Bar(
            statement="ZIP-FIT takes less time to select than DSIR.",
            method="zip-fit", baseline="dsir", metric="seconds",
        ),
    ),
    run=run,
    prepare=prepare,
    notes=(
        "A byte-level GRU trained from scratch on generated text stands in for fine-tuning a 2B model on real text. "
        "All selections have as many bytes as the pool's in-domain documents. DSIR's minimum of 100 tokens a document "
        "is lowered to 1, since the documents are shorter than that. gzip at level 0, the official package's default "
        "level, is left out: it does not compress, and is an error here. The distractor decides the first bars: its "
        "chain walks over words split at blank space; with blank space as a token of its own DSIR would win. The "
        "world's target functions were made longer once, after a first look at precision (docs/log.md)."
    ),
)  # fmt: skip
