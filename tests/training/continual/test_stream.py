"""Streams end to end: with every baseline, killed anywhere, over processes, from the command line."""

import json
import os
import traceback

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import forked
from modelwright.errors import UserError
from modelwright.models.loading import load_model, load_tokenizer, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.training.continual import ContinualBenchmark, ContinualOptions, Task, world_tasks
from modelwright.training.migu import MIGUConfig
from modelwright.verbs.train_continual import TrainContinual
from modelwright.verbs.world import World
from modelwright.worlds.task_stream import task_stream

WORLD = {"tasks": 3, "classes": 2, "cues": 2, "fillers": 3, "length": 2, "train_rows": 24, "test_rows": 6}
TASKS = world_tasks(task_stream(**WORLD))


def run(folder=None, progress=None, migu=None, model=None, tasks=TASKS, **keys):
    options = {"steps": 5, "batch_size": 4, "learning_rate": 1e-2, "save_every": 2, "log_every": 2, "device": "cpu"}
    return ContinualBenchmark(tasks).run(
        model or tiny_model("llama"), byte_tokenizer(), ContinualOptions(**{**options, **keys}), mask=migu,
        folder=folder, progress=progress,
    )  # fmt: skip


def weights(result):
    return dict(result.model.named_parameters())


def same(left, right):
    left, right = (weights(r) if hasattr(r, "model") else r for r in (left, right))
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def log(result):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.log]


class Killed(Exception):
    pass


class KillAt(Silent):
    """Dies at the n-th sign of progress: nothing runs after it but what a killed process leaves behind."""

    def __init__(self, number):
        self.left = number

    def start(self, label, total=None):
        self.advance()

    def advance(self, units=1, note=""):
        self.left -= 1
        if self.left == 0:
            raise Killed

    def message(self, text):
        self.advance()


def test_ewc_looks_at_examples_of_all_labels_of_a_sorted_task(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "modelwright.training.continual.stream.ElasticWeights.add",
        lambda self, model, batches: seen.append({tuple(batch["labels"][0].tolist()[-4:]) for batch in batches}),
    )
    tasks = [Task(t.name, sorted(t.train, key=lambda row: row.answer), t.test, t.labels) for t in TASKS]
    run(tasks=tasks, steps=1, ewc=1.0, ewc_samples=8)
    assert [len(answers) for answers in seen] == [2, 2, 2]


VARIANTS = {
    "migu": {"migu": MIGUConfig(select="random", mode="param")},
    "replay": {"replay": 0.2, "gradient_accumulation": 2, "batch_size": 2},
    "ewc": {"ewc": 100.0, "ewc_samples": 3},
    "lora": {"tuning": "lora", "migu": MIGUConfig(), "lora_dropout": 0.1},
    "o-lora": {"tuning": "o-lora", "migu": MIGUConfig(threshold=0.1)},
    "inc-lora": {"tuning": "inc-lora"},
}
FAST = ("migu", "lora")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def test_killed_anywhere_it_ends_the_same(tmp_path, name, monkeypatch):
    monkeypatch.setattr("modelwright.training.resume._SHOWN_EVERY", 0.0)
    whole = run(**VARIANTS[name])
    assert whole.matrix.complete
    assert whole.steps == [5, 5, 5]
    assert not any("lora" in n for n in weights(whole))
    times, signs = 0, {"migu": 4, "lora": 9}.get(name, 17)
    while times < 20:
        try:
            resumed = run(tmp_path, KillAt(signs), **VARIANTS[name])
            break
        except Killed:
            times += 1
            signs += 1  # so that it gets further
    assert times >= 2
    assert same(whole, resumed)
    assert resumed.matrix.rows == whole.matrix.rows
    assert log(resumed) == log(whole)


@pytest.mark.slow
def test_each_baseline_is_another_run():
    found = {name: run(**{k: v for k, v in keys.items() if k != "migu"}) for name, keys in VARIANTS.items()}
    found["plain"] = found.pop("migu")
    found["masked"] = run(migu=MIGUConfig())
    names = list(found)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not same(found[one], found[other]), (one, other)


