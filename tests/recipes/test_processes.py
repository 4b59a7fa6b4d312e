"""Killing, interrupting and doubling real runs."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from forked import gone

RECIPE = """
name: killed
seeds: [0, 1]
workers: 2
steps:
  slow:
    uses: slow
    with: {seed: "${matrix.seed}", steps: 16, seconds: 0.05}
    matrix: {seed: "${seeds}"}
  more:
    uses: slow
    with: {seed: "${slow.result.sum}", steps: 4, seconds: 0.05}
    matrix: {seed: "${seeds}"}
  first: {uses: number, with: {value: 1}}
"""


def outcome(folder):
    """Everything that a run leaves, without times."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name not in (".lock", "run.json") and path.is_file():
            text = path.read_text()
            if path.name == "result.json":
                record = json.loads(text)
                text = {key: record[key] for key in ("verb", "options", "result")}
            found[str(path.relative_to(folder))] = text
    run = json.loads(Path(folder, "run.json").read_text())
    return found, run["status"], [(s["id"], s["result"], s["options"], s["folder"]) for s in run["steps"]]


def workers_of(folder):
    return [
        p
        for p in psutil.process_iter(["cmdline", "cwd"])
        if "modelwright.recipes.worker" in (p.info["cmdline"] or []) and p.info["cwd"] == str(Path(folder).resolve())
    ]


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return found


def test_killed_at_any_moment_the_next_run_ends_with_the_same_result(write, modelwright, executed, tmp_path):
    path = write(RECIPE)
    undisturbed = modelwright("run", path, "-o", "undisturbed")
    assert undisturbed.wait(240) == 0, undisturbed.stderr.read()
    executed()
    log, begun = tmp_path / "executed.txt", 0
    for kill in (0.05, 0.25, 0.45, 0.1):
        # So slow that no step ends before it is killed, however late that is; how slow is no part of what it does.
        process = modelwright("run", path, "-o", "killed", "--set", "steps.slow.with.seconds=0.5")
        wait_for(lambda begun=begun: log.exists() and log.read_text().count("slow") > begun)
        wait_for(lambda: list(Path("killed").glob("store/*/count.working")))
        begun = log.read_text().count("slow")
        time.sleep(kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # The workers notice by themselves, at once.
        wait_for(lambda: not workers_of("."), 60)
    last = modelwright("run", path, "-o", "killed")
    assert last.wait(240) == 0, last.stderr.read()
    done = executed()
    assert any("the middle" in line for line in done), done
    assert outcome("killed") == outcome("undisturbed")


def test_workers_of_a_killed_run_end_at_once_with_their_own_children(write, modelwright):
    path = write("name: x\nsteps:\n  p: {uses: parent}\n")
    process = modelwright("run", path, "-o", "out")
    child = int(wait_for(lambda: [p.read_text() for p in Path("out").glob("store/*/child.txt")])[0])
    assert psutil.pid_exists(child)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not workers_of("."), 60)
    assert gone([child])


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_no_process_and_nothing_half_written(stop, code, write, modelwright):
    path = write(RECIPE)
    process = modelwright("run", path, "-o", "out", "--set", "steps.slow.with.steps=1000")
    wait_for(lambda: len(list(Path("out").glob("store/*/count.working"))) == 2)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "The same command continues" in errors
    assert "Traceback" not in errors
    assert workers_of(".") == []
    assert not list(Path("out").rglob("*.partial"))
    assert not list(Path("out").rglob("count"))
    assert json.loads(Path("out/run.json").read_text())["status"] == "interrupted"


def test_a_second_run_in_the_same_folder_is_refused_or_waits(write, modelwright):
    path = write(RECIPE)
    longer = ("--set", "steps.slow.with.steps=100")
    first = modelwright("run", path, "-o", "out", *longer)
    wait_for(lambda: list(Path("out").glob("store/*/count.working")))
    first.send_signal(signal.SIGSTOP)  # until the others have been seen to meet it, however late they start
    try:
        waiting = modelwright("run", path, "-o", "out", "--wait", "--json", *longer)
        second = modelwright("run", path, "-o", "out")
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 2
        assert f"another run is at work in {Path('out').resolve()}" in errors
        assert first.poll() is None
        assert waiting.poll() is None
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0
    out, errors = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, errors
    assert all(step["cached"] for step in json.loads(out)["steps"])


def test_a_dry_run_prints_the_plan_and_does_nothing(write, modelwright, executed):
    path = write(RECIPE)
    before = sorted(Path().iterdir())
    process = modelwright("run", path, "--dry-run", "--fresh", "--prune")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "slow[seed=0]" in out
    assert out.count("to do") == 6
    assert sorted(Path().iterdir()) == before
    assert executed() == []


def test_a_mistake_is_one_sentence_with_exit_code_2_and_a_defect_with_1(write, modelwright):
    path = write("name: x\nsteps:\n  t:\n    uses: trouble\n    with: {how: user}\n")
    for arguments, code, message in [
        ([], 2, "modelwright: error: recipe.yaml:3: the step 't' failed: pool.jsonl:3: this line is not JSON."),
        (["--set", "steps.t.with.how=defect"], 1, "modelwright: the step 't' failed through a defect, ZeroDivision"),
        (["--set", "steps.t.wiht.how=x"], 2, "did you mean 'with'?"),
    ]:
        process = modelwright("run", path, *arguments)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code
        assert message in errors
        assert "Traceback" not in errors


def test_the_table_at_the_end_counts_cached_steps(write, modelwright):
    path = write('name: x\nsteps: {n: {uses: number, with: {value: "${matrix.a}"}, matrix: {a: [1, 2]}}}')
    for cached in ("0", "2"):
        out, _ = modelwright("run", path).communicate(timeout=120)
        assert out.splitlines()[1].split()[:4] == ["n", "number", "2", cached]
        assert f"Results: {Path('runs/x').resolve()}" in out
