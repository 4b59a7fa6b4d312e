import json
import os
import signal
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest

import forked
from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.verify import runner
from modelwright.verify.claim import Bar
from modelwright.verify.runner import judge, run_claim, verdict
from verify import toy_claims as toys

VOLATILE = ("seconds", "cpu_seconds", "seed_seconds", "workers", "date")


class Listening(Silent):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    progress = Listening()
    document = run_claim(toys.IN_PART, "cpu", None, 1, progress, cache=tmp_path_factory.mktemp("cache"))
    return document, progress.lines


def test_document_is_complete_and_json(serial):
    document, lines = serial
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["seeds"] == document["claim_seeds"] == [0, 1, 2, 3, 4]
    assert document["prepared"]["rates"] == {"ours": 1e-3, "plain": 3e-3}
    assert {"versions", "machine", "date", "cpu_seconds", "paper"} <= document.keys()
    assert set(lines) == {f"seed {s}: measured" for s in range(5)}


def test_summary_against_a_plain_computation(serial):
    document, _ = serial
    measured = [document["measurements"][str(s)] for s in range(5)]
    ours, plain = ([m[v]["loss"] for m in measured] for v in ("ours", "plain"))
    entry = document["summary"]["plain"]["loss"]
    assert entry["mean"] == pytest.approx(statistics.fmean(plain))
    assert entry["sd"] == pytest.approx(statistics.stdev(plain))
    assert entry["ratio"]["mean"] == pytest.approx(statistics.fmean(o / p for o, p in zip(ours, plain)))
    assert entry["gain"]["mean"] == pytest.approx(statistics.fmean(p - o for o, p in zip(ours, plain)))
    # Higher is better for the share, so the gain's sign turns.
    assert document["summary"]["plain"]["share"]["gain"]["mean"] == pytest.approx(0.25)
    assert "share" not in document["summary"]["strong"]


def test_parallel_equals_serial(serial, tmp_path):
    parallel = run_claim(toys.IN_PART, "cpu", None, 3, Silent(), cache=tmp_path)
    for key in set(parallel) - set(VOLATILE):
        assert parallel[key] == serial[0][key], key


def test_verdicts(serial):
    document, _ = serial
    assert document["verdict"] == "holds in part"
    assert [bar["met"] for bar in document["bars"]] == [True, False]

    def judged(claim):
        return verdict([judge(bar, claim, document["measurements"]) for bar in claim.bars])

    assert judged(toys.HOLDS) == "holds"
    assert judged(toys.FAILS) == "does not hold at this scale"


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_bar_is_met_exactly_at_its_bound(better):
    scipy_stats = pytest.importorskip("scipy.stats")
    metric, sign = ("loss", -1) if better == "lower" else ("share", 1)
    gains = [0.31, 0.28, 0.35]
    measured = {str(i): {"ours": {metric: 1 + sign * g}, "plain": {metric: 1.0}} for i, g in enumerate(gains)}
    bound = statistics.fmean(gains) - scipy_stats.t.ppf(0.95, 2) * statistics.stdev(gains) / 3**0.5
    for margin, met in ((bound - 1e-9, True), (bound + 1e-9, False)):
        bar = Bar(statement="", method="ours", baseline="plain", metric=metric, margin=margin)
        assert judge(bar, toys.HOLDS, measured)["met"] is met


def test_one_seed_gives_no_verdict(tmp_path):
    document = run_claim(toys.HOLDS, "cpu", [3], 1, Silent(), cache=tmp_path)
    assert document["verdict"] == runner.NOT_ENOUGH_SEEDS
    assert document["bars"][0]["met"] is None
    assert document["summary"]["ours"]["loss"]["sd"] is None


def test_a_diverged_seed_counts_against_the_method(tmp_path):
    document = run_claim(toys.claim(toys.diverge), "cpu", [0, 1, 2], 3, Silent(), cache=tmp_path)
    assert document["measurements"]["2"]["ours"]["loss"] is None
    assert document["summary"]["ours"]["loss"]["diverged"] == 1
    assert document["bars"][0]["missing_seeds"] == 1
    assert document["verdict"] == "does not hold at this scale"


def test_workers_have_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    document = run_claim(toys.claim(toys.threads), "cpu", [0], 1, Silent(), cache=tmp_path)
    assert document["measurements"]["0"]["ours"]["loss"] == 1.0


def test_failures_name_the_seed_and_the_cause(tmp_path):
    with pytest.raises(RuntimeError, match=r"seed 0[\s\S]*ZeroDivisionError: seed 0 broke"):
        run_claim(toys.claim(toys.fail), "cpu", [0], 1, Silent(), cache=tmp_path)
    with pytest.raises(RuntimeError, match="claim declares"):
        run_claim(toys.claim(toys.stray), "cpu", [0], 1, Silent(), cache=tmp_path)
    with pytest.raises(UserError, match="package 'toy'"):
        run_claim(toys.claim(toys.lack), "cpu", [0], 1, Silent(), cache=tmp_path)


