"""Two processes that meet at a file train as one would on the whole batch, and measure the same."""

import json
import multiprocessing
import os
import traceback

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Trainer, TrainingArguments

from forked import PATIENCE
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.training.stability_gap import MixtureDataset, StabilityGapCallback
from modelwright.verbs.train_continue import TrainContinue

pytestmark = pytest.mark.slow

TOKENS = torch.randint(3, 259, (8 * 40,), generator=torch.Generator().manual_seed(0)).numpy()


def norm(model):
    return float(sum(p.double().norm() for p in model.parameters()))


class Seen(MixtureDataset):
    """Notes which blocks were read here."""

    def __iter__(self):
        for item in super().__iter__():
            self.noted.append(int(item["input_ids"].sum()))
            yield item


def train(folder, processes, dispatch=None):
    sources = {"a": TOKENS, "b": TOKENS[::-1].copy()}
    data = Seen(sources, {"a": 0.8, "b": 0.2}, tokens_per_epoch=8 * 24, block_size=8, resample=["a"])
    data.noted = []
    callback = StabilityGapCallback({"norm": norm}, every_tokens=64)
    # Plain gradient descent: Adam would make whole steps of gradients that are only rounding.
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=8 // processes,
        num_train_epochs=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        accelerator_config={"dispatch_batches": dispatch},
    )
    trainer = Trainer(tiny_model("llama"), args, train_dataset=data, callbacks=[callback])
    trainer.train()
    return {"history": callback.history, "weights": norm(trainer.model), "noted": data.noted}


def command(folder, processes):
    if processes == 2:  # the group is there before the verb begins, as torchrun's is not: it has met at the file
        PartialState(cpu=True)
    verb = TrainContinue(
        model=str(folder / "model"),
        domain=[str(folder / "domain.jsonl")],
        reference=[str(folder / "domain.jsonl")],
        heldout={"held": str(folder / "held.jsonl")},
        output=folder / f"out-{processes}",
        options={"min_tokens": 3},
        subset_share=0.25,
        epochs=2,
        batch_size=8 // processes,
        block_size=32,
        gradient_accumulation=1,
        learning_rate=1e-3,
        every_tokens=1024,
        device="cpu",
    )
    result = verb.run(Silent())
    return {"history": [a["history"] for a in result["arms"]]}


def member(folder, rank, dispatch):
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    # Address and port are asked for, and not used.
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "lo"})
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        found = command(folder, 2) if dispatch == "command" else train(folder, 2, dispatch)
        (folder / f"{rank}.json").write_text(json.dumps(found))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        os._exit(0)


def spawn(tmp_path, dispatch):
    context = multiprocessing.get_context("fork")
    members = [context.Process(target=member, args=(tmp_path, rank, dispatch)) for rank in range(2)]
    for one in members:
        one.start()
    for one in members:
        one.join(PATIENCE)
    assert [one.exitcode for one in members] == [0, 0], "it hangs"
    errors = "".join(p.read_text() for p in tmp_path.glob("*.error"))
    assert not errors


@pytest.mark.parametrize("dispatch", [True, False])
def test_two_processes_are_one(tmp_path, dispatch):
    spawn(tmp_path, dispatch)
    alone = train(tmp_path, 1)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [r["tokens"] for r in found["history"]] == [r["tokens"] for r in alone["history"]]
        assert [r["norm"] for r in found["history"]] == pytest.approx([r["norm"] for r in alone["history"]], rel=1e-6)
        assert found["weights"] == pytest.approx(alone["weights"], rel=1e-6)
    first = json.loads((tmp_path / "0.json").read_text())["noted"]
    assert first[: len(alone["noted"])] == alone["noted"]


def test_the_command_is_the_same_on_two_processes(tmp_path):
    save_model(tiny_model("llama"), byte_tokenizer(), tmp_path / "model")
    rows = [f"the heart of patient {i} pumps blood and lungs take in air" for i in range(60)]
    (tmp_path / "domain.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "the lungs of a dog"}) + "\n")
    spawn(tmp_path, "command")
    alone = command(tmp_path, 1)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for mine, other in zip(found["history"], alone["history"], strict=True):
            assert [r["tokens"] for r in mine] == [r["tokens"] for r in other]
            assert [r["held"] for r in mine] == pytest.approx([r["held"] for r in other], rel=1e-3)
    assert (tmp_path / "out-2" / "report.html").is_file()
    assert (tmp_path / "out-2" / "model.safetensors").is_file()
    assert not (tmp_path / "out-2.training").exists()
