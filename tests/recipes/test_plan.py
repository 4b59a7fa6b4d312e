"""The matrix, references between steps, and keys."""

import itertools
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.recipes.load import load_recipe
from modelwright.recipes.matrix import points
from modelwright.recipes.plan import Plan
from modelwright.recipes.references import ReferenceProblem, references, substitute


def plan_of(path, *overrides):
    return Plan(load_recipe(path, overrides), Path("run").resolve())


def ids(plan):
    return [i.id for i in plan.instances]


def keys(plan):
    return {i.id: i.key for i in plan.instances}


DIMENSIONS = {"a": [0, 1, 2], "b": ["x", "y"], "c": [True, 0.5]}
some_dimensions = st.lists(st.sampled_from(sorted(DIMENSIONS)), unique=True)
some_rules = st.lists(
    st.dictionaries(st.sampled_from(sorted(DIMENSIONS)), st.integers(0, 1), min_size=1, max_size=2), max_size=3
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(upper=some_dimensions, lower=some_dimensions, rules=some_rules)
def test_shared_dimensions_match_and_the_others_gather(write, upper, lower, rules):
    """Against a brute-force reading of the rule in the documentation."""
    rules = [{d: DIMENSIONS[d][i] for d, i in rule.items()} for rule in rules]
    rules = [rule for rule in rules if rule.keys() <= set(upper)]
    upstream = [dict(zip(upper, values)) for values in itertools.product(*(DIMENSIONS[d] for d in upper))]
    upstream = [at for at in upstream if not any(rule.items() <= at.items() for rule in rules)]
    recipe = {
        "name": "x",
        "steps": {
            "lower": {
                "uses": "add",
                "with": {"numbers": "${upper.output}"},
                "matrix": {d: DIMENSIONS[d] for d in lower},
            },
            "upper": {
                "uses": "number",
                "with": {"value": 1, "options": {"at": [f"${{matrix.{d}}}" for d in upper]}},
                "matrix": {d: DIMENSIONS[d] for d in upper},
                "exclude": rules,
            },
        },
    }  # fmt: skip
    if not set(upper) - set(lower):
        recipe["steps"]["lower"]["with"]["numbers"] = ["${upper.output}"]
    path = write(json.dumps(recipe))
    wanted, missing = [], not upstream
    for values in itertools.product(*(DIMENSIONS[d] for d in lower)):
        at = dict(zip(lower, values))
        found = [u for u in upstream if all(u[d] == at[d] for d in set(u) & set(at))]
        missing = missing or not found
        wanted.append(found)
    if missing:
        with pytest.raises(UserError, match="lower.*'upper' has nothing at|combinations are excluded"):
            plan_of(path)
        return
    plan = plan_of(path)
    assert [i.point.at for i in plan.by_step["upper"]] == upstream
    for instance, found in zip(plan.by_step["lower"], wanted, strict=True):
        assert [n.point.at for n in instance.needs] == found
        outputs = plan.values(instance, {})["numbers"]
        assert outputs == [str(plan.store.step(n.key) / "number.json") for n in instance.needs]


def test_a_missing_coordinate_names_both_steps(write):
    recipe = """
    name: x
    steps:
      world: {uses: number, with: {value: 1}, matrix: {seed: [0, 1]}, exclude: [{seed: 1}]}
      train:
        uses: read
        with:
          file: "${world.output}"
        matrix: {seed: [0, 1]}
    """
    with pytest.raises(UserError) as error:
        plan_of(write(recipe))
    assert str(error.value) == (
        "recipe.yaml:7: steps.train.with.file: ${world.output}: the step 'world' has nothing at seed=1 "
        "(it is excluded, or not in its matrix)."
    )


def test_labelled_values_show_their_label_and_hand_on_their_keys(write):
    recipe = """
    name: x
    steps:
      n:
        uses: number
        with: {value: "${matrix.model.size}", options: "${matrix.model.more}", scale: "${matrix.rate}"}
        matrix:
          model:
            - {label: small one, size: 1, more: {folder: "${recipe.folder}/x"}}
            - {label: big, size: 9, more: {}}
          rate: [1, 0.5]
        exclude: [{model: big, rate: [0.5]}]
      r: {uses: read, with: {file: "${n.output}"}, matrix: {model: [small one, big], rate: [1]}}
    """
    plan = plan_of(write(recipe))
    assert ids(plan)[:3] == ["n[model=small one,rate=1]", "n[model=small one,rate=0.5]", "n[model=big,rate=1]"]
    assert plan.instances[0].point.at == {"model": "small one", "rate": 1}
    assert plan.values(plan.instances[0], {})["options"] == {"folder": str(Path("x").resolve())}
    assert [i.needs[0].id for i in plan.by_step["r"]] == ["n[model=small one,rate=1]", "n[model=big,rate=1]"]


@given(st.text(max_size=20), st.text(max_size=20))
def test_text_without_references_is_left_alone(before, after):
    text = before.replace("$", "") + "$${not.this}" + after.replace("$", "")
    assert substitute({"k": [text]}, lambda r, p: 1 / 0) == {"k": [text.replace("$${", "${")]}


def test_a_whole_reference_keeps_its_type_and_one_inside_text_becomes_text():
    values = {"a": [1, 2], "b": 3}
    template = {"x": "${a}", "y": ["${b}", "v${b}w${b}"]}
    assert [(p, r.root) for p, r in references(template)] == [
        (("x",), "a"), (("y", 0), "b"), (("y", 1), "b"), (("y", 1), "b"),
    ]  # fmt: skip
    assert substitute(template, lambda r, p: values[r.root]) == {"x": [1, 2], "y": [3, "v3w3"]}
    with pytest.raises(ReferenceProblem, match="a list of 2"):
        substitute("v${a}", lambda r, p: values[r.root])


def test_points_without_a_matrix_are_one():
    assert [p.at for p in points({}, [], {})] == [{}]


KEYS = """
name: x
steps:
  n: {uses: number, with: {value: 1}}
  m: {uses: number, with: {value: 2}}
  s: {uses: add, with: {numbers: ["${n.output}", "${m.output}"]}}
  file: {uses: read, with: {file: input.txt}}
"""


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("steps.n.with.value=1", set()),
        ("steps.n.with.value='1'", set()),
        ("steps.n.with.scale=1", set()),
        ("steps.n.with.options={}", set()),
        ("steps.n.with.speed=7", set()),
        ("steps.n.with.force=true", set()),
        ("workers=3", set()),
        ("title=other", set()),
        ("steps.n.with.value=5", {"n", "s"}),
        ("steps.n.with.mode=negative", {"n", "s"}),
        ("steps.n.with.options={a: 1}", {"n", "s"}),
        ("steps.s.with.plus=5", {"s"}),
        ("steps.s.with.numbers=['${m.output}', '${n.output}']", {"s"}),
        ("steps.s.with.numbers=['${n.output}']", {"s"}),
    ],
)
def test_a_key_changes_exactly_with_what_decides_the_result(override, changed, write):
    Path("input.txt").write_text("text")
    path = write(KEYS)
    before, after = keys(plan_of(path)), keys(plan_of(path, override))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_file_counts_by_its_content_and_name(write):
    path = write(KEYS)
    Path("input.txt").write_text("text")
    first = keys(plan_of(path))
    Path("input.txt").unlink()
    Path("input.txt").write_text("text")
    assert keys(plan_of(path)) == first
    Path("input.txt").write_text("tex2")
    second = keys(plan_of(path))
    assert {n for n in first if first[n] != second[n]} == {"file"}
    Path("sub").mkdir()
    Path("sub/input.txt").write_text("text")
    assert keys(plan_of(path, "steps.file.with.file=sub/input.txt")) == first
    Path("input.csv").write_text("text")
    assert keys(plan_of(path, "steps.file.with.file=input.csv")) != first
    folder = keys(plan_of(path, "steps.file.with.file=sub"))
    Path("sub/more.txt").write_text("")
    assert keys(plan_of(path, "steps.file.with.file=sub"))["file"] != folder["file"]
    assert plan_of(path, "steps.file.with.file=org/name-on-the-hub")


