"""The callback and the layer updates under the Trainer: what they measure, and that they disturb nothing."""

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modelwright.errors import UserError
from modelwright.models.tiny import tiny_model
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.stability_gap import LayerUpdates, Mixture, MixtureDataset, StabilityGapCallback, frozen
from modelwright.training.stability_gap.updates import decoder_layers

TOKENS = torch.randint(3, 259, (8 * 40,), generator=torch.Generator().manual_seed(0)).numpy()
OTHER = TOKENS[::-1].copy()


def weight_norm(model):
    assert not model.training
    assert not torch.is_grad_enabled()
    return float(sum(p.float().norm() for p in model.parameters()))


def arguments(folder, **keys):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        **keys,
    }
    return TrainingArguments(**options)


def mixture():
    return MixtureDataset(
        {"a": TOKENS, "b": OTHER}, {"a": 0.8, "b": 0.2}, tokens_per_epoch=8 * 20, block_size=8, resample=["a"]
    )


def trainer(folder, callbacks=(), model=None, **keys):
    model = model or tiny_model("llama", num_hidden_layers=4, attention_dropout=0.1)
    return Trainer(model, arguments(folder, **keys), train_dataset=mixture(), callbacks=list(callbacks))


def test_under_trainer_it_probes_densely_and_changes_nothing(tmp_path):
    watched = StabilityGapCallback({"norm": weight_norm}, every_tokens=4 * 32)
    plain = trainer(tmp_path / "a")  # seeds dropout when it is made
    plain.train()
    other = trainer(tmp_path / "b", [watched])
    other.train()
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True))
    assert [row["step"] for row in watched.history] == [0, 1, 2, 3, 4, 8, 10]
    assert [row["tokens"] for row in watched.history][:3] == [0, 32, 64]
    assert watched.history[0]["update_ratio"] is None
    assert watched.history[1]["update_ratio"] > 0
    assert set(watched.report()) == {"norm", "updates"}
    assert other.model.training


def test_resumed_from_a_checkpoint_it_has_the_rows_of_the_whole_run(tmp_path):
    whole = StabilityGapCallback({"norm": weight_norm}, every_tokens=64)
    one = trainer(tmp_path / "a", [whole])
    one.train()
    again = StabilityGapCallback({"norm": weight_norm}, every_tokens=64)
    two = trainer(tmp_path / "b", [again])
    two.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert again.history == whole.history
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_accumulation_is_one_large_batch_in_tokens(tmp_path):
    rows = []
    for size, steps in ((4, 1), (2, 2)):
        callback = StabilityGapCallback({"norm": weight_norm}, every_tokens=64)
        model = tiny_model("llama", num_hidden_layers=2)
        trainer(
            tmp_path / str(size), [callback], model, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        ).train()
        rows.append(callback.history)
    assert [r["tokens"] for r in rows[0]] == [r["tokens"] for r in rows[1]]
    assert [r["norm"] for r in rows[0]] == pytest.approx([r["norm"] for r in rows[1]], rel=1e-4)


def options(**keys):
    defaults = {"steps": 10, "batch_size": 4, "block_size": 8, "learning_rate": 1e-3, "device": "cpu"}
    return TrainingOptions(**{**defaults, **keys})


def test_a_mixture_of_one_source_trains_to_the_same_bits_as_the_plain_run():
    one, two = tiny_model("gpt2"), tiny_model("gpt2")
    train(one, TOKENS, options(steps=25))
    stream = Mixture({"domain": TOKENS}, {"domain": 1.0}, tokens_per_epoch=len(TOKENS), block_size=8)
    train(two, stream, options(steps=25), callbacks=[StabilityGapCallback({"norm": weight_norm}, 64)])
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_gradient_checkpointing_gives_the_same_run():
    found = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        callback = StabilityGapCallback({"norm": weight_norm}, 64)
        stream = Mixture({"a": TOKENS}, {"a": 1.0}, tokens_per_epoch=160, block_size=8)
        train(model, stream, options(gradient_checkpointing=checkpointing), callbacks=[callback])
        found.append(callback.history)
    assert [r["norm"] for r in found[0]] == pytest.approx([r["norm"] for r in found[1]], rel=1e-6)


