"""Running in this process (with real workers): results, caching, failures."""

import json
import shutil
from pathlib import Path

import pytest

from modelwright.errors import UserError
from modelwright.recipes.run import StepFailed, run_recipe

RECIPE = """
name: sums
title: Sums
seeds: [1, 2]
workers: 2
steps:
  number:
    uses: number
    with: {value: "${matrix.seed}", scale: "${matrix.scale}"}
    matrix: {seed: "${seeds}", scale: [1, 10]}
  sum:
    uses: add
    with: {numbers: "${number.output}"}
    matrix: {seed: "${seeds}"}
  best:
    uses: pick
    with: {from: "${sum.result.sum}", value: "${sum.output}", prefer: highest}
  copy:
    uses: read
    with: {file: "${best.result.value}", tag: "sum ${best.result.best} of ${best.result.at.seed}"}
"""


class Seen:
    def __init__(self):
        self.lines = []

    def start(self, label, total=None):
        self.lines.append(label)

    def advance(self, units=1, note=""):
        pass

    def message(self, text):
        self.lines.append(text)


def results(run):
    return {step["id"]: step["result"] for step in run["steps"]}


def test_a_run_computes_what_the_recipe_says_and_keeps_it(write, executed):
    seen = Seen()
    run = run_recipe(write(RECIPE), "out", progress=seen)
    assert {k: v["sum"] for k, v in results(run).items() if "sum" in v} == {"sum[seed=1]": 11, "sum[seed=2]": 22}
    assert executed() == ["add 2", "add 2", *["number 1"] * 2, *["number 2"] * 2, "read"]
    assert seen.lines[0] == "8 steps; 2 workers"
    assert any(line.startswith("[8/8] copy  ") for line in seen.lines)

    kept = json.loads(Path("out/run.json").read_text())
    assert kept["format"] == 1
    assert (kept["name"], kept["title"], kept["status"], kept["planned"]) == ("sums", "Sums", "done", 8)
    assert kept["recipe_text"] == Path("recipe.yaml").read_text()
    assert kept["recipe"]["steps"]["sum"]["with"] == {"numbers": "${number.output}"}
    assert {"machine", "versions", "started", "seconds", "report"} <= kept.keys()
    assert [s["id"] for s in kept["steps"]][:2] == ["number[scale=1,seed=1]", "number[scale=10,seed=1]"]
    assert kept["steps"][0]["at"] == {"seed": 1, "scale": 1}
    assert not any(s["cached"] for s in kept["steps"])
    best, copy = kept["steps"][-2:]
    assert best["result"]["at"] == {"seed": 2}
    assert copy["options"]["tag"] == "sum 22.0 of 2"
    # Nothing in it says where the folder lies.
    assert str(Path.cwd()) not in Path("out/run.json").read_text()
    assert copy["options"]["file"] == best["result"]["value"]
    assert json.loads((Path("out") / best["result"]["value"]).read_text()) == 22
    assert (Path("out") / copy["folder"] / "copy.txt").read_text() == "22.0"
    assert json.loads((Path("out") / copy["folder"] / "result.json").read_text())["result"] == copy["result"]
    assert {p.name for p in Path("out", copy["folder"]).iterdir()} == {"copy.txt", "result.json"}
    number = kept["steps"][0]["result"]
    assert number["nan"] is None
    assert number["path"] == kept["steps"][0]["folder"] + "/number.json"


def test_a_rerun_does_only_what_changed(write, executed):
    path = write(RECIPE)
    first = run_recipe(path, "out")
    executed()
    again = run_recipe(path, "out")
    assert executed() == []
    assert all(step["cached"] for step in again["steps"])
    assert results(again) == results(first)
    more = run_recipe(path, "out", overrides=["seeds=[1, 2, 3]"])
    assert executed() == ["add 2", "number 3", "number 3", "read"]
    assert results(more)["best"]["at"] == {"seed": 3}
    assert [s["cached"] for s in more["steps"] if s["step"] == "sum"] == [True, True, False]
    back = run_recipe(path, "out", prune=True)
    assert executed() == []
    assert results(back) == results(first)
    run_recipe(path, "out", overrides=["seeds=[1, 2, 3]"])
    assert executed() == ["add 2", "number 3", "number 3", "read"]
    run_recipe(path, "out", fresh=True)
    assert len(executed()) == 7


def test_no_worker_is_started_and_no_torch_imported_when_all_is_there(write, monkeypatch):
    import sys

    path = write(RECIPE)
    run_recipe(path, "out")
    monkeypatch.setattr("modelwright.recipes.pool.subprocess.Popen", None)
    had = "torch" in sys.modules
    run_recipe(path, "out")
    assert ("torch" in sys.modules) == had


def test_a_run_folder_can_be_moved(write, executed):
    path = write(RECIPE)
    run_recipe(path, "out")
    executed()
    shutil.move("out", "elsewhere")
    run = run_recipe(path, "elsewhere", overrides=["steps.copy.with.tag=new"])
    assert executed() == ["read"]
    assert results(run)["copy"]["length"] == 4


def test_what_a_killed_run_was_writing_is_cleared_away(write):
    path = write(RECIPE)
    step = Path("out", run_recipe(path, "out")["steps"][0]["folder"])
    (step / "result.json").unlink()
    for scratch in (Path("out/.run.json.ab12_x3z.partial"), step / ".number.json.ab12_x3z.partial"):
        scratch.mkdir()
        (scratch / "half").write_text("of it")
    run_recipe(path, "out")
    assert not list(Path("out").rglob("*.partial"))