def test_bad_requests(tmp_path):
    with pytest.raises(UserError, match="no scale 'huge'"):
        run_claim(toys.HOLDS, "huge", None, 1, Silent(), cache=tmp_path)
    with pytest.raises(UserError, match="At least one seed"):
        run_claim(toys.HOLDS, "cpu", [], 1, Silent(), cache=tmp_path)
    with pytest.raises(UserError, match="--workers is 0"):
        run_claim(toys.HOLDS, "cpu", [0], 0, Silent(), cache=tmp_path)
    with pytest.raises(ValueError, match="at least one bar"):
        run_claim(toys.claim(bars=()), "cpu", [0], 1, Silent(), cache=tmp_path)
    unknown = Bar(statement="", method="ours", baseline="nobody", metric="loss")
    with pytest.raises(ValueError, match="'nobody'"):
        run_claim(toys.claim(bars=(unknown,)), "cpu", [0], 1, Silent(), cache=tmp_path)


def test_gpu_scale_needs_a_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        run_claim(toys.HOLDS, "gpu", None, 1, Silent(), cache=tmp_path)


_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from verify import toy_claims as toys
from modelwright.progress import Silent
from modelwright.verify.runner import run_claim
if __name__ == "__main__":
    run_claim(toys.claim(toys.slow, prepare=None), "cpu", [0, 1], 1, Silent(), cache=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_continues(tmp_path, monkeypatch, how):
    log, cache = tmp_path / "log", tmp_path / "cache"
    monkeypatch.setenv("TOY_LOG", str(log))
    script = tmp_path / "verify_slowly.py"
    script.write_text(_SCRIPT)
    tests = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, str(script), tests, str(cache)],
        env={**os.environ, "TOY_SLEEP": "60"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while (log.read_text().split() if log.exists() else []) != ["0", "1"]:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match="by another process"):
        run_claim(toys.claim(toys.slow, prepare=None), "cpu", [0, 1], 1, Silent(), cache=cache)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert children
    process.send_signal(how)
    process.wait(120)
    assert forked.gone(children), "a worker outlived the killed run"
    document = run_claim(toys.claim(toys.slow, prepare=None), "cpu", [0, 1], 1, Silent(), cache=cache)
    assert log.read_text().split() == ["0", "1", "1"]
    assert document["measurements"]["0"]["ours"]["loss"] == 0.0
    assert document["verdict"] == "holds"
    assert [p.name for p in (cache / "toy.cpu").iterdir()] == ["lock"]


def test_ctrl_c_while_a_worker_starts_leaves_none(tmp_path, monkeypatch):
    """Python would wait at its end for a worker that was not stopped, and a seed may take an hour."""
    from multiprocessing import active_children
    from multiprocessing.context import SpawnProcess

    real = SpawnProcess.start

    def cut(self):
        real(self)
        assert self.is_alive()
        raise KeyboardInterrupt

    monkeypatch.setattr(SpawnProcess, "start", cut)
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TOY_SLEEP", "100")
    with pytest.raises(KeyboardInterrupt):
        run_claim(toys.claim(toys.slow, prepare=None), "cpu", [1], 1, Silent(), cache=tmp_path)
    assert not [child for child in active_children() if child.name == "seed-1"]


def test_workers_that_have_ended_are_let_go(tmp_path, monkeypatch):
    """Each holds a file open, and a claim may have more seeds and variants than a process may have files."""
    from multiprocessing.context import SpawnProcess

    real, started, held = SpawnProcess.start, [], []

    def noted(self):
        real(self)
        started.append(weakref.ref(self))
        held.append(sum(process() is not None for process in started))

    monkeypatch.setattr(SpawnProcess, "start", noted)
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    run_claim(toys.claim(toys.slow, prepare=None), "cpu", [1, 2, 3], 1, Silent(), cache=tmp_path)
    assert len(held) == 3
    assert held[-1] <= 2


def test_changed_code_is_not_mixed_with_kept_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    claim = toys.claim(toys.slow, prepare=None)
    monkeypatch.setattr(runner, "_forget", lambda folder: None)  # as if the run had been killed at its very end
    run_claim(claim, "cpu", [0], 1, Silent(), cache=tmp_path)
    run_claim(claim, "cpu", [0], 1, Silent(), cache=tmp_path)
    assert (tmp_path / "log").read_text() == "0\n"
    monkeypatch.setattr(runner, "versions", lambda: {"torch": "another"})
    run_claim(claim, "cpu", [0], 1, Silent(), cache=tmp_path)
    assert (tmp_path / "log").read_text() == "0\n0\n"
