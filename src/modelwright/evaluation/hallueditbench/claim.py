"""The claim of HalluEditBench on a small model with known mistakes: which of the paper's findings show here?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.evaluation.fact_texts import FactModelSetting
from modelwright.verify.claim import Bar, Claim, Context, Metric

SEED_OF_TUNING = 1000
WEIGHT_EDITORS = ("ft-l", "ft-m", "lora", "rome", "rome-c", "memit")
VARIANTS = {
    "ice": "ICE (the fact in the prompt)",
    "ft-l": "FT-L",
    "ft-m": "FT-M",
    "lora": "LoRA",
    "rome": "ROME without covariance",
    "rome-c": "R-ROME with covariance",
    "memit": "MEMIT",
    "grace": "GRACE",
    "efficacy_only": "weight editors by efficacy alone (old style)",
    "five": "weight editors by the mean of the dimensions",
    "two_hops": "weight editors by 2-hop questions",
}


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale: the testbed, facts edited a seed, facts of the tuning."""

    testbed: FactModelSetting
    items: int
    tuning: int


SETTINGS = {
    "miniature": Setting(
        FactModelSetting(
            people=16, companies=6, cities=8, countries=5, hidden=16, intermediate=32, layers=3, steps=3, batch=8
        ),
        items=2, tuning=1,
    ),
    "cpu": Setting(FactModelSetting(), items=24, tuning=8),
    "gpu": Setting(
        FactModelSetting(
            people=400, companies=60, cities=80, countries=20, hidden=768, intermediate=4096, layers=3, heads=12,
            steps=3000, batch=256, rate=6e-4, largest=49,
        ),
        items=60, tuning=10,
    ),
}  # fmt: skip


def prepare(context: Context) -> dict[str, Any]:
    """Tunes every method by the balance of its dimensions, on a model and facts of their own."""
    from modelwright.evaluation.fact_editors import CANDIDATES
    from modelwright.evaluation.fact_model import fact_model
    from modelwright.evaluation.hallueditbench.scores import balance

    setting = SETTINGS[context.scale]
    bed = fact_model(setting.testbed, SEED_OF_TUNING, device=context.device, report=context.report)
    items = items_of(bed, setting.tuning)
    chosen: dict[str, Any] = {}
    for variant, (_, _, candidates) in CANDIDATES.items():
        tried = [(balance(single(bed, variant, options, items)), options) for options in candidates]
        best, chosen[variant] = max(tried, key=lambda pair: pair[0])
        context.report(f"{variant}: {chosen[variant]} with balance {best:.3f}")
    return {"options": chosen}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Edits facts that the model has wrong, one at a time, by every method."""
    from modelwright.evaluation.fact_model import fact_model
    from modelwright.evaluation.hallueditbench.scores import Scores

    setting = SETTINGS[context.scale]
    bed = fact_model(setting.testbed, seed, device=context.device, report=context.report)
    items = items_of(bed, setting.items)
    found: dict[str, Scores] = {}
    measured: dict[str, dict[str, float]] = {}
    for variant, options in prepared["options"].items():
        scores = found[variant] = single(bed, variant, options, items)
        measured[variant] = {
            "before": scores.before["efficacy"],
            "efficacy": scores.parts["efficacy"],
            "generalisation": _mean([scores.parts[n] for n in ("rephrase", "reversed") if n in scores.parts]),
            "rephrase": scores.parts["rephrase"],
            "locality": scores.parts["locality"],
            "portability": scores.parts.get("2hop", 0.0),
            "seconds": scores.seconds or 0.0,
        }
        context.report(f"{variant}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured[variant].items()))
    editors = [measured[variant] for variant in WEIGHT_EDITORS]
    five = ("efficacy", "generalisation", "locality", "portability")
    measured["efficacy_only"] = {"score": _mean([m["efficacy"] for m in editors])}
    measured["five"] = {"score": _mean([m[name] for m in editors for name in five])}
    measured["two_hops"] = {"score": _mean([m["portability"] for m in editors])}
    return {variant: measured[variant] for variant in VARIANTS}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def items_of(bed: Any, n: int) -> list[Any]:
    """Returns items for facts that the model was found to have wrong, the four relations by turns."""
    from modelwright.evaluation.asking import Layout
    from modelwright.evaluation.fact_texts import PERSONAL
    from modelwright.evaluation.hallueditbench.hallucinations import find_hallucinations
    from modelwright.evaluation.hallueditbench.questions import world_facts, world_item
    from modelwright.worlds.base import Draw

    keys = Draw(0, "facts to edit").shuffled(bed.texts.personal)
    order = {name: [key for key in keys if key[1] == name] for name in PERSONAL}
    keys = [key for group in zip(*order.values()) for key in group]
    asked = world_facts(bed.texts.truth, keys)
    wrong = find_hallucinations(
        bed.model, bed.tokenizer, [f.question for f in asked], [f.answer for f in asked], layout=Layout(kind="qa")
    )
    return [world_item(asked[h.index], h.output, bed.texts.beliefs, max_hops=2) for h in wrong[:n]]


def single(bed: Any, variant: str, options: Mapping[str, Any], items: Sequence[Any]) -> Any:
    """Scores one method on items, without yes, no and choices, which the testbed's model has not learnt to answer."""
    import dataclasses

    from modelwright.evaluation.asking import Layout
    from modelwright.evaluation.fact_editors import fact_editor
    from modelwright.evaluation.hallueditbench.run import SingleEditing
    from modelwright.evaluation.hallueditbench.scores import score

    plain = [
        dataclasses.replace(item, yes_question=None, no_question=None, choices=None, letter=None) for item in items
    ]
    loop = SingleEditing(
        editors={variant: fact_editor(variant, options, bed)}, layout=Layout(kind="qa", new_tokens=5), batch_size=32
    )
    return score(loop.rows(bed.model, bed.tokenizer, plain))[0]