@pytest.mark.parametrize("lost", ["result.json", "number.json", "half a result.json"])
def test_a_lost_or_broken_result_is_made_again(lost, write, executed):
    path = write(RECIPE)
    first = run_recipe(path, "out")
    executed()
    folder = Path("out", first["steps"][0]["folder"])
    if lost.startswith("half"):
        (folder / "result.json").write_text('{"format": 1, "res')
    else:
        (folder / lost).unlink()
    assert results(run_recipe(path, "out")) == results(first)
    assert executed() == ["number 1"]


def test_a_changed_input_file_is_seen(write, executed):
    Path("in.txt").write_text("one")
    path = write('name: x\nsteps: {r: {uses: read, with: {file: "${recipe.folder}/in.txt"}}}')
    assert results(run_recipe(path, "out"))["r"]["length"] == 3
    Path("in.txt").write_text("three")
    run = run_recipe(path, "out")
    assert results(run)["r"]["length"] == 5
    assert run["steps"][0]["options"] == {"file": "in.txt"}
    Path("in.txt").write_text("one")
    run_recipe(path, "out")
    assert executed() == ["read", "read"]


TROUBLE = """
name: trouble
workers: 2
steps:
  first: {uses: number, with: {value: 1}}
  bad:
    uses: trouble
    with: {how: user}
  later: {uses: read, with: {file: "${bad.output}"}}
  long: {uses: slow, with: {steps: 1000}}
"""


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", UserError, "recipe.yaml:5: the step 'bad' failed: pool.jsonl:3: this line is not JSON."),
        ("disk", UserError, "the step 'bad' failed: the disk is full"),
        ("memory", UserError, "the step 'bad' failed: the accelerator's memory is full"),
        ("kill", UserError, "the process of the step 'bad' was killed, most often because memory ran out"),
        ("exit", UserError, "the process of the step 'bad' died (exit code 7)"),
        ("defect", StepFailed, "the step 'bad' failed through a defect, ZeroDivisionError: a defect (traceback in "),
        ("unjsonable", StepFailed, "the step 'bad' failed through a defect, TypeError: a verb's result holds a object"),
    ],
)
def test_a_failing_step_stops_the_rest_and_is_named(how, kind, message, write, executed):
    path = write(TROUBLE)
    with pytest.raises(kind) as error:
        run_recipe(path, "out", overrides=[f"steps.bad.with.how={how}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    kept = json.loads(Path("out/run.json").read_text())
    assert kept["status"] == "failed"
    assert [s["id"] for s in kept["steps"]] in ([], ["first"])
    traces = list(Path("out/store").glob("*.error.txt"))
    assert len(traces) == (kind is StepFailed)
    if traces:
        assert str(traces[0].resolve()) in str(error.value)
        assert "Traceback" in traces[0].read_text()
    if how == "kill":
        log = Path(str(error.value).split("output is in ")[1].rstrip("."))
        assert log.read_text() == "some words of a library\n"
    assert not list(Path("out").rglob("*.partial"))
    executed()
    run = run_recipe(
        path,
        "out",
        overrides=["steps.bad.uses=number", "steps.bad.with={value: 4}", "steps.long.with.steps=3"],
    )
    assert results(run)["later"]["length"] == 3


def test_an_entry_that_a_result_does_not_have_is_a_sentence(write):
    path = write("""
    name: x
    steps:
      n: {uses: number, with: {value: 1}}
      m:
        uses: number
        with:
          value: "${n.result.deep.lst}"
    """)
    with pytest.raises(UserError) as error:
        run_recipe(path, "out")
    assert "recipe.yaml:7: steps.m.with.value: ${n.result.deep.lst}: the result of 'n' has no 'lst'" in str(error.value)
    run = run_recipe(path, "out", overrides=["steps.m.with.value=${n.result.deep.list.1}"])
    assert results(run)["m"]["value"] == 2
    with pytest.raises(UserError, match="the step 'm' failed: the option value: input should be a valid integer"):
        run_recipe(path, "out", overrides=["steps.m.with.value=${n.result.deep}"])


def test_a_folder_that_holds_something_else_is_left_alone(write):
    path = write(RECIPE)
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files and no run"):
        run_recipe(path, "mine", fresh=True)
    with pytest.raises(UserError, match="is a file"):
        run_recipe(path, "mine/thesis.txt")
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.txt"]
    run_recipe(path, "out")
    with pytest.raises(UserError, match="holds a run of the recipe 'sums'"):
        run_recipe(write("name: other\nsteps: {n: {uses: number, with: {value: 1}}}", "other.yaml"), "out", fresh=True)
    with pytest.raises(UserError, match="workers is -1"):
        run_recipe(path, "out", workers=-1)


def test_a_defect_of_the_report_does_not_lose_the_run(write, monkeypatch):
    import modelwright.report.render as render
    from modelwright.recipes import run as module

    monkeypatch.undo()  # the real call of the report
    monkeypatch.setattr(render, "render", lambda folder: 1 / 0)
    folder = Path("out").resolve()
    folder.mkdir()
    with pytest.raises(StepFailed, match="every step is done, but the report failed through a defect, ZeroDivision"):
        module._render(folder)
    assert "Traceback" in (folder / "report.error.txt").read_text()
    monkeypatch.setattr(render, "render", lambda folder: folder / "report.html")
    assert module._render(folder) == str(folder / "report.html")
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