def test_the_first_task_is_masked_only_if_asked():
    tasks = TASKS[:1]
    plain = run(tasks=tasks)
    assert same(plain, run(tasks=tasks, migu=MIGUConfig()))
    assert not same(plain, run(tasks=tasks, migu=MIGUConfig(), mask_first_task=True))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"tuning": "lora"}])
def test_freezing_nothing_is_the_plain_stream(keys):
    plain = run(**keys)
    assert same(plain, run(migu=MIGUConfig(threshold=0.0), **keys))
    assert same(plain, run(migu=MIGUConfig(active=False), **keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"ewc": 10.0, "ewc_samples": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"tuning": "o-lora", "lora_dropout": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_accumulation_is_the_whole_batch(keys):
    double = {"migu": MIGUConfig(), **keys}
    whole = run(model=tiny_model("llama"), **double)
    parts = run(model=tiny_model("llama"), **double, batch_size=1, gradient_accumulation=4)
    assert [row["loss"] for row in whole.log] == pytest.approx([row["loss"] for row in parts.log], rel=2e-3)


def test_replay_brings_rows_of_earlier_tasks():
    tasks = world_tasks(task_stream(**{**WORLD, "train_rows": 50}))
    seen = []
    from modelwright.training.continual.stream import _Run

    stream = _Run(
        tasks, tiny_model("llama"), byte_tokenizer(), ContinualOptions(steps=1, replay=0.1), None, None, Silent()
    )
    for number in range(3):
        rows = stream._replayed(number)
        assert len(rows) == 5 * number
        assert set(rows[: len(seen)]) == set(seen)
        seen = rows
        for i, row in enumerate(rows):
            assert row in tasks[i // 5].train


def test_a_learnable_stream_is_learnt():
    tasks = world_tasks(task_stream(**{**WORLD, "tasks": 1, "classes": 2, "train_rows": 40}))
    result = run(tasks=tasks, steps=120, batch_size=8, learning_rate=3e-3)
    assert result.matrix.learning() > 0.8


# The verb.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual")
    save_model(tiny_model("llama").bfloat16(), byte_tokenizer(), folder / "model")
    World(name="task_stream", output=folder / "world", set=WORLD).run(Silent())
    return folder


def verb(folder, output, **keys):
    options = {
        "model": str(folder / "model"), "tasks": str(folder / "world"), "steps": 5, "batch_size": 4,
        "learning_rate": 1e-2, "save_every": 2, "device": "cpu", "log_every": 2,
    }  # fmt: skip
    return TrainContinual(output=output, **{**options, **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {"with_": ["migu"], "options": {"threshold": 0.5}},
        {"tuning": "lora", "lora_targets": "q_proj,v_proj"},
        {"tuning": "lora", "lora_targets": "q_proj"},
    ],
)
def test_the_folder_is_a_model_with_its_matrix(folder, tmp_path, keys):
    result = verb(folder, tmp_path / "m", **keys).run(Silent())
    model = load_model(tmp_path / "m", device="cpu")
    assert model.dtype == torch.bfloat16  # as it came
    assert load_tokenizer(tmp_path / "m").eos_token_id == 2
    assert {p.name for p in tmp_path.iterdir()} == {"m"}
    document = json.loads((tmp_path / "m" / "continual.json").read_text())
    assert document["matrix"] == result["matrix"]
    assert document["matrix"]["tasks"] == ["task-1", "task-2", "task-3"]
    assert document["steps_by_task"] == [5, 5, 5]
    assert (document["with"] or {}).get("threshold") == keys.get("options", {}).get("threshold")
    assert all(0 <= share <= 1 for row in document["overlap"]["mean"] for share in row)
    rows = [json.loads(line) for line in (tmp_path / "m" / "training_log.jsonl").read_text().splitlines()]
    assert [(row["task"], row["step"]) for row in rows[:4]] == [("task-1", n) for n in (1, 2, 4, 5)]
    page = (tmp_path / "m" / "report.html").read_text()
    for piece in ("After 3 tasks", "task-2", "learning accuracy", "<svg", "forgetting"):
        assert piece in page
    assert (tmp_path / "m" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert {"accuracy", "forgetting", "learning_accuracy", "backward_transfer", "steps"} <= result.keys()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"with_": ["migo"]}, "did you mean 'migu'"),
        ({"with_": ["migu"], "options": {"threshold": 1.0}}, "less than 1"),
        ({"with_": ["migu"], "options": {"treshold": 0.5}}, "did you mean 'threshold'"),
        ({"with_": ["migu"], "options": {"ties.threshold": 0.5}}, "no method 'ties'"),
        ({"with_": ["migu", "migu"]}, "only one of them"),
        ({"options": {"threshold": 0.5}}, "name one with --with"),
        ({"steps": 5, "epochs": 1.0}, "how long"),
        ({"tuning": "inc-lora", "ewc": 1.0}, "use full or lora"),
        ({"tasks": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"model": "/nowhere/model"}, "nowhere"),
        ({"tuning": "lora", "lora_targets": "nothing"}, "LoRA cannot be put"),
    ],
)
def test_faults_leave_nothing_behind(folder, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        verb(folder, tmp_path / "out" / "m", **keys).run(Silent())
    assert not list((tmp_path / "out").glob("*"))


def test_an_unfinished_run_with_other_options_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("modelwright.training.resume._SHOWN_EVERY", 0.0)
    with pytest.raises(Killed):
        verb(folder, tmp_path / "m").run(KillAt(17))
    assert any((tmp_path / "m.training").glob("state-*"))
    with pytest.raises(UserError, match=r"other options \(learning_rate\).*--force"):
        verb(folder, tmp_path / "m", learning_rate=1e-3).run(Silent())
    diverged = UserError("The loss is nan")
    with monkeypatch.context() as patch:
        patch.setattr("modelwright.training.continual.stream.correct", lambda *a, **k: (_ for _ in ()).throw(diverged))
        with pytest.raises(UserError, match="nan"):
            verb(folder, tmp_path / "m").run(Silent())
    assert any((tmp_path / "m.training").glob("state-*"))  # a late error does not cost the tasks before
    verb(folder, tmp_path / "m", learning_rate=1e-3, force=True).run(Silent())


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_the_stream_ends_the_same(folder, tmp_path):
    keys = {"with_": ["migu"], "options": {"mode": "param"}, "steps": 40, "save_every": 5}
    work = tmp_path / "m.training"
    for sign in ("state-1", "task-1/checkpoint-*/modelwright.json", "state-2"):
        forked.kill_when(
            lambda sign=sign: any(work.glob(sign)), lambda: verb(folder, tmp_path / "m", **keys).run(Silent())
        )
        assert not (tmp_path / "m").exists()
    verb(folder, tmp_path / "m", **keys).run(Silent())
    verb(folder, tmp_path / "whole", **keys).run(Silent())
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    killed, whole = (json.loads((tmp_path / n / "continual.json").read_text()) for n in ("m", "whole"))
    assert killed["matrix"] == whole["matrix"]


def _member(rank, folder, keys):
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "GLOO_SOCKET_IFNAME": "lo"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}  # asked for, but nobody goes there
    os.environ.update({k: str(v) for k, v in group.items()})
    for state in (AcceleratorState, GradientState, PartialState):  # of tests that ran before in this process
        state._reset_state()
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        result = run(folder / "work", **keys)
        torch.save((weights(result), result.matrix.rows, log(result)), folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["migu", "o-lora", "ewc"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, name):
    keys = {**VARIANTS[name], "lora_dropout": 0.0, "learning_rate": 1e-3}
    alone = run(**keys)
    assert forked.run(_member, 2, tmp_path, {**keys, "batch_size": 2}) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first[0], second[0])
    assert first[1] == second[1]
    assert [row["loss"] for row in first[2]] == pytest.approx([row["loss"] for row in log(alone)], rel=1e-3)