CLAIM = Claim(
    method="hallueditbench",
    statement="Of facts that a model verifiably has wrong, editors correct nearly all when the edited question is "
    "asked again; asked otherwise, or for what follows, they do much worse, each in its own way.",
    paper="Llama-2-7B-chat, efficacy / rephrased / locality / 2 hops, %: FT-L 66/63/49/20, FT-M 61/57/73/24, LoRA "
    "77/69/56/25, ROME 75/68/39/25, MEMIT 76/71/35/26, ICE 99/97/50/35, GRACE 95/0/28/0; old benchmarks gave 95 to 100 "
    "to ROME, MEMIT, FT-M and LoRA.",
    metrics={
        "before": Metric(name="right before the edit", better=None),
        "efficacy": Metric(name="efficacy", better="higher"),
        "generalisation": Metric(name="generalisation (other words, reversed)", better="higher"),
        "rephrase": Metric(name="in other words", better="higher"),
        "locality": Metric(name="locality (same subject)", better="higher"),
        "portability": Metric(name="portability (2 hops)", better="higher"),
        "score": Metric(name="score of the weight editors", better="higher"),
        "seconds": Metric(name="time of an edit", unit="s", better=None, digits=2),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="The old-style score, efficacy alone, exceeds the mean of the dimensions by 0.15",
            method="efficacy_only", baseline="five", metric="score", margin=0.15,
        ),
        Bar(
            statement="Of facts that were corrected, what follows over two hops is not: 0.4 less",
            method="efficacy_only", baseline="two_hops", metric="score", margin=0.4,
        ),
        Bar(
            statement="ICE generalises better than ROME as the paper runs it",
            method="ice", baseline="rome", metric="generalisation",
        ),
        Bar(
            statement="GRACE does not generalise: ROME answers 0.2 more of the rephrased questions",
            method="rome", baseline="grace", metric="rephrase", margin=0.2,
        ),
        Bar(
            statement="GRACE is at least as local as ROME",
            method="grace", baseline="rome", metric="locality",
        ),
        Bar(
            statement="ROME's covariance (with the mean key) makes it at least as local",
            method="rome-c", baseline="rome", metric="locality",
        ),
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (0, 1, 2), "gpu": (0, 1, 2), "miniature": (0, 1)},
    notes="A Llama of three layers that knows 191 generated facts, half of those about people wrong, is trained once "
    "for a seed and kept in the cache, so its training (about 100 CPU seconds) is not in the time where it was there "
    "already. Facts are looked up at the answer's position in so small a model. Four settings were tried for each "
    "method, on a model of its own. Not shown: yes, no, choices and robustness, which this model is not taught; 3 to 6 "
    "hops; and ICE is bounded by how well the model follows its context at all, which it does for half of its facts.",
)  # fmt: skip
