"""The command line as a stranger meets it: real processes, real exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from modelwright.catalog import cards
from modelwright.cli import main
from modelwright.cli.from_verb import _parse_pairs, _show
from modelwright.cli.guard import guarded
from modelwright.cli.show_method import ShowMethod
from modelwright.errors import UserError, did_you_mean
from modelwright.progress import Silent
from modelwright.verbs import VERBS

MODELWRIGHT = [sys.executable, "-m", "modelwright"]
OUT = ["--output", "chosen.jsonl", "--compressor", "lzma"]


def modelwright(*arguments, **options):
    return subprocess.run(
        [*MODELWRIGHT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_help_lists_every_command_without_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "modelwright", "--help"], capture_output=True, text=True, check=True
    )
    for name in [*{v.split()[0] for v in VERBS}, "list", "show", "doctor"]:
        assert f"\n  {name} " in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy", "pydantic", "rich"}


@pytest.mark.parametrize("verb", [*VERBS, "select zip-fit", "select dsir", "list", "show", "doctor"])
def test_every_command_explains_itself(verb):
    done = modelwright(*verb.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_list_and_show_and_their_json():
    listing = modelwright("list")
    assert "zip-fit" in listing.stdout
    assert "curation" in listing.stdout
    rows = {row["name"]: row for row in json.loads(modelwright("list", "--json").stdout)["methods"]}
    assert rows["zip-fit"]["stage"] == "curation"
    shown = modelwright("show", "resformer").stdout
    for part in ("What for", "When not", "Python", "The paper's numbers", "Our numbers"):
        assert part in shown
    assert json.loads(modelwright("show", "zip-fit", "--json").stdout)["name"] == "zip-fit"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["selekt"], "did you mean 'select'"),
        (["select", "zipfit"], "did you mean 'zip-fit'"),
        (["show", "resfromer"], "did you mean 'resformer'"),
        (
            ["select", "zip-fit", "--pool", "none.jsonl", "--target", "none.jsonl", "--top", "3", "-o", "o.jsonl"],
            "none.jsonl",
        ),
        (["run", "no-such-recipe"], "no-such-recipe"),
        (["report", "no-such-folder"], "no-such-folder"),
        (["verify", "no-such-claim"], "no-such-claim"),
        (["list", "--stage", "curaton"], "did you mean 'curation'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path):
    done = modelwright(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_read_as_yaml_1_2():
    assert _parse_pairs(["a=3e-4", "b=no", "c=1:30", "d=null", "e=[1, 2e0]", "f=x=y"], "set") == {
        "a": 3e-4, "b": "no", "c": "1:30", "d": None, "e": [1, 2.0], "f": "x=y",
    }  # fmt: skip
    with pytest.raises(UserError, match="key=value"):
        _parse_pairs(["a"], "set")


def test_a_result_is_shown_with_its_small_tables_and_examples(capsys):
    _show(
        {
            "tokens_per_second": 56510.3,
            "score": 0.12345678,
            "groups": {"b": 6, "a": 1234},
            "counts": {"pool": {"rows": 3}, "target": {"rows": 1}},
            "many": {str(i): i for i in range(20)},
            "nothing": None,
            "examples": [{"rank": 1, "text": "two\nlines " + "x" * 200}] * 5,
        }
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "tokens per second  56,510",
        "score              0.1235",
        "groups             b 6, a 1,234",
        "counts, pool       rows 3",
        "counts, target     rows 1",
    ]
    assert [line[:15] for line in lines[5:]] == ["  1 | two lines"] * 3
    assert max(map(len, lines)) < 150


def test_names_of_weights_are_shown_as_they_are_and_answers_as_sentences(capsys):
    _show({"change": {"model.layers.0.mlp.down_proj.weight": 0.5, "of_all": 1}, "answers": ["Rare tokens suffer."]})
    assert capsys.readouterr().out.splitlines() == [
        "change  model.layers.0.mlp.down_proj.weight 0.5, of all 1", "Rare tokens suffer."
    ]  # fmt: skip


def test_a_sentence_does_not_list_thousands_of_names():
    assert did_you_mean("zzz", [f"name{i}" for i in range(5000)]).endswith(" and 4,960 more.")
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b."


def test_a_verb_says_what_the_longer_ones_that_begin_with_it_do():
    shown = " ".join(modelwright("edit", "--help").stdout.split())
    assert "edit revert Take the last edit, or all, off an edited checkpoint" in shown


def test_a_method_is_shown_with_the_options_that_a_command_takes():
    shown = modelwright("show", "rome").stdout
    assert "Options of rome: --set option=VALUE" in shown
    assert "  steps [25]: " in shown
    (part,) = json.loads(modelwright("show", "decore", "--json").stdout)["options"]
    assert part["given"] == "--with 'decore: {option: VALUE}'"
    assert {k: v for k, v in part["options"][1].items() if k != "help"} == {"option": "top", "default": 20}
    (part,) = json.loads(modelwright("show", "iti", "--json").stdout)["options"]
    assert [set(row) for row in part["options"][:2]] == [{"option", "help"}, {"option", "default", "help"}]
    assert "  layers: Layers with adapters" in modelwright("show", "lora").stdout
    for name in cards():
        json.dumps(ShowMethod(name=name).run(Silent())["options"])


def test_a_methods_own_options_stand_apart():
    shown = modelwright("select", "zip-fit", "--help").stdout
    common, own = shown.split("Options of zip-fit:")
    assert "--pool" in common
    assert "--compressor" in own
    assert "--compressor" not in common
    assert ":class:" not in shown


@pytest.fixture
def unchanged(monkeypatch):
    """Takes back what the command line does to a process that is its own."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_ctrl_c_before_the_verb_runs_is_no_traceback(monkeypatch, unchanged):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("modelwright.cli.app.run_command_line", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_python_drops_is_not_lost(number, code, monkeypatch, unchanged, capsys):
    """It drops what is raised in a finaliser; one runs at any moment, and imports have others."""
    dropped = []

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0)  # here it is raised

    def work():
        Finalised()
        dropped.append(True)
        time.sleep(100)

    monkeypatch.setattr("modelwright.cli.app.run_command_line", guarded(work))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert dropped
    assert stopped.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_process_of_a_distributed_run_ends_at_once_after_its_message(monkeypatch, capsys, unchanged):
    """What ends later may be aborted by a thread of the communication, and the launcher would report a signal."""

    def refused():
        raise UserError("a process has ended")

    def ended(code):
        raise AssertionError(f"ended with {code}")

    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(AssertionError, match="ended with 2"):
        guarded(refused)()
    assert capsys.readouterr().err == "modelwright: error: a process has ended\n"
    group.get_world_size = lambda: 1
    with pytest.raises(SystemExit, match="2"):
        guarded(refused)()


def test_full_memory_is_a_sentence_and_other_faults_are_not(capsys, unchanged):
    def ended(error):
        raise error

    with pytest.raises(SystemExit, match="2"):
        guarded(ended)(torch.OutOfMemoryError("CUDA out of memory."))
    assert "memory is full: use a smaller batch size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a defect"):
        guarded(ended)(RuntimeError("a defect"))


def test_a_closed_pipe_is_not_an_error():
    done = subprocess.run(
        f"{sys.executable} -m modelwright list | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_a_running_verb_without_leftovers(tmp_path, stop, code):
    with (tmp_path / "pool.jsonl").open("w") as pool:
        for i in range(20_000):
            pool.write(json.dumps({"text": f"{i} " + "some words to be scored " * 40}) + "\n")
    (tmp_path / "target.jsonl").write_text(
        "".join(json.dumps({"text": f"target {i} " * 50}) + "\n" for i in range(200))
    )
    process = subprocess.Popen(
        [*MODELWRIGHT, *["select", "zip-fit", "--pool", "pool.jsonl", "--target", "target.jsonl", "--top", "10"], *OUT],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stderr:  # the first progress line says that scoring has begun
        if "scor" in line.lower():
            break
    time.sleep(0.3)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "chosen.jsonl").exists()