def test_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    from modelwright.recipes import inputs

    data, memory = tmp_path / "data.txt", tmp_path / "memory.json"
    data.write_text("one")
    counted = []
    real = inputs.content_hash
    monkeypatch.setattr(inputs, "content_hash", lambda path: (counted.append(path), real(path))[1])

    def identity():
        found = inputs.Inputs(memory)
        _, value = found.identity(str(data))
        found.save()
        return value

    first = identity()
    assert identity() == first
    assert len(counted) == 2  # just written: it could still change within the clock's resolution
    old = time.time() - 100
    os.utime(data, (old, old))
    assert [identity() for _ in range(3)] == [first] * 3
    assert len(counted) == 3
    data.write_text("two")
    os.utime(data, (old + 1, old + 1))
    assert identity() != first


def test_equal_work_has_equal_keys(write):
    plan = plan_of(write("name: x\nsteps:\n  n: {uses: number, with: {value: 3}, matrix: {seed: [0, 1]}}\n"))
    assert len(plan.instances) == 2
    assert len({i.key for i in plan.instances}) == 1


def test_another_version_has_other_keys(write, monkeypatch, real_code_identity):
    from modelwright.recipes import store

    path = write(KEYS.replace("input.txt", "org/name"))
    code = real_code_identity()
    assert {"python", "torch", "transformers", "modelwright", "source"} <= code.keys()
    monkeypatch.setattr(store, "code_identity", lambda: code)
    before = keys(plan_of(path))
    monkeypatch.setattr(store, "code_identity", lambda: {**code, "torch": "99"})
    after = keys(plan_of(path))
    assert all(before[name] != after[name] for name in before)