# Layer updates


@pytest.mark.parametrize("form", ["ratio_of_means", "mean_of_ratios"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"])
def test_the_ratio_is_safe_at_step_0_and_does_not_depend_on_the_scale(family, form):
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    model = tiny_model(family, **layers)
    first = copy.deepcopy(model.state_dict())
    updates = LayerUpdates(model, 2, form)
    found = updates.measure(model)
    assert (found["update_bottom"], found["update_top"]) == (0, 0)
    assert math.isnan(found["update_ratio"])
    torch.manual_seed(0)
    change = {name: torch.randn_like(w) * (5.0 if ".0." in name else 1.0) for name, w in first.items()}
    ratios = []
    for c in (1e-3, 1e-2):
        model.load_state_dict({name: w + c * change[name] for name, w in first.items()})
        ratios.append(updates.measure(model)["update_ratio"])
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)
    assert ratios[0] > 1.5


def test_the_numbers_are_the_definition():
    model = tiny_model("llama", num_hidden_layers=3)
    updates = LayerUpdates(model, 5)
    assert (updates.bottom, updates.top) == ([0], [2])
    block = decoder_layers(model)[0]
    size = sum(float(p.detach().abs().sum()) for p in block.parameters())
    with torch.no_grad():
        block.mlp.up_proj.weight += 0.5
        decoder_layers(model)[1].mlp.up_proj.weight += 9.0  # in neither group
        decoder_layers(model)[2].mlp.down_proj.weight *= 2.0
    found = updates.measure(model)
    assert found["update_bottom"] == pytest.approx(0.5 * block.mlp.up_proj.weight.numel() / size, rel=1e-5)
    one = LayerUpdates(tiny_model("llama", num_hidden_layers=1), 5)
    assert (one.bottom, one.top) == ([0], [0])


def test_lora_counts_as_the_merged_matrix():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    whole = tiny_model("llama", num_hidden_layers=2)
    updates = LayerUpdates(whole, 1)
    model = peft.get_peft_model(copy.deepcopy(whole), config)
    adapted = updates.measure(model)
    merged = updates.measure(model.merge_and_unload())
    assert adapted == pytest.approx(merged, rel=1e-4)
    assert adapted["update_bottom"] > 0
    fresh = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert LayerUpdates(fresh, 1).measure(fresh)["update_top"] == 0


def test_freezing_holds_the_layers_and_gives_them_back():
    model = tiny_model("gpt_neox", num_hidden_layers=3)
    before = copy.deepcopy(model.state_dict())
    for which, still in (("top", [1, 2]), ("bottom", [0, 1])):
        with frozen(model, which, 2) as layers:
            assert layers == still
            train(model, TOKENS, options(steps=2))
        now = model.state_dict()
        assert all(torch.equal(now[n], before[n]) == (f"layers.{still[0]}." in n or f"layers.{still[1]}." in n)
                   for n in now if "layers." in n and n.endswith("dense.weight"))  # fmt: skip
        model.load_state_dict(before)
    assert all(p.requires_grad for p in model.parameters())
    with frozen(model, None) as layers:
        assert layers == []
    with pytest.raises(UserError, match="Freezing 3 of 3 layers"), frozen(model, "top", 3):
        pass


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"probes": {}}, "There is no probe"),
        ({"every_tokens": 0}, "every_tokens must be at least 1"),
        ({"growth": 1.0}, "growth must be greater than 1"),
    ],
)
def test_bad_callbacks_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        StabilityGapCallback(**{"probes": {"n": weight_norm}, "every_tokens": 10, **keys})
    with pytest.raises(UserError, match="number of layers in a group"):
        LayerUpdates(tiny_model("llama"), 0)


def test_without_a_block_size_it_asks_for_the_tokens_of_a_step(tmp_path):
    data = [{"input_ids": TOKENS[:8], "labels": TOKENS[:8]}] * 8
    with pytest.raises(UserError, match="give tokens_per_step"):
        Trainer(
            tiny_model("llama"),
            arguments(tmp_path, save_strategy="no"),
            train_dataset=data,
            callbacks=[StabilityGapCallback({"n": weight_norm}, 10)],
        ).train()
