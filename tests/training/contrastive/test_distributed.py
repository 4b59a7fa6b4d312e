"""Several processes train as one; if one dies, the others end with a message."""

import json
import multiprocessing
import os
import signal
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

import forked
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.progress import Silent
from modelwright.training.contrastive.arguments import ContrastiveTrainingArguments
from modelwright.training.contrastive.encoders import load_pair_encoder
from modelwright.training.contrastive.pairs import read_pairs
from modelwright.training.contrastive.selection import Chosen
from modelwright.training.contrastive.trainer import ContrastiveTrainer
from modelwright.verbs.train_contrastive import TrainContrastive

pytestmark = pytest.mark.slow

MODELS = {"softmax": "clip", "sigmoid": "siglip", "hard": "bert", "chosen": "clip"}


class Spread:
    """Takes the last 8 rows, which are one process's, and those of the others that are most alike."""

    def super_batch_size(self, batch_size):
        return 3 * batch_size

    def choose(self, encode, super_batch, size, step, extras):
        queries = encode(super_batch).queries
        alike = (queries[:-8] @ queries[-1]).argsort(descending=True)[: size - 8]
        chosen = torch.cat([alike, torch.arange(len(queries) - 8, len(queries))])
        return Chosen(chosen, {"alike": (queries @ queries[0]).sum().item()})


