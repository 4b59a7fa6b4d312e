from pathlib import Path

import pytest

from modelwright.errors import UserError
from modelwright.report.compare import answer, build_table
from modelwright.report.runs import Run, Step
from modelwright.report.spec import Compare

SPEC = Compare(
    title="Loss", metric="evaluate.result.loss", rows="method", columns="size", over="seed", unit="nats",
    given="At equal cost", baseline={"method": "plain", "size": "small"}, references=["oracle"],
)  # fmt: skip


def run_of(values, name="evaluate"):
    """Makes a run from (method, size, seed) to loss."""
    steps = [
        Step(str(i), name, name, dict(zip(("method", "size", "seed"), at)), {}, {"loss": v}, 1.0, False, Path("none"))
        for i, (at, v) in enumerate(values.items())
    ]
    return Run(Path("none"), {}, tuple(steps), 0)


def table(effects, seeds=3, spec=SPEC, sizes=("small",), wobble=0.01):
    """The effect of each method on a loss of 2, with a wobble that differs by method and seed."""
    values = {}
    for i, (method, effect) in enumerate(effects.items()):
        for j, size in enumerate(sizes):
            for seed in range(seeds):
                values[method, size, seed] = (
                    2 + seed / 10 + effect - 0.2 * j + wobble * ((i + 2 * j + seed * (i + 1)) % 3)
                )
    return build_table(run_of(values), spec, {"plain": "Plain"})


def test_difference_is_the_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    a, b = [2.0, 2.3, 2.1, 2.6], [2.2, 2.5, 2.35, 2.7]
    values = {("new", "small", i): v for i, v in enumerate(a)} | {("plain", "small", i): v for i, v in enumerate(b)}
    difference = build_table(run_of(values), SPEC, {}).difference(("new", "small"), ("plain", "small"))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert difference.interval == pytest.approx((interval.low, interval.high))
    assert difference.better == 4
    assert difference.direction == -1
    assert difference.relative == pytest.approx(-0.1875 / 2.4375)


def test_pairs_only_what_both_have():
    values = {
        ("new", "small", 0): 1.0,
        ("new", "small", 1): 1.5,
        ("plain", "small", 1): 2.0,
        ("plain", "small", 2): 9.0,
    }
    difference = build_table(run_of(values), SPEC, {}).difference(("new", "small"), ("plain", "small"))
    assert (difference.sample.n, difference.sample.mean) == (1, -0.5)


def test_better_is_said():
    headline, detail, *rest = answer(table({"plain": 0, "new": -0.5, "other": -0.3}))
    assert headline.startswith("At equal cost, new is better than Plain: 1.6")
    assert "nats against 2.1" in headline
    assert "all 3 seeds agree" in detail
    assert "95% interval −0." in detail
    assert rest[0].startswith("Also better than Plain: other (−0.")
    assert rest[1].startswith("Between new and the next, other")


def test_no_difference_is_said_plainly():
    headline, detail, *_ = answer(table({"plain": 0, "new": 0.001}, wobble=0.2))
    assert "no difference from Plain can be seen" in headline
    assert "95% interval −0." in detail
    assert " to +0." in detail


def test_worse_is_said():
    headline = answer(table({"plain": 0, "new": 0.5}))[0]
    assert headline.startswith("At equal cost, nothing is better than Plain; the nearest, new, is worse")


def test_higher_may_be_better():
    spec = SPEC.model_copy(update={"better": "higher"})
    assert "new is better than Plain" in answer(table({"plain": 0, "new": 0.5}, spec=spec))[0]
    assert "nothing is better than Plain" in answer(table({"plain": 0, "new": -0.5}, spec=spec))[0]


def test_one_run_cannot_be_told_from_chance():
    text = " ".join(answer(table({"plain": 0, "new": -0.5}, seeds=1)))
    assert "in a single run" in text
    assert "cannot be told from chance" in text
    assert "±" not in text


def test_a_reference_does_not_compete():
    text = " ".join(answer(table({"plain": 0, "new": -0.1, "oracle": -1.0}, sizes=("small", "large"))))
    assert "oracle" not in text
    assert "The best of all combinations is new with large" in text


def test_columns():
    sentences = answer(table({"plain": 0, "new": -0.5}, sizes=("small", "large")))
    assert "; large improves on small by 0.2" in sentences[0]
    assert sentences[0].endswith(" with every method.")
    assert any(s.startswith("large against small: −0.2") and "better in all of the 2 methods" in s for s in sentences)


def test_identical_numbers_are_no_difference():
    text = " ".join(answer(table({"plain": 0, "new": 0}, wobble=0)))
    assert "no difference from Plain can be seen" in text
    assert "nan" not in text


def test_without_a_baseline():
    spec = SPEC.model_copy(update={"baseline": {}})
    sentences = answer(table({"plain": 0, "new": -0.5}, spec=spec))
    assert sentences[0].startswith("At equal cost, new is best: 1.6")


def test_missing_numbers_are_counted():
    values = {("new", "small", 0): None, ("new", "small", 1): float("nan"), ("plain", "small", 0): 2.0}
    built = build_table(run_of(values), SPEC, {})
    assert built.missing == 2
    assert built.sample(("new", "small")) is None
    assert any("2 runs gave no finite number" in s for s in answer(built))
    empty = build_table(run_of({("new", "small", 0): None}), SPEC, {})
    assert "no number yet" in answer(empty)[0]


def test_what_cannot_be_compared():
    values = {("new", "small", 0): 1.0, ("plain", "large", 0): 1.0}
    with pytest.raises(UserError, match="'evaluate' has finished"):
        build_table(run_of(values, name="train"), SPEC, {})
    with pytest.raises(UserError, match="no dimension 'depth'"):
        build_table(run_of(values), SPEC.model_copy(update={"rows": "depth"}), {})
    with pytest.raises(UserError, match="would mix the values of 'size'"):
        build_table(run_of(values), SPEC.model_copy(update={"columns": None}), {})
