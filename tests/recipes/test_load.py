"""Every mistake in a recipe is one sentence with file, line and field."""
# ruff: noqa: E501 - a mistake and its message are easier to read in one line

import itertools
from pathlib import Path

import pytest

from modelwright.errors import UserError
from modelwright.recipes.load import bundled, find_recipe, load_recipe
from modelwright.recipes.plan import Plan

GOOD = """
name: good
seeds: [0, 1]
steps:
  number:
    uses: number
    with: {value: "${matrix.seed}"}
    matrix:
      seed: "${seeds}"
  sum:
    uses: add
    with:
      numbers: "${number.output}"
      plus: 1
"""


def plan(path, tmp_path, overrides=()):
    return Plan(load_recipe(path, overrides), tmp_path / "run")


def test_a_good_recipe_is_fine(write, tmp_path):
    found = plan(write(GOOD), tmp_path)
    assert [i.id for i in found.instances] == ["number[seed=0]", "number[seed=1]", "sum"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "sedes: [0, 1]", "recipe.yaml:2: sedes: there is no such key here: did you mean 'seeds'"),
        ("    matrix:", "    matrx:", "recipe.yaml:7: steps.number.matrx: there is no such key here: did you mean 'matrix'"),
        ("name: good", "title: good", "recipe.yaml:1: the key 'name' is missing."),
        ("    uses: add\n", "", "recipe.yaml:9: steps.sum: the key 'uses' is missing."),
        ("name: good", "name: a/b", "recipe.yaml:1: name: string should match"),
        ("seeds: [0, 1]", "seeds: [0, one]", "recipe.yaml:2: seeds.1: input should be a valid integer"),
        ("seeds: [0, 1]", "workers: -1", "recipe.yaml:2: workers: input should be greater than or equal to 0"),
        ("uses: add", "uses: ad", "recipe.yaml:10: steps.sum.uses: the verb 'ad' does not exist: did you mean 'add'"),
        ("uses: add", "uses: run", "recipe.yaml:10: steps.sum.uses: the verb 'run' cannot be a step"),
        ("      plus: 1", "      pluss: 1", "recipe.yaml:13: steps.sum.with.pluss: 'add' has no such option: did you mean 'plus'?"),
        ("      plus: 1", "      output: x", "recipe.yaml:13: steps.sum.with.output: a recipe decides itself where outputs go"),
        ("      plus: 1", "      plus: much", "recipe.yaml:13: steps.sum.with.plus: input should be a valid number"),
        ('"${number.output}"', '["${number.output}"]', "recipe.yaml:12: steps.sum.with.numbers.0: input is not a valid path"),
        ('"${number.output}"', "[1.5]", "recipe.yaml:12: steps.sum.with.numbers.0: input is not a valid path"),
        ('"${number.output}"', "[none.json]", "recipe.yaml:12: steps.sum.with.numbers.0: none.json does not exist."),
        ('"${number.output}"', '["${recipe.folder}/none"]', "/none does not exist."),
        ('"${number.output}"', "['*.none']", "recipe.yaml:12: steps.sum.with.numbers.0: no file matches *.none."),
        ('"${number.output}"', "['-']", "standard input cannot be read in a recipe"),
        ('      numbers: "${number.output}"\n', "", "recipe.yaml:11: steps.sum.with: 'add' needs the option 'numbers'."),
        ("${number.output}", "${nubmer.output}", "recipe.yaml:12: steps.sum.with.numbers: ${nubmer.output} names no step: did you mean 'number'?"),
        ("${number.output}", "${number.outputs}", "did you mean 'output'?"),
        ("${number.output}", "${number}", "after a step's name comes 'output' or 'result'"),
        ("${number.output}", "${number.output.x}", "'output' is a path"),
        ("${number.output}", "${number.output", "has a '${' without its '}'"),
        ("${number.output}", "${}", "is not a reference"),
        ("${number.output}", "${number.output}/x", "${number.output} is a list of 2, so it cannot stand inside a longer text."),
        ("${number.output}", "${sum.output}", "recipe.yaml:9: steps.sum: this step refers to its own result."),
        ("${matrix.seed}", "${matrix.sed}", "recipe.yaml:6: steps.number.with.value: ${matrix.sed}: there is no 'sed': did you mean 'seed'?"),
        ("${matrix.seed}", "${matrix}", "lacks the dimension"),
        ("${matrix.seed}", "${recipe.foldr}", "${recipe.foldr} means nothing here: did you mean 'recipe.folder'?"),
        ("${matrix.seed}", "x${matrix.seed}", "recipe.yaml:6: steps.number.with.value: input should be a valid integer"),
        ('"${seeds}"', "[]", "recipe.yaml:8: steps.number.matrix.seed: a dimension is a list of at least one value"),
        ('"${seeds}"', "[1, 1]", "recipe.yaml:8: steps.number.matrix.seed.1: the value '1' stands twice"),
        ('"${seeds}"', "[{x: 1}]", "a mapping with a 'label'"),
        ('"${seeds}"', '"${number.output}"', "${number.output} means nothing here"),
        ("  sum:", "    exclude: [{sed: 1}]\n  sum:", "recipe.yaml:9: steps.number.exclude.0.sed: the matrix has no such dimension: did you mean 'seed'?"),
        ("  sum:", "    exclude: [{seed: 5}]\n  sum:", "the dimension has no value '5'"),
        ("  sum:", "    exclude: [{seed: [0, 1]}]\n  sum:", "all 2 combinations are excluded"),
        ("  sum:", "    exclude: [{}]\n  sum:", "an empty rule would exclude everything"),
        ("  sum:", "  matrix:", "a step's name is made of"),
        ("  sum:", "  a.b:", "a step's name is made of"),
        ("steps:", "report: {compar: []}\nsteps:", "recipe.yaml:3: report.compar: there is no such key here: did you mean 'compare'?"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_place(old, new, message, write, tmp_path):
    assert old in GOOD
    with pytest.raises(UserError) as error:
        plan(write(GOOD.replace(old, new, 1)), tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


REPORT = (
    GOOD
    + """
report:
  compare:
    - title: A
      metric: number.result.value
      rows: seed
  samples: {step: sum}
"""
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "number.result",
            "nubmer.result",
            "recipe.yaml:18: report.compare.0.metric: there is no step 'nubmer': did you mean 'number'",
        ),
        (
            "rows: seed",
            "rows: sede",
            "recipe.yaml:19: report.compare.0.rows: the step 'number' has no dimension 'sede': did you mean 'seed'",
        ),
        ("step: sum", "step: sums", "recipe.yaml:20: report.samples.step: there is no step 'sums': did you mean 'sum'"),
        ("number.result.value", "value", "recipe.yaml:18: report.compare.0.metric: "),
    ],
)
def test_a_report_that_names_nothing_is_refused_before_the_run(old, new, message, write, tmp_path):
    assert plan(write(REPORT), tmp_path)
    with pytest.raises(UserError) as error:
        plan(write(REPORT.replace(old, new)), tmp_path)
    assert message in str(error.value)