def train(folder, name, processes):
    # Adam would make whole steps of gradients that are only rounding, so the weights are compared after plain gradient
    # descent; clipping, and its norm in the log, show the gradient's size.
    args = ContrastiveTrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=12 // processes,
        mini_batch_size=4,
        max_steps=5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    pairs = read_pairs(folder / ("texts.jsonl" if name == "hard" else "pictures"))
    trainer = ContrastiveTrainer(
        load_pair_encoder(folder / MODELS[name], device="cpu"),
        args,
        train_dataset=pairs,
        eval_dataset=pairs.select(range(7)),
        selection=Spread() if name == "chosen" else None,
    )
    trainer.train()
    return {"log": trainer.state.log_history, "weights": trainer.encoder.state_dict()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    rows = [{"question": f"what is {i}?", "answer": f"it is {i * i % 41}", "negative": f"no {i}"} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    for i in range(40):
        Image.fromarray(noise[i]).save(folder / "pictures" / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(40)]
    (folder / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(*tiny_pair("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), folder / "bert")
    save_model(*tiny_pair("clip"), folder / "clip")
    save_model(*tiny_pair("siglip"), folder / "siglip")
    return folder


def start(work, processes, *arguments):
    """Starts ``work(rank, *arguments)`` in processes that form a group, without torchrun, whose agent would watch them.

    They are forked: to import everything again would take most of the test's time.
    """
    context = multiprocessing.get_context("fork")
    ports = context.SimpleQueue(), context.SimpleQueue()
    found = []
    for rank in range(processes):
        found.append(context.Process(target=_member, args=(work, rank, processes, ports, arguments)))
        found[-1].start()
    port = ports[0].get()
    for _ in found:
        ports[1].put(port)
    return found


def _member(work, rank, processes, ports, arguments):
    if rank == 0:
        # The system chooses, and the first process keeps it: a port that was only seen to be free may be taken before
        # the group meets. All find it as they find that of torchrun's agent.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports[0].put(store.port)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": ports[1].get(), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update({k: str(v) for k, v in group.items()})
    for state in (AcceleratorState, GradientState, PartialState):  # of tests that ran before in this process
        state._reset_state()
    torch.set_num_threads(1)
    try:
        work(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.fixture(scope="module")
def alone(folder):
    return {name: train(folder, name, 1) for name in MODELS}


def train_and_save(rank, folder, names, processes):
    for name in names:
        torch.save(train(folder, name, processes), folder / f"{name}.{rank}.pt")


@pytest.mark.parametrize(("processes", "names"), [(2, list(MODELS)), (3, ["softmax", "chosen"])])
def test_processes_train_as_one(folder, alone, processes, names):
    members = start(train_and_save, processes, folder, names, processes)
    for member in members:
        member.join(200)
    assert [member.exitcode for member in members] == [0] * processes
    for name in names:
        ranks = [torch.load(folder / f"{name}.{r}.pt", weights_only=False) for r in range(processes)]
        for rank in ranks:
            assert [row["step"] for row in rank["log"]] == [1, 2, 3, 3, 4, 5, 5, 5]
            for row, one in zip(rank["log"][:-1], alone[name]["log"][:-1], strict=True):
                assert row.keys() == one.keys()
                for key in row:
                    if "second" not in key:
                        assert row[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), (name, key)
            for key, weight in alone[name]["weights"].items():
                torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
                assert torch.equal(rank["weights"][key], ranks[0]["weights"][key]), f"{name} {key}"


def run_verb(rank, options, said, dies=False):
    if rank and dies:
        step = ContrastiveTrainer.training_step

        def last_step(*arguments, **keys):
            # Between two messages: gloo may wait half an hour for the rest of one, and then it is the heartbeat's turn.
            if list(Path(options["output"] + ".training").glob("checkpoint-*/modelwright.json")):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **keys)

        ContrastiveTrainer.training_step = last_step
    try:
        TrainContrastive(**{**options, "output": Path(options["output"])}).run(Silent())
    except UserError as error:
        Path(f"{said}.{rank}").write_text(str(error))


def test_when_a_process_dies_the_other_says_so_and_the_next_run_goes_on(folder, tmp_path):
    options = {
        "data": [str(folder / "texts.jsonl")],
        "eval_data": [str(folder / "texts.jsonl")],
        "model": str(folder / "bert"),
        "output": str(tmp_path / "m"),
        "steps": 30,
        "batch_size": 12,
        "mini_batch_size": 4,
        "learning_rate": 1e-3,
        "log_every": 5,
        "save_every": 3,
        "workers": 0,
        "device": "cpu",
    }
    ranks, work = start(run_verb, 2, options, str(tmp_path / "said"), True), tmp_path / "m.training"
    try:
        ranks[1].join(forked.PATIENCE / 2)
        assert ranks[1].exitcode == -signal.SIGKILL
        ranks[0].join(forked.PATIENCE / 2)
        assert ranks[0].exitcode == 0, "it waits for the dead one"
    finally:
        for rank in ranks:
            rank.kill()
    assert "ended" in (tmp_path / "said.0").read_text()
    assert not (tmp_path / "m").exists()
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-3"]

    ranks = start(run_verb, 2, options, str(tmp_path / "again"))
    for rank in ranks:
        rank.join(200)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert not list(tmp_path.glob("again.*"))
    assert not work.exists()
    TrainContrastive(**{**options, "output": tmp_path / "one"}).run(Silent())
    found, expected = (
        [json.loads(line) for line in (p / "training_log.jsonl").read_text().splitlines()]
        for p in (tmp_path / "m", tmp_path / "one")
    )
    assert [row["pairs"] for row in found] == [row["pairs"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)


def hang(rank, ready):
    import torch.distributed as dist

    from modelwright.training.heartbeat import Heartbeat

    dist.init_process_group("gloo")
    with Heartbeat(patience=2.5, interval=0.1, grace=0.2):
        dist.barrier()
        ready.put(rank)
        time.sleep(250)  # in something that no error of the network reaches


@pytest.mark.parametrize("victim", [0, 1], ids=["keeper of the store", "another"])
def test_a_process_in_a_wait_that_nothing_interrupts_ends_too(victim, capfd):
    ready = multiprocessing.get_context("fork").SimpleQueue()
    ranks = start(hang, 2, ready)
    assert {ready.get(), ready.get()} == {0, 1}
    os.kill(ranks[victim].pid, signal.SIGSTOP if victim else signal.SIGKILL)
    ranks[1 - victim].join(120)
    code = ranks[1 - victim].exitcode
    ranks[victim].kill()
    assert code == 1
    message = "Process 1 of 2 has given no sign of life for 2.5 s" if victim else "find each other is gone"
    assert message in capfd.readouterr().err
