"""MIGU under the Trainer: before clipping, with accumulation, over processes, and the same after a resumption."""

import os
import traceback

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import forked
from modelwright.errors import UserError
from modelwright.models.tiny import tiny_model
from modelwright.training.migu import MIGUConfig, MIGUMask, MIGUTrainer, MIGUTrainerMixin


def data(rows=48, length=12):
    ids = torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder, **keys):
    options = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "max_grad_norm": 0.5, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(**{**options, **keys})


def train(folder, model=None, migu=None, kind=MIGUTrainer, checkpoint=None, **keys):
    model = model or tiny_model("llama")
    trainer = kind(
        model=model, args=arguments(folder, **keys), train_dataset=data(),
        **({} if kind is Trainer else {"migu": migu}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    if kind is not Trainer:
        trainer.migu.remove()
    return trainer, {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("mode", ["grad", "param"])
@pytest.mark.parametrize("keys", [{"threshold": 0.0}, {"active": False}])
def test_freezing_nothing_is_the_plain_trainer(tmp_path, mode, keys):
    plain = train(tmp_path, kind=Trainer)[1]
    assert same(plain, train(tmp_path, migu=MIGUConfig(mode=mode, **keys))[1])
    assert not same(plain, train(tmp_path, migu=MIGUConfig(mode=mode))[1])


class Kept(MIGUTrainerMixin, Trainer):
    """Keeps the rows of every step, and in float64 so that sums in another order mask alike."""

    def __init__(self, *args, **keys):
        super().__init__(*args, **keys)
        self.rows, apply = [], self.migu.apply

        def kept():
            apply()
            self.rows.append({name: one.rows for name, one in self.migu.stats().items()})

        self.migu.apply = kept

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_gradients_are_clipped_by_what_is_left_of_them(tmp_path):
    trainer, _ = train(tmp_path, kind=Kept, max_grad_norm=1e9)
    logged = trainer.state.log_history[0]["grad_norm"]
    model = tiny_model("llama").train()
    ids = torch.tensor(data()[:4]["input_ids"])
    with MIGUMask(model) as mask:
        model(input_ids=ids, labels=ids).loss.backward()
        whole = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        mask.apply()
    assert logged == pytest.approx(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])), rel=1e-5)
    assert logged < 0.99 * float(whole)


def same_rows(left, right):
    assert len(left) == len(right) == 6
    return all(same(a, b) for a, b in zip(left, right, strict=True))


def double():
    return tiny_model("llama").double()


def test_accumulation_masks_once_a_step_as_the_whole_batch_does(tmp_path):
    whole, weights = train(tmp_path, double(), kind=Kept)
    parts, others = train(tmp_path, double(), kind=Kept, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert same_rows(whole.rows, parts.rows)
    assert all(torch.allclose(weights[n], others[n], rtol=1e-6, atol=1e-9) for n in weights)


def test_gradient_checkpointing_masks_alike(tmp_path):
    keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert same_rows(train(tmp_path, double(), kind=Kept)[0].rows, train(tmp_path, double(), kind=Kept, **keys)[0].rows)


def test_param_mode_freezes_rows_against_momentum_and_decay(tmp_path):
    model = tiny_model("llama")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Of rows chosen by their weights, which are the same in every step while the others cannot overtake them.
    trainer, end = train(
        tmp_path, model, MIGUConfig(mode="param", select="weight"), weight_decay=0.1, learning_rate=1e-5
    )
    stats = trainer.migu.stats()
    assert len(stats) == 14
    for name, one in stats.items():
        weight = f"{name}.weight"
        assert torch.equal(start[weight][~one.rows], end[weight][~one.rows])
        assert not torch.equal(start[weight][one.rows], end[weight][one.rows])


@pytest.mark.parametrize("select", ["magnitude", "random"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, select, lora):
    def model():
        plain = tiny_model("llama")
        torch.manual_seed(0)
        return get_peft_model(plain, LoraConfig(target_modules=["q_proj", "up_proj"])) if lora else plain

    config = MIGUConfig(select=select, mode="param")
    keys = {"save_strategy": "steps", "save_steps": 2}
    _, whole = train(tmp_path, model(), config, **keys)
    _, resumed = train(tmp_path, model(), config, checkpoint=str(tmp_path / "checkpoint-4"), **keys)
    assert same(whole, resumed)


def test_the_callers_mask_is_used_and_kept(tmp_path):
    model = tiny_model("llama")
    with MIGUMask(model) as mask:
        for task in range(2):
            mask.active = task > 0  # the official code's first task
            trainer = MIGUTrainer(model=model, args=arguments(tmp_path), train_dataset=data(), migu=mask)
            trainer.train()
            assert bool(mask.stats()) == (task > 0)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("is_deepspeed_enabled", "DeepSpeed takes its optimizer's step"), ("is_fsdp_enabled", "FSDP shards")],
)
def test_sharding_trainers_are_refused(tmp_path, monkeypatch, attribute, message):
    class Sharding(Trainer):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            setattr(self, attribute, True)

    class Masked(MIGUTrainerMixin, Sharding):
        pass

    with pytest.raises(UserError, match=message):
        Masked(model=tiny_model("llama"), args=arguments(tmp_path), train_dataset=data())
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(UserError, match="DataParallel"):
        MIGUTrainer(model=tiny_model("llama"), args=args, train_dataset=data())


# Two processes.


def _member(rank, folder, keys):
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "GLOO_SOCKET_IFNAME": "lo"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}  # asked for, but nobody goes there
    os.environ.update({k: str(v) for k, v in group.items()})
    for state in (AcceleratorState, GradientState, PartialState):  # of tests that ran before in this process
        state._reset_state()
    torch.set_num_threads(1)
    try:
        # They meet at a file: a port that was free a moment ago may be another test's by now.
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        trainer, weights = train(folder / "out", double(), kind=Kept, **keys)
        torch.save((trainer.rows, weights), folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_mask_as_one_on_all_the_data(tmp_path, accumulation):
    alone, weights = train(tmp_path / "out", double(), kind=Kept)
    keys = {"per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
    assert forked.run(_member, 2, tmp_path, keys) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same_rows(first[0], second[0])
    assert same(first[1], second[1])
    assert same_rows(first[0], alone.rows)
    assert all(torch.allclose(weights[n], first[1][n], rtol=1e-6, atol=1e-9) for n in weights)
