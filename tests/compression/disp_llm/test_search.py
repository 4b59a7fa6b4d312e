from __future__ import annotations

import math

import pytest
import torch

from modelwright.compression.calibration import CalibrationBatches
from modelwright.compression.disp_llm import DispPruner, DispPruningConfig, Hypernetwork, SelectionSearch
from modelwright.compression.gating import masked
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model

TEXT = ["The quick brown fox jumps over the lazy dog. " * 8] * 6


def batches(model, **options):
    return CalibrationBatches(model, byte_tokenizer(), TEXT, **{"block_size": 24, "batch_size": 2, **options})


def config(**options):
    return DispPruningConfig(**{"keep_ratio": 0.5, "steps": 6, "lr": 1e-2, **options})


def test_almost_everything_is_kept_at_first_and_the_network_is_the_papers():
    network = Hypernetwork([32, 32, 64], seed=1)
    logits = network()
    assert [len(own) for own in logits] == [32, 32, 64]
    assert torch.cat(logits).sigmoid().mean() > 0.93
    assert network.mix.bidirectional
    assert (network.mix.input_size, network.mix.hidden_size) == (32, 64)
    assert all(head.bias is None for head in network.heads)
    assert "inputs" not in dict(network.named_parameters())
    again = Hypernetwork([32, 32, 64], seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_in_the_gru_a_selection_depends_on_its_neighbours_and_without_it_it_does_not():
    for kind, linked in (("gru", True), ("linear", False)):
        network = Hypernetwork([4, 4], kind)
        before = network()[1]
        network.inputs[0] += 1
        assert torch.equal(network()[1], before) is not linked
    free = Hypernetwork([4, 4], "none")
    assert torch.equal(torch.cat(free()), torch.full((8,), 3.0))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"mode": "same"}),
        ("llama", {"mode": "same_mlp"}),
        ("llama", {"mode": "structural"}),
        ("llama", {"network": "none", "lr": 0.3}),
        ("llama", {"network": "linear"}),
        ("llama", {"estimator": "gumbel_sigmoid"}),
        ("llama", {"estimator": "gumbel_sigmoid", "noise": "gumbel"}),
        ("llama", {"estimator": "straight_through"}),
        ("qwen2", {}),
        ("mistral", {}),
        ("gemma", {}),
        ("gpt2", {}),
        ("gpt_neox", {"round_to": 4}),
    ],
)
def test_it_finds_gates_on_target_and_leaves_the_model_as_it_was(family, options):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    pruner = DispPruner(model, config(**options)).fit(batches(model))
    assert pruner.step == len(pruner.history) == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    masks, small = pruner.masks(), pruner.apply()
    total = pruner.search.layout.total
    assert masks.parameters <= total / 2
    biggest = max(b.parameters(dict.fromkeys(("heads",), 1)) for b in masks.blocks) if "mode" in options else 64 * 4 * 4
    assert total / 2 - masks.parameters < biggest
    ids = torch.arange(3, 15)[None]
    with masked(model, masks), torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.allclose(small(input_ids=ids).logits, expected, atol=1e-5)
    assert small.config.pruning["method"] == "disp-llm"
    assert small.config.pruning["block_parameters"] == masks.parameters
    summary = pruner.summary()
    assert summary["widths"] == masks.widths()
    assert 0 < summary["expected_ratio"] < 1


def test_the_share_goes_to_the_target():
    model = tiny_model("llama")
    pruner = DispPruner(model, config(steps=80, lr=1e-2, keep_ratio=0.4)).fit(batches(model))
    assert pruner.history[0][1] > 0.8
    assert sum(share for _, share, _ in pruner.history[-10:]) / 10 == pytest.approx(0.4, abs=0.06)


def test_deterministic_extraction_gives_the_same_files_twice_and_draws_depend_on_the_seed(tmp_path):
    model = tiny_model("llama")
    pruner = DispPruner(model, config()).fit(batches(model))
    for name in ("a", "b"):
        pruner.apply().save_pretrained(tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    draws = [pruner.masks(deterministic=False, seed=seed) for seed in (0, 0, 1)]
    same = [
        all(torch.equal(d[k], e[k]) for d, e in zip(draws[0].kept, other.kept, strict=True) for k in d)
        for other in draws
    ]
    assert same == [True, True, False]
    raw = pruner.masks(deterministic=False, exact=False)
    assert raw.ratio == pytest.approx(pruner.summary()["expected_ratio"], abs=0.05)


def test_without_exactness_a_gate_stays_if_it_is_more_likely_on():
    model = tiny_model("llama")
    pruner = DispPruner(model, config(steps=20)).fit(batches(model))
    masks = pruner.masks(exact=False)
    for selection, logits in zip(pruner.search.layout.selections, pruner.scores(), strict=True):
        block, kind = selection.uses[0]
        assert torch.equal(masks.kept[block][kind], logits > 0)
    exact = pruner.masks()
    for own, loose in zip(exact.kept, masks.kept, strict=True):
        for kind in own:  # to repair, gates are only dropped, or only added
            assert not (own[kind] & ~loose[kind]).any() or masks.ratio < 0.5


def test_killed_and_gone_on_it_ends_where_it_would_have(tmp_path):
    model = tiny_model("llama")
    whole = DispPruner(model, config(steps=9)).fit(batches(model))

    class Killed(Exception):
        pass

    def kill(pruner):
        if pruner.step == 7:
            raise Killed

    path, plan = tmp_path / "state", {"lr": 1e-2}
    with pytest.raises(Killed):
        DispPruner(model, config(steps=9)).fit(batches(model), checkpoint=path, save_every=3, plan=plan, on_step=kill)
    assert not any(p.grad is not None for p in model.parameters())
    resumed = DispPruner(model, config(steps=9))
    steps = []
    resumed.fit(batches(model), checkpoint=path, save_every=3, plan=plan, on_step=lambda p: steps.append(p.step))
    assert steps == [7, 8, 9]
    assert resumed.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(resumed.scores(), whole.scores(), strict=True))
    with pytest.raises(UserError, match="unfinished search with other options"):
        DispPruner(model, config(steps=9)).fit(batches(model), checkpoint=path, plan={"lr": 1})
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged"):
        DispPruner(model, config(steps=9)).fit(batches(model), checkpoint=path, plan=plan)


