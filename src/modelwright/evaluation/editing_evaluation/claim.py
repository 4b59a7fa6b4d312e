"""The claim of editing evaluation on a small model: what is left of it after up to a hundred edits in a row?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.evaluation.fact_texts import FactModelSetting
from modelwright.verify.claim import Bar, Claim, Context, Metric

SEED_OF_TUNING = 1000
#: In so small a model tracing points at the middle layers and the answer's position.
LAYERS = (1, 2)
#: Variant to the variant of the editors' candidates and the facts that one fit writes.
METHODS = {
    "rome-c": ("rome-c", 1),
    "rome": ("rome", 1),
    "memit": ("memit", 1),
    "memit-batch": ("memit", 10),
    "ft-m": ("ft-m", 1),
    "grace": ("grace", 1),
}
VARIANTS = {
    "rome-c": "R-ROME with covariance",
    "rome": "ROME without covariance",
    "memit": "MEMIT, one by one",
    "memit-batch": "MEMIT, batches of 10",
    "ft-m": "FT-M",
    "grace": "GRACE",
    "base": "no edit (control)",
}


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale: the testbed, where to measure (few, half, all), tests of an ability, edits of the tuning."""

    testbed: FactModelSetting
    checkpoints: tuple[int, int, int]
    tests: int
    tuning: int


SETTINGS = {
    "miniature": Setting(
        FactModelSetting(
            people=16, companies=6, cities=8, countries=5, hidden=16, intermediate=32, layers=3, steps=3, batch=8
        ),
        (10, 20, 30), 2, 10,
    ),
    "cpu": Setting(FactModelSetting(), (10, 50, 100), 50, 20),
    "gpu": Setting(
        FactModelSetting(
            people=400, companies=60, cities=80, countries=20, hidden=768, intermediate=4096, layers=3, heads=12,
            steps=3000, batch=256, rate=6e-4, largest=49,
        ),
        (10, 100, 1000), 100, 20,
    ),
}  # fmt: skip


def prepare(context: Context) -> dict[str, Any]:
    """Tunes every method by the facts kept times the abilities kept after a few edits, on a model of its own."""
    from modelwright.evaluation.fact_editors import Place, candidates
    from modelwright.evaluation.fact_model import fact_model

    setting = SETTINGS[context.scale]
    bed = fact_model(setting.testbed, SEED_OF_TUNING, device=context.device, report=context.report)
    chosen: dict[str, Any] = {}
    known = candidates(Place(LAYERS, "last"))
    for variant, (editor, batch) in METHODS.items():
        tried = []
        for options in known[editor][1]:
            last = sequence(bed, editor, options, batch, (setting.tuning,), setting.tests)[-1]
            tried.append((last["retention"]["all"] * abilities(last), options))
        best, chosen[variant] = max(tried, key=lambda pair: pair[0])
        context.report(f"{variant}: {chosen[variant]} with {best:.3f}")
    return {"options": chosen}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Writes facts one after the other by every method, and measures on the way."""
    from modelwright.evaluation.fact_model import fact_model

    setting = SETTINGS[context.scale]
    bed = fact_model(setting.testbed, seed, device=context.device, report=context.report)
    few, half, all_ = setting.checkpoints
    measured: dict[str, dict[str, float]] = {}
    for variant, (editor, batch) in METHODS.items():
        states = sequence(
            bed, editor, prepared["options"][variant], batch, (0, few, half, all_), setting.tests
        )  # fmt: skip
        by_n = {state["n"]: state for state in states}
        base = abilities(by_n[0])
        measured[variant] = {
            "abilities_few": abilities(by_n[few]),
            "abilities_half": abilities(by_n[half]),
            "abilities": abilities(by_n[all_]),
            "likelihood": abilities(by_n[all_], "likelihood"),
            "retention": by_n[all_]["retention"]["all"],
            "facts": by_n[all_]["facts"]["generation"],
            "arithmetic": by_n[all_]["arithmetic"]["generation"],
            "context": by_n[all_]["context"]["generation"],
            "change": by_n[all_]["max_delta_norm"],
        }
        measured["base"] = {
            "abilities_few": base, "abilities_half": base, "abilities": base,
            "likelihood": abilities(by_n[0], "likelihood"),
            **{name: by_n[0][name]["generation"] for name in ("facts", "arithmetic", "context")},
        }  # fmt: skip
        context.report(f"{variant}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured[variant].items()))
    return {variant: measured[variant] for variant in VARIANTS}


def abilities(state: Mapping[str, Any], metric: str = "generation") -> float:
    """Returns the mean of the four abilities."""
    names = ("facts", "arithmetic", "copying", "context")
    return sum(state[name][metric] for name in names) / len(names)


def sequence(
    bed: Any, editor: str, options: Mapping[str, Any], batch: int, checkpoints: Sequence[int], tests: int
) -> list[dict[str, Any]]:
    """Runs one sequence: mistakes are corrected, and what was right is changed, in one order for all methods."""
    from modelwright.editing.requests import EditRequest
    from modelwright.evaluation.asking import Layout
    from modelwright.evaluation.editing_evaluation.abilities import fact_model_tasks
    from modelwright.evaluation.editing_evaluation.sequence import SequentialEditing
    from modelwright.evaluation.fact_editors import Place, candidates, fact_editor
    from modelwright.evaluation.fact_texts import ask
    from modelwright.worlds.base import Draw
    from modelwright.worlds.fact_questions import question

    draw = Draw(2, "facts to edit in a row")
    keys = draw.shuffled(bed.texts.personal)
    # The facts that are asked as unharmed are the same at every checkpoint.
    edited = keys[: max(longest(bed), checkpoints[-1])]
    requests = []
    for subject, relation in edited[: checkpoints[-1]]:
        now, right = bed.texts.beliefs.objects[subject, relation], bed.texts.truth.objects[subject, relation]
        new = right if right != now else bed.texts.other(relation, draw, now, subject)
        requests.append(EditRequest(ask(question(relation, subject)), subject, new, old_answer=now))
    neutral_draw = Draw(3, "neutral")
    neutral = [f"{a.text} {a.answer}" for a in (bed.texts.draw_text(neutral_draw) for _ in range(30))]
    name, _ = candidates(Place(LAYERS, "last"))[editor]
    tasks = fact_model_tasks(bed.texts, bed.tokenizer, edited=edited, tests=tests, seed=4)
    run = SequentialEditing(
        model=bed.model, tokenizer=bed.tokenizer, editor=fact_editor(name, options, bed), requests=requests,
        checkpoints=checkpoints, batch_size=batch, neutral=neutral, layout=Layout(kind="qa", new_tokens=5),
    )  # fmt: skip
    return run.run(tasks)


def longest(bed: Any) -> int:
    """Returns the longest sequence of the testbed's scale."""
    return next(s.checkpoints[-1] for s in SETTINGS.values() if s.testbed == bed.texts.setting)


