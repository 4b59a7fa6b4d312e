"""`modelwright train` end to end: killed and resumed, interrupted, refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import forked
from modelwright.errors import UserError
from modelwright.models.loading import load_model, load_tokenizer, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.training.resume import working_folder
from modelwright.verbs.tokenizer import TrainTokenizer
from modelwright.verbs.train import Train

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    rows = [{"text": f"document {i} says {i * i % 17}\n" * 3} for i in range(300)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    TrainTokenizer(data=[str(folder / "data.jsonl")], output=folder / "tok", vocab_size=300).run(Silent())
    return folder


def verb(folder, output, **keys):
    # Dropout makes the random state matter, 7 and 11 make no row of the log fall on a checkpoint.
    options = {
        "data": [str(folder / "data.jsonl")],
        "eval_data": [str(folder / "heldout.jsonl")],
        "tokenizer": str(folder / "tok"),
        "architecture": "llama",
        "set": {**SIZES, "attention_dropout": 0.2},
        "steps": 40,
        "batch_size": 4,
        "block_size": 32,
        "log_every": 7,
        "eval_every": 0 if keys.get("eval_data") == [] else 15,
        "save_every": 11,
        "device": "cpu",
    }
    return Train(output=output, **{**options, **keys})


def rows(path):
    found = [json.loads(line) for line in (path / "training_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


@pytest.fixture(scope="module")
def undisturbed(folder):
    result = verb(folder, folder / "undisturbed").run(Silent())
    return folder / "undisturbed", result


def test_the_folder_is_an_ordinary_model(folder, undisturbed):
    path, result = undisturbed
    model = load_model(path, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    assert load_tokenizer(path).get_vocab() == load_tokenizer(folder / "tok").get_vocab()
    assert sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".jsonl", ".bin", ".pt")) == [
        "model.safetensors",
        "training_log.jsonl",
    ]
    assert [row["step"] for row in rows(path)] == [1, 7, 14, 15, 21, 28, 30, 35, 40]
    assert {"step", "tokens", "loss", "learning_rate", "eval_bits_per_byte"} <= rows(path)[-1].keys()
    assert (result["steps"], result["tokens"]) == (40, 40 * 4 * 32)
    assert result["tokens_per_second"] > 0
    assert result["final_loss"] == rows(path)[-1]["loss"]
    assert not (folder / "undisturbed.training").exists()


class StopAt(Silent):
    """Sends a signal to this very process while training."""

    def __init__(self, steps, number):
        self.left, self.number, self.training = steps, number, False

    def start(self, label, total=None):
        self.training = label == "train"

    def advance(self, units=1, note=""):
        self.left -= units if self.training else 0
        if self.training and self.left <= 0:
            os.kill(os.getpid(), self.number)
            self.left = 10**9


def test_interrupted_it_saves_and_goes_on_from_there(folder, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("modelwright.training.resume._SHOWN_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        verb(folder, tmp_path / "m", save_every=0).run(StopAt(9, signal.SIGINT))
    work = tmp_path / "m.training"
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-9"]
    assert not (tmp_path / "m").exists()
    (work / "checkpoint-12").mkdir()  # as kill -9 leaves it, half-written
    with pytest.raises(UserError, match=r"other options \(learning_rate\).*--force"):
        verb(folder, tmp_path / "m", learning_rate=1e-4).run(Silent())
    previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        with pytest.raises(KeyboardInterrupt):
            verb(folder, tmp_path / "m").run(StopAt(25, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, previous)
    verb(folder, tmp_path / "m").run(Silent())
    assert rows(tmp_path / "m") == rows(undisturbed[0])
    same_weights(tmp_path / "m", undisturbed[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def same_weights(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_ends_the_same(folder, tmp_path):
    long = {"steps": 150, "save_every": 17, "eval_every": 60}
    work = tmp_path / "killed.training"
    for _ in range(2):
        before = newest(work)
        forked.kill_when(
            lambda before=before: newest(work) > before,
            lambda: verb(folder, tmp_path / "killed", **long).run(Silent()),
        )
        assert not (tmp_path / "killed").exists()
    assert 17 <= newest(work) < 150
    verb(folder, tmp_path / "killed", **long).run(Silent())
    verb(folder, tmp_path / "whole", **long).run(Silent())
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    same_weights(tmp_path / "killed", tmp_path / "whole")


def newest(work):
    return max((int(p.parent.name.split("-")[1]) for p in work.glob("checkpoint-*/modelwright.json")), default=0)


def test_what_makes_a_checkpoint_whole_appears_whole(folder, tmp_path, monkeypatch):
    seen, replace = [], Path.replace

    def watched(self, target):
        if Path(target).name == "modelwright.json":
            seen.append((Path(target).exists(), sorted(json.loads(self.read_text()))))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    verb(folder, tmp_path / "m", save_every=20).run(Silent())
    assert seen == [(False, ["losses", "noted", "seconds"])] * 2


def test_two_at_once_are_refused(folder, tmp_path):
    with (
        working_folder(tmp_path / "m", {}, False),
        pytest.raises(UserError, match="Another process is training"),
    ):
        verb(folder, tmp_path / "m").run(Silent())


def test_force_discards_an_unfinished_run(folder, tmp_path):
    with working_folder(tmp_path / "m", {"steps": 1}, False) as work:
        (work / "left").touch()
        (work / "checkpoint-1").mkdir()
        (work / "checkpoint-1" / "modelwright.json").touch()
    with (
        pytest.raises(UserError, match=r"unfinished run with other options \(steps\)"),
        working_folder(tmp_path / "m", {"steps": 2}, False),
    ):
        pass
    with working_folder(tmp_path / "m", {"steps": 2}, True) as work:
        assert not (work / "left").exists()


def test_a_run_without_a_checkpoint_is_in_nobodys_way(folder, tmp_path):
    with working_folder(tmp_path / "m", {"steps": 1}, False) as work:
        (work / "left").touch()
    with working_folder(tmp_path / "m", {"steps": 2}, False) as work:
        assert not (work / "left").exists()


def test_continuing_a_checkpoint_keeps_its_dtype(folder, tmp_path):
    save_model(tiny_model("llama").bfloat16(), byte_tokenizer(), tmp_path / "start")
    keys = {"architecture": None, "set": {}, "tokenizer": None, "eval_data": []}
    verb(folder, tmp_path / "m", model=str(tmp_path / "start"), **keys).run(Silent())
    before, after = load_model(tmp_path / "start", device="cpu"), load_model(tmp_path / "m", device="cpu")
    assert after.dtype == torch.bfloat16
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    losses = [row["loss"] for row in rows(tmp_path / "m")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "x"}, "either --model .* or --architecture"),
        ({"architecture": None}, "either --model .* or --architecture"),
        ({"tokenizer": None}, "needs --tokenizer"),
        ({"architecture": "lama"}, "did you mean 'llama'"),
        ({"set": {"hiden_size": 3}}, "did you mean 'hidden_size'"),
        ({"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"eval_data": [], "eval_every": 5}, "--eval-every .* give --eval-data"),
        ({"text_field": "body"}, "no field 'body'"),
        ({"block_size": 10_000, "set": {**SIZES, "max_position_embeddings": 128}}, "at most 128"),
        ({"set": {"hidden_size": 65536}}, "parameters: training it needs"),
    ],
)
def test_faults_leave_nothing_behind(folder, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        verb(folder, tmp_path / "out" / "m", **keys).run(Silent())
    assert not list((tmp_path / "out").glob("*"))


def test_an_existing_output_is_refused_before_any_work(folder, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="--force"):
        verb(folder, tmp_path / "m", data=["nowhere.jsonl"]).run(Silent())


def torchrun(rank, count, work):
    """What the command `torchrun` does, but that its processes are forked, and import nothing again."""
    keys = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "test", "start_method": "fork"}
    elastic_launch(LaunchConfig(1, 1, count, monitor_interval=0.1, max_restarts=0, **keys), work)()


@pytest.mark.slow
def test_two_processes_train_as_one_of_twice_the_batch(folder, tmp_path):
    keys = {"set": SIZES, "eval_data": [], "save_every": 0, "steps": 10}
    verb(folder, tmp_path / "one", **keys).run(Silent())

    def work():
        for state in (AcceleratorState, GradientState, PartialState):  # of tests that ran before in this process
            state._reset_state()
        verb(folder, tmp_path / "two", **{**keys, "batch_size": 2}).run(Silent())

    assert forked.run(torchrun, 1, 2, work) == [0]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-4)


def test_the_other_processes_have_the_patience_for_a_large_corpus(monkeypatch):
    import accelerate

    from modelwright.training import run

    asked = []

    class State:
        def __init__(self, **keys):
            asked.append(keys)

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run._wait_for_leader()
    assert asked[0]["timeout"].days >= 1