def test_gradient_checkpointing_changes_nothing_and_switches_no_dropout_on():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    plain = DispPruner(model, config()).fit(batches(model))
    saving = DispPruner(model, config(gradient_checkpointing=True)).fit(batches(model))
    assert torch.allclose(torch.tensor(saving.history), torch.tensor(plain.history), atol=1e-5)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert not any(m.training for m in model.modules())


def test_bfloat16():
    model = tiny_model("llama").to(torch.bfloat16)
    pruner = DispPruner(model, config()).fit(batches(model))
    small = pruner.apply()
    assert small.dtype == torch.bfloat16
    assert torch.isfinite(small(input_ids=torch.arange(3, 15)[None]).logits).all()


def test_in_float16_the_gradients_of_long_blocks_do_not_vanish():
    ids = torch.randint(3, 259, (1, 512), generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.float16):
        model = tiny_model("llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(0.01)  # as small as in models of thousands of dimensions
        search = SelectionSearch(model.to(dtype), config(network="none", penalty=1e-12))
        with search.attached():
            search(ids)["loss"].backward()
        found.append(torch.cat([p.grad for p in search.hypernetwork.parameters()]))
    assert found[0].abs().max() < 1e-5
    assert torch.allclose(found[1], found[0], rtol=0.05, atol=0.02 * float(found[0].abs().max()))


def test_a_gradient_that_is_no_number_stops_it():
    model = tiny_model("llama")
    pruner = DispPruner(model, config())
    pruner.search.hypernetwork.heads[0].weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(UserError, match="gradient is not finite at step 1"):
        pruner.fit(batches(model))
    assert all(torch.isfinite(own).all() for own in pruner.scores())


def test_padding_counts_for_nothing():
    model = tiny_model("llama")
    search = SelectionSearch(model, config())
    ids = torch.randint(3, 259, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with search.attached():
        search.generator.manual_seed(0)
        first = search(ids, attention_mask=mask)["cross_entropy"]
        search.generator.manual_seed(0)
        other = search(ids.masked_fill(mask == 0, 7), attention_mask=mask)["cross_entropy"]
    assert torch.allclose(first, other, atol=1e-5)


def test_it_is_a_module_for_any_loop(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model("llama")
    search = SelectionSearch(model, config())
    assert all(name.startswith("hypernetwork") for name in search.state_dict())
    before = [own.clone() for own in search.hypernetwork()]
    blocks = batches(model).blocks
    rows = [{"input_ids": blocks[0]["input_ids"], "labels": blocks[0]["labels"]} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    with search.attached():
        Trainer(model=search, args=arguments, train_dataset=rows).train()
    assert not torch.equal(before[0], search.hypernetwork()[0])


def test_a_loss_that_is_no_number_stops_it():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="The loss is nan at step 1"):
        DispPruner(model, config()).fit(batches(model))
    assert all(p.requires_grad for p in model.parameters())


def test_text_shorter_than_a_block_and_blocks_longer_than_the_context():
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"has 3\d tokens, fewer than one block of 64"):
        CalibrationBatches(model, byte_tokenizer(), ["x" * 30], block_size=64)
    with pytest.raises(UserError, match="longer than the model's context of 512"):
        batches(model, block_size=600)
    with pytest.raises(UserError, match="fewer than one block of 512"):
        CalibrationBatches(model, byte_tokenizer(), ["short"])


def test_batches_that_end_are_read_again_and_an_empty_loader_is_refused():
    model = tiny_model("llama")
    one = [next(iter(batches(model)))]
    assert DispPruner(model, config(steps=3)).fit(one).step == 3
    with pytest.raises(UserError, match="no more batches"):
        DispPruner(model, config()).fit([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "between 0 and 1"),
        ({"keep_ratio": 1.2}, "between 0 and 1"),
        ({"mode": "sme"}, "no mode 'sme'"),
        ({"network": "gru2"}, "no network 'gru2': did you mean 'gru'"),
        ({"estimator": "reinmx"}, "did you mean 'reinmax'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"lr": math.inf}, "lr must be above 0, and finite"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        config(**options)
