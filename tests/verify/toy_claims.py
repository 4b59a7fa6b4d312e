"""Tiny claims with known outcomes. In a module of their own, since worker processes import them."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from modelwright.errors import UserError
from modelwright.verify import Bar, Claim, Metric


def measure(context, seed, prepared):
    """The method's loss is better than the plain one's by 0.3 ± 0.01, and than the strong one's by 0.0 ± 0.05."""
    noise = random.Random(seed)
    level = 2.0 + noise.gauss(0, 0.2)
    assert context.folder.is_dir()
    (context.folder / "scratch").write_text("x")
    context.report("measured")
    return {
        "ours": {"loss": level * prepared["scale"], "share": 0.75},
        "plain": {"loss": level * prepared["scale"] + 0.3 + noise.gauss(0, 0.01), "share": 0.5},
        "strong": {"loss": level * prepared["scale"] + noise.gauss(0, 0.05)},
    }


def prepare(context):
    return {"scale": 1.0, "rates": {"ours": 1e-3, "plain": 3e-3}}


def slow(context, seed, prepared):
    """Takes a while on every seed but the first, and writes down who ran."""
    log = Path(os.environ["TOY_LOG"])
    with log.open("a") as stream:
        stream.write(f"{seed}\n")
    if seed and os.environ.get("TOY_SLEEP"):
        time.sleep(float(os.environ["TOY_SLEEP"]))
    return {"ours": {"loss": float(seed)}, "plain": {"loss": seed + 1.0}, "strong": {"loss": seed + 2.0}}


def diverge(context, seed, prepared):
    loss = float("nan") if seed == 2 else 1.0 + seed / 100
    return {"ours": {"loss": loss}, "plain": {"loss": 3.0}, "strong": {"loss": 3.0}}


def fail(context, seed, prepared):
    raise ZeroDivisionError(f"seed {seed} broke")


def lack(context, seed, prepared):
    raise UserError("The package 'toy' is needed.")


def stray(context, seed, prepared):
    return {"ours": {"loss": 1.0}, "plain": {"loss": 1.0}}


def threads(context, seed, prepared):
    return {v: {"loss": float(os.environ["OMP_NUM_THREADS"])} for v in ("ours", "plain", "strong")}


def claim(run=measure, *, bars=None, method="toy", prepare=prepare, **more):
    beats_plain = Bar(statement="Better than plain.", method="ours", baseline="plain", metric="loss", margin=0.1)
    return Claim(
        method=method,
        statement="Ours is better than <plain> & simple.",
        paper="0.3 lower (Toy, 2024).",
        metrics={
            "loss": Metric(name="Held-out text", unit="bits per byte"),
            "share": Metric(name="Precision", better="higher", digits=2),
        },
        variants={"ours": "Ours", "plain": "Plain", "strong": "Strong baseline"},
        bars=(beats_plain,) if bars is None else bars,
        run=run,
        prepare=prepare,
        **more,
    )


PLAIN = Bar(statement="Better than plain.", method="ours", baseline="plain", metric="loss", margin=0.1)
STRONG = Bar(statement="Better than strong.", method="ours", baseline="strong", metric="loss", margin=0.1)
HUGE = Bar(statement="Far better than plain.", method="ours", baseline="plain", metric="loss", margin=1.0)

HOLDS = claim(bars=(PLAIN,))
IN_PART = claim(bars=(PLAIN, STRONG))
FAILS = claim(bars=(STRONG, HUGE))
CLAIM = HOLDS