def test_a_circle_names_its_steps(write, tmp_path):
    recipe = """
    name: circle
    steps:
      a: {uses: read, with: {file: "${c.output}"}}
      b: {uses: read, with: {file: "${a.output}"}}
      c: {uses: read, with: {file: "${b.output}", tag: "${d.output}"}}
      d: {uses: number, with: {value: 1}}
    """
    with pytest.raises(UserError, match="the steps go in a circle: ") as error:
        plan(write(recipe), tmp_path)
    chain = str(error.value).split("circle: ")[1].rstrip(".").split(" needs ")
    assert chain[0] == chain[-1]
    assert {*chain} == {"'a'", "'b'", "'c'"}
    needs = {"'a'": "'c'", "'b'": "'a'", "'c'": "'b'"}
    assert all(needs[first] == second for first, second in itertools.pairwise(chain))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("steps.sum.with.pluss=2", "--set steps.sum.with.pluss=2: steps.sum.with.pluss: 'add' has no such option"),
        ("steps.sum.with.plus=x", "--set steps.sum.with.plus=x: steps.sum.with.plus: input should be a valid number"),
        ("sedes=[1]", "--set sedes=[1]: sedes: there is no such key here: did you mean 'seeds'"),
        ("steps.sun.with.plus=1", "there is no step 'sun': did you mean 'sum'"),
        ("seeds=3", "--set seeds=3: seeds: input should be a valid list"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(given, message, write, tmp_path):
    with pytest.raises(UserError) as error:
        plan(write(GOOD), tmp_path, [given])
    assert message in str(error.value)


def test_overrides_reach_the_plan(write, tmp_path):
    found = plan(write(GOOD), tmp_path, ["seeds=[4]", "steps.number.with.scale=2"])
    assert [i.id for i in found.instances] == ["number[seed=4]", "sum"]
    assert found.values(found.instances[0], {}) == {"value": 4, "scale": 2}


def test_recipes_are_found_by_path_or_bundled_name(write, tmp_path, monkeypatch):
    import modelwright.recipes.load as load

    monkeypatch.setattr(load, "_BUNDLED", tmp_path / "bundled")
    (tmp_path / "bundled").mkdir()
    (tmp_path / "bundled" / "quickstart.yaml").write_text("name: q\nsteps: {x: {uses: nothing}}\n")
    assert list(bundled()) == ["quickstart"]
    assert find_recipe("quickstart") == tmp_path / "bundled" / "quickstart.yaml"
    assert str(find_recipe(write(GOOD))) == "recipe.yaml"
    with pytest.raises(UserError, match="^quickstart.yaml:2: "):
        load_recipe("quickstart")
    for name, message in [
        ("quikstart", "did you mean 'quickstart'"),
        ("none.yaml", "none.yaml does not exist"),
        ("a/b", "a/b does not exist"),
        (".", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            find_recipe(name)


def test_the_recipe_in_the_documentation_is_valid(write, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    for name in ("pool", "target", "heldout"):
        Path(f"{name}.jsonl").write_text("{}")
    found = plan(write(example), tmp_path)
    assert len(found.by_step["train"]) == 9
    assert found.by_step["train"][0].needs[0].id == "select[method=zip-fit,seed=0]"
    assert len(found.by_step["best"][0].candidates) == 6


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipes_are_valid(name, tmp_path):
    assert plan(name, tmp_path).instances