def test_the_source_counts_except_for_what_computes_nothing(tmp_path, monkeypatch, real_code_identity):
    from modelwright import provenance

    (tmp_path / "training").mkdir()
    (tmp_path / "report").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))

    def source():
        real_code_identity.cache_clear()
        return real_code_identity()["source"]

    (tmp_path / "training" / "loss.py").write_text("1")
    first = source()
    (tmp_path / "report" / "page.py").write_text("1")
    (tmp_path / "training" / "claim.py").write_text("1")
    assert source() == first
    (tmp_path / "training" / "loss.py").write_text("2")
    second = source()
    (tmp_path / "training" / "loss.py").rename(tmp_path / "training" / "loss2.py")
    assert len({first, second, source()}) == 3


PICK = """
name: x
steps:
  n: {uses: number, with: {value: "${matrix.a}"}, matrix: {a: [3, 1, 2], b: [0, 1]}}
  best:
    uses: pick
    with: {from: "${n.result.value}", value: "${n.output}"}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.best.with.from=5", "one reference to a number"),
        ("steps.best.with.from=x${n.result.value}", "one reference to a number"),
        ("steps.best.with.from=${seeds}", "one reference to a number"),
        ("steps.best.with.prefer=low", "did you mean 'lowest'"),
        ("steps.best.with.form=1", "'pick' has no such option: did you mean 'from'"),
        ("steps.best.with.value=${best.output}", "refers to its own result"),
    ],
)
def test_mistakes_in_pick(override, message, write):
    with pytest.raises(UserError, match="steps.best") as error:
        plan_of(write(PICK), override)
    assert message in str(error.value)


def test_pick_takes_the_value_at_the_coordinates_of_the_best_number(write):
    """Also when the two steps list their dimensions and values in different orders."""
    recipe = (
        PICK
        + """
  other: {uses: number, with: {value: "${matrix.a}"}, matrix: {b: [1, 0], a: [1, 2, 3]}}
  second:
    uses: pick
    with: {from: "${n.result.value}", value: {path: "${other.output}", a: "${matrix.a}"}, prefer: highest}
"""
    )
    plan = plan_of(write(recipe))
    results = {i.key: {"value": 10 * i.point.at["a"] + i.point.at["b"]} for i in plan.by_step["n"]}
    second = plan.by_step["second"][0]
    found = plan.values(second, results)
    assert found["at"]["a"] == 3
    assert found["best"] == max(r["value"] for r in results.values())
    other = next(i for i in plan.by_step["other"] if i.point.at == found["at"])
    assert found["value"] == {"path": str(plan.store.step(other.key) / "number.json"), "a": 3}
    assert found["candidates"] == 6


def test_pick_passes_over_what_is_not_finite_and_refuses_what_is_no_number():
    from modelwright.recipes.pick import choose

    places = [{"a": i} for i in range(4)]
    assert choose([None, 2.0, 1, 1], places, "lowest") == {"index": 2, "best": 1, "at": {"a": 2}, "candidates": 4}
    assert choose([None, 2.0, 1, float("inf")], places, "highest")["index"] == 1
    with pytest.raises(UserError, match="none of the 4"):
        choose([None] * 4, places, "lowest")
    with pytest.raises(UserError, match="must be numbers"):
        choose([1, "x", 2, 3], places, "lowest")