CLAIM = Claim(
    method="editing-evaluation",
    statement="A few edits in a row leave a model's abilities as they were; a hundred do not, unless the method spares "
    "what ordinary text needs or leaves the weights alone.",
    paper="MMLU of Llama-2-7B-chat, base 0.4516: ROME 0.4578 after 10 edits, 0.4416 / 0.2700 / 0.0007 after "
    "20 / 50 / 100; MEMIT 0.4485 and PMET 0.4590 after 100; KN collapses within 10.",
    metrics={
        "abilities_few": Metric(name="abilities after few edits", better="higher"),
        "abilities_half": Metric(name="abilities half way", better="higher"),
        "abilities": Metric(name="abilities after all edits", better="higher"),
        "likelihood": Metric(name="the same by likelihood", better="higher"),
        "retention": Metric(name="edited facts still answered", better="higher"),
        "facts": Metric(name="unedited facts", better="higher"),
        "arithmetic": Metric(name="arithmetic", better="higher"),
        "context": Metric(name="following context", better="higher"),
        "change": Metric(name="largest change of a layer, share of its norm", better=None),
    },
    variants=VARIANTS,
    bars=(
        Bar(
            statement="Ten edits by R-ROME with covariance cost at most 0.1 of the abilities",
            method="rome-c", baseline="base", metric="abilities_few", margin=-0.1,
        ),
        Bar(
            statement="With covariance and mean key more abilities are left after all edits than without, by 0.05",
            method="rome-c", baseline="rome", metric="abilities", margin=0.05,
        ),
        Bar(
            statement="MEMIT one by one leaves more than ROME without covariance, by 0.05",
            method="memit", baseline="rome", metric="abilities", margin=0.05,
        ),
        Bar(
            statement="MEMIT in batches leaves at least as much as one by one",
            method="memit-batch", baseline="memit", metric="abilities",
        ),
        Bar(
            statement="GRACE leaves the abilities as they were, to 0.02",
            method="grace", baseline="base", metric="abilities", margin=-0.02,
        ),
        Bar(
            statement="ROME without covariance loses 0.2 of the abilities",
            method="base", baseline="rome", metric="abilities", margin=0.2,
        ),
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (0, 1, 2), "gpu": (0, 1, 2), "miniature": (0, 1)},
    notes="The testbed and the candidates are those of the claim of hallueditbench; abilities are the mean of unedited "
    "facts, arithmetic, copying and following context, by generation. Few, half and all are 10, 50 and 100 edits (10, "
    "100 and 1,000 on a GPU). Not shown: real benchmarks and models; PMET, KN, MEND and SERAC; safety; in-context "
    "editing, whose prompt would outgrow what so small a model has seen.",
)  # fmt: skip
