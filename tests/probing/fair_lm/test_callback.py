"""The callback under Trainer: with accumulation, checkpointing, LoRA, two processes; and resumed."""

import os

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments

import forked
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.probing.fair_lm import TokenCounts, TokenFairnessCallback, count_tokens, learning_speed, measure_rows

GENERATOR = np.random.default_rng(0)
ROWS = [{"input_ids": GENERATOR.integers(3, 40, 10).tolist()} for _ in range(21)]
for row in ROWS:
    row["labels"] = row["input_ids"]
HELD = [{"input_ids": GENERATOR.integers(3, 40, n).tolist()} for n in (10, 4, 7, 10, 3)]


def trainer(folder, model=None, callbacks=(), **options):
    keys = {"max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 3, "save_strategy": "no"}
    keys |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2}
    args = TrainingArguments(output_dir=str(folder), **{**keys, **options})
    return Trainer(model or tiny_model("llama"), args, train_dataset=ROWS, callbacks=list(callbacks))


def callback(**options):
    return TokenFairnessCallback(HELD, count_tokens(ROWS, byte_tokenizer()), **{"every_steps": 2, **options})


def test_numbers_are_in_the_log_and_training_goes_on_as_without(tmp_path):
    watch, plain = callback(), trainer(tmp_path / "plain", tiny_model("llama", attention_dropout=0.2))
    plain.train()
    watched = trainer(tmp_path / "watched", tiny_model("llama", attention_dropout=0.2), [watch])
    watched.train()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [row for row in watched.state.log_history if "eval/loss_balanced" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6] == list(watch.reports)
    last = measure_rows(watched.model, HELD).compute()
    assert rows[-1]["eval/loss_balanced"] == last.balanced
    assert rows[-1]["eval/loss"] == last.average < rows[0]["eval/loss"]
    assert {"eval/gap", "eval/slope", "eval/accuracy", "eval/accuracy_balanced"} <= rows[-1].keys()
    assert any(name.startswith("eval/loss_bin_") for name in rows[-1])
    assert 0 < learning_speed(list(watch.reports.values())).mean < 1
    assert watched.model.training  # the mode it was in


def test_an_attached_trainers_loggers_get_them_too(tmp_path):
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs, **keys):
            seen.append(logs)

    subject = trainer(tmp_path, callbacks=[Logger()])
    callback(prefix="heldout", every_steps=6).attach(subject)
    subject.train()
    assert len([logs for logs in seen if "heldout/gap" in logs]) == 2


@pytest.mark.parametrize("way", ["accumulation", "checkpointing", "lora"])
def test_under_what_trainers_do(tmp_path, way):
    options = {"gradient_accumulation_steps": 2} if way == "accumulation" else {}
    model = tiny_model("llama")
    if way == "checkpointing":
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if way == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    watch = callback()
    subject = trainer(tmp_path, model, [watch], **options)
    subject.train()
    assert list(watch.reports) == [0, 2, 4, 6]
    assert watch.reports[6].average == measure_rows(subject.model, HELD).compute().average != watch.reports[0].average


def test_a_resumed_run_measures_the_same(tmp_path):
    whole = callback()
    trainer(tmp_path / "a", callbacks=[whole]).train()
    first, second = callback(), callback()
    cut = trainer(tmp_path / "b", callbacks=[first], save_strategy="steps", save_steps=3)
    cut.add_callback(Stop(3))
    cut.train()
    trainer(tmp_path / "b", callbacks=[second]).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert (list(first.reports), list(second.reports)) == ([0, 2], [4, 6])
    for step, report in {**first.reports, **second.reports}.items():
        np.testing.assert_array_equal(report.loss, whole.reports[step].loss)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **keys):
        control.should_training_stop = state.global_step >= self.step
        control.should_save = state.global_step >= self.step


def _member(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The address is asked for, and never called: the group meets at a file.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **address})
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    watch = callback()
    subject = trainer(folder / f"{rank}", callbacks=[watch], ddp_find_unused_parameters=False)
    assert subject.args.world_size == 2
    subject.train()
    for step, report in watch.reports.items():
        report.to_parquet(folder / f"{rank}-{step}.parquet")
    if rank == 0:
        torch.save(subject.model.state_dict(), folder / "weights.pt")
    dist.barrier()
    os._exit(0)


@pytest.mark.slow
def test_two_processes_measure_as_one(tmp_path):
    from modelwright.probing.fair_lm import TokenLossReport

    assert forked.run(_member, 2, tmp_path) == [0, 0]
    model = tiny_model("llama")
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    alone = measure_rows(model, HELD).compute()
    for rank in range(2):
        report = TokenLossReport.from_parquet(tmp_path / f"{rank}-6.parquet")
        np.testing.assert_array_equal(report.counts, alone.counts)
        np.testing.assert_allclose(report.loss, alone.loss, rtol=1e-5)


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(UserError, match="at least 1, not 0"):
        callback(every_steps=0)
    with pytest.raises(UserError, match="is empty"):
        TokenFairnessCallback([], [1, 2])
    with pytest.raises(UserError, match="all zero"):
        TokenFairnessCallback(HELD, [0, 0])
    other = TokenCounts(np.ones(259, np.int64), "another tokenizer")
    subject = trainer(tmp_path, callbacks=[TokenFairnessCallback(HELD, other)])
    subject.callback_handler.processing_class = byte_tokenizer()
    with pytest.raises(UserError, match="of another tokenizer"):
        subject.train()
    long = TokenCounts(np.ones(300, np.int64))
    with pytest.raises(UserError, match="knows only 259"):
        trainer(tmp_path, callbacks=[TokenFairnessCallback(HELD, long)]).train()
    with pytest.raises(UserError, match="outside the vocabulary of 259"):
        bad = [{"input_ids": [1, 2], "labels": [5, 600]}]
        trainer(tmp_path, callbacks=[TokenFairnessCallback(bad, [1])]).train()
