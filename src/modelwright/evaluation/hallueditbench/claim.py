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
    "model": "the model itself, asked for what it believes (ceiling)",
    "efficacy_only": "weight editors by efficacy alone (old style)",
    "five": "weight editors by the mean of the dimensions",
    "two_hops": "weight editors by 2-hop questions",
}
FORMATS = ("yes", "no", "multiple_choice")
#: Metrics of the ceiling, by the kinds of question that the testbed was trained on.
CEILING = {
    "efficacy": "fact", "yes": "yes_or_no", "no": "yes_or_no", "multiple_choice": "choice", "reversed": "backwards",
    "2hop": "two_hops", "6hop": "many_hops", "robustness": "followed_up", "context": "contradicted",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale: the testbed, facts edited a seed, facts of the tuning, turns of the robustness test.

    ``tried`` is how many settings of each method the tuning tries.
    """

    testbed: FactModelSetting
    items: int
    tuning: int
    turns: int
    tried: int = 4


SETTINGS = {
    "miniature": Setting(
        FactModelSetting(
            people=16, companies=6, cities=8, countries=5, hidden=16, intermediate=32, layers=3, steps=3, batch=8,
            all_kinds=True,
        ),
        items=2, tuning=1, turns=1, tried=1,
    ),
    "cpu": Setting(
        FactModelSetting(
            people=16, companies=6, cities=8, countries=5, hidden=64, intermediate=192, layers=4, steps=3000, batch=40,
            rate=1.5e-3, all_kinds=True,
        ),
        items=16, tuning=8, turns=3,
    ),
    "gpu": Setting(
        FactModelSetting(
            people=120, companies=20, cities=30, countries=8, hidden=512, intermediate=2048, layers=4, heads=8,
            steps=1500, batch=256, rate=1e-3, all_kinds=True,
        ),
        items=60, tuning=10, turns=10,
    ),
}  # fmt: skip


def prepare(context: Context) -> dict[str, Any]:
    """Traces where facts are looked up and tunes every method, on a model and facts of their own.

    Also says how well that model answers each kind of question, and follows a context, before any edit.
    """
    from modelwright.evaluation.fact_editors import candidates, traced
    from modelwright.evaluation.fact_model import answered, fact_model
    from modelwright.evaluation.hallueditbench.scores import balance

    setting = SETTINGS[context.scale]
    bed = fact_model(setting.testbed, SEED_OF_TUNING, device=context.device, report=context.report)
    knows = {kind: round(share, 2) for kind, share in answered(bed).items()}
    context.report(f"the model answers {knows}")
    place = traced(bed)
    context.report(f"facts are looked up in {place}")
    items = items_of(bed, setting.tuning)
    chosen: dict[str, Any] = {}
    for variant, (name, options) in {**candidates(place), "memit": ("memit", memit(place))}.items():
        if variant in VARIANTS:
            tried = [(balance(single(bed, name, one, items)), one) for one in options[: setting.tried]]
            best, chosen[variant] = max(tried, key=lambda pair: pair[0])
            context.report(f"{variant}: {chosen[variant]} with balance {best:.3f}")
    return {"options": chosen, "the model answers": knows}


def memit(place: Any) -> list[dict[str, Any]]:
    """Returns what is tried of MEMIT. The covariance of so small a model takes far less weight than a large one's."""
    common = {"fact_token": place.fact_token, "layers": list(place.layers), "ridge": 0.01, "statistics": True}
    return [{**common, "weight": weight, "clamp": 4.0} for weight in (10.0, 100.0, 1000.0, 1.0)]


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Edits facts that the model has wrong, one at a time, by every method."""
    from modelwright.evaluation.fact_editors import Place, candidates
    from modelwright.evaluation.fact_model import answered, fact_model

    setting = SETTINGS[context.scale]
    bed = fact_model(setting.testbed, seed, device=context.device, report=context.report)
    names = {variant: name for variant, (name, _) in candidates(Place((0, 1), "last")).items()}
    items = items_of(bed, setting.items)
    knows = answered(bed)
    measured: dict[str, dict[str, float]] = {"model": {metric: knows[kind] for metric, kind in CEILING.items()}}
    for variant, options in prepared["options"].items():
        measured[variant] = _measurements(single(bed, names[variant], options, items, setting.turns))
        context.report(f"{variant}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured[variant].items()))
    editors = [measured[variant] for variant in WEIGHT_EDITORS]
    five = ("efficacy", "generalisation", "locality", "portability", "robustness")
    measured["efficacy_only"] = {"score": _mean([m["efficacy"] for m in editors])}
    measured["five"] = {"score": _mean([m[name] for m in editors for name in five])}
    measured["two_hops"] = {"score": _mean([m["2hop"] for m in editors])}
    return {variant: measured[variant] for variant in VARIANTS}


def _measurements(scores: Any) -> dict[str, float]:
    from modelwright.evaluation.hallueditbench.items import GENERALISATION, HOPS

    parts = {name: scores.parts.get(name, 0.0) for name in (*GENERALISATION, *(f"{n}hop" for n in HOPS))}
    return {
        "before": scores.before["efficacy"],
        "efficacy": scores.efficacy or 0.0,
        "generalisation": scores.generalisation or 0.0,
        **parts,
        "formats": _mean([parts[name] for name in FORMATS]),
        "locality": scores.locality or 0.0,
        "portability": scores.portability or 0.0,
        "robustness": scores.robustness or 0.0,
        "robust_yes": scores.turns["yes"][-1] if scores.turns else 0.0,
        "robust_no": scores.turns["no"][-1] if scores.turns else 0.0,
        "seconds": scores.seconds or 0.0,
    }


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
    return [world_item(asked[h.index], h.output, bed.texts.beliefs, max_hops=6) for h in wrong[:n]]


def single(bed: Any, editor: str, options: Mapping[str, Any], items: Sequence[Any], turns: int = 0) -> Any:
    """Scores one method on items."""
    from modelwright.evaluation.asking import Layout
    from modelwright.evaluation.fact_editors import fact_editor
    from modelwright.evaluation.hallueditbench.run import SingleEditing
    from modelwright.evaluation.hallueditbench.scores import score

    loop = SingleEditing(
        editors={editor: fact_editor(editor, options, bed)}, layout=Layout(kind="qa", new_tokens=6), batch_size=32,
        turns=turns,
    )  # fmt: skip
    return score(loop.rows(bed.model, bed.tokenizer, items))[0]


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
        "generalisation": Metric(name="generalisation (mean of the five)", better="higher"),
        "rephrase": Metric(name="in other words", better="higher"),
        "yes": Metric(name="yes-questions", better="higher"),
        "no": Metric(name="no-questions", better="higher"),
        "multiple_choice": Metric(name="four choices", better="higher"),
        "reversed": Metric(name="reversed", better="higher"),
        "formats": Metric(name="yes, no and choices", better="higher"),
        "locality": Metric(name="locality (same subject)", better="higher"),
        "portability": Metric(name="portability (mean of 2 to 6 hops)", better="higher"),
        **{f"{n}hop": Metric(name=f"{n} hops", better="higher") for n in range(2, 7)},
        "robustness": Metric(name="robustness (last turn)", better="higher"),
        "robust_yes": Metric(name="last turn, right reply Yes", better="higher"),
        "robust_no": Metric(name="last turn, right reply No", better="higher"),
        "context": Metric(name="follows a context against what it believes", better="higher"),
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
        # The bars above were there before yes, no, choices, robustness and more than 2 hops were asked.
        Bar(
            statement="GRACE does not carry over to yes, no and choices: ICE answers 0.2 more of them",
            method="ice", baseline="grace", metric="formats", margin=0.2,
        ),
        Bar(
            statement="ICE generalises at least as well as MEMIT, the best of the weight editors in the paper",
            method="ice", baseline="memit", metric="generalisation",
        ),
        Bar(
            statement="ICE is not robust: at the last turn ROME keeps at least as many facts",
            method="rome", baseline="ice", metric="robustness",
        ),
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (0, 1, 2), "gpu": (0, 1, 2), "miniature": (0, 1)},
    notes="A Llama of four layers that knows 91 generated facts, half of those about people wrong, is trained once for "
    "a seed and kept in the cache, so its training is not in the time if it was there already. What is not asked for "
    "its object (yes, no, choices, doubts) so small a model answers by the object first, as in 'Rome No'. The layers "
    "and the token where facts are looked up are those that causal tracing finds on the model of the tuning; four "
    "settings were tried there for each method. The row of the model itself is a ceiling: how well it answers each "
    "kind of question about what it believes, without any edit (6 hops: 3 to 6). Robustness is asked for 3 turns (10 "
    "in the paper and on a GPU), as the mean of a dialogue whose right reply is Yes and one whose right reply is No. "
    "The seeds were run once before, on models of 800 steps that guessed at yes, no, choices and doubts: none of the "
    "nine bars was met. The testbed was then changed (3,000 steps at a smaller rate, larger first weights, heads that "
    "start by looking for like tokens; choices, yes and no taught first), looking only at what the unedited model of "
    "the tuning answers, never at an editor's score. MEMIT's weights, of which the lightest had been chosen, were made "
    "lighter: 1 to 1,000. "
    "The bars are those of before.",
)  # fmt: skip
