"""The mask: which rows, which layers, and what it refuses."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from modelwright.errors import UserError
from modelwright.models.tiny import FAMILIES, tiny_model
from modelwright.training.migu import MIGUConfig, MIGUMask, kept_rows, magnitude, row_overlap, top_rows


def batch(seed=0, rows=3, length=10, vocabulary=259):
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def backward(model, *batches):
    model.zero_grad()
    for one in batches:
        (model(**one).loss / len(batches)).backward()


def trained(model, mask, make, steps=4):
    model.train()
    optimizer = make(model.parameters())
    for step in range(steps):
        backward(model, batch(step))
        if mask is not None:
            mask.apply()
        optimizer.step()
        if mask is not None:
            mask.after_step()
    return [p.detach().clone() for p in model.parameters()]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["grad", "param"])
@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"active": False}])
def test_nothing_frozen_is_plain_training_bit_for_bit(optimizer, mode, options):
    plain, masked = tiny_model("llama"), tiny_model("llama")
    expected = trained(plain, None, OPTIMIZERS[optimizer])
    with MIGUMask(masked, MIGUConfig(mode=mode, **options)) as mask:
        found = trained(masked, mask, OPTIMIZERS[optimizer])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_removing_leaves_no_hook():
    model = tiny_model("llama")

    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert count() == 0
    mask = MIGUMask(model, MIGUConfig(include_padding=False))
    assert count() == 2 * 7 + 1
    mask.remove()
    assert count() == 0
    with MIGUMask(model):
        assert count() == 2 * 7
    assert count() == 0


class Line(nn.Module):
    """One linear layer in a numbered block."""

    def __init__(self, d_in=6, d_out=11, bias=True):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(d_in, d_out, bias=bias)])

    def forward(self, x):
        return self.blocks[0](x)


@given(
    seed=st.integers(0, 1000),
    threshold=st.integers(0, 99).map(lambda v: v / 100),
    tokens=st.integers(1, 7),
    width=st.integers(1, 12),
)
def test_one_layer_against_the_quantile_by_hand(seed, threshold, tokens, width):
    generator = torch.Generator().manual_seed(seed)
    model = Line(5, width).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    model(x).square().sum().backward()
    weight, bias = model.blocks[0].weight, model.blocks[0].bias
    plain, plain_bias = weight.grad.clone(), bias.grad.clone()
    model.zero_grad()
    with MIGUMask(model, MIGUConfig(threshold=threshold)) as mask:
        model(x).square().sum().backward()
        mask.apply()
        (stats,) = mask.stats().values()
    n = [sum(map(abs, column)) for column in (x @ weight.T + bias).reshape(-1, width).T.tolist()]
    ordered = sorted(n)
    place = threshold * (width - 1)
    low = int(place)
    high = min(low + 1, width - 1)
    quantile = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    keep = stats.rows
    for row, value in enumerate(n):
        if abs(value - quantile) > 1e-9 * ordered[-1]:  # but for the row on the very edge, where rounding decides
            assert bool(keep[row]) == (value > quantile)
    assert torch.equal(weight.grad[keep], plain[keep])  # to the last bit
    assert not weight.grad[~keep].any()
    assert torch.equal(bias.grad, plain_bias)  # biases are never masked
    assert stats.magnitude.sum() == pytest.approx(1)
    # The paper's floor(T d) frozen rows: at most one apart.
    assert abs(int((~keep).sum()) - int(threshold * width)) <= 1


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), threshold=st.floats(0, 0.99), width=st.integers(2, 40))
def test_scale_and_order_do_not_matter(seed, scale, threshold, width):
    generator = torch.Generator().manual_seed(seed)
    n = torch.rand(width, generator=generator, dtype=torch.float64) + 0.1
    keep = kept_rows(n, threshold)
    edge = (n - torch.quantile(n, threshold)).abs() < 1e-9  # where rounding decides
    assert torch.equal(kept_rows(n * scale, threshold) | edge, keep | edge)
    assert torch.equal(kept_rows(n / n.sum(), threshold) | edge, keep | edge)
    order = torch.randperm(width, generator=generator)
    assert torch.equal(kept_rows(n[order], threshold), keep[order])


def test_ties_are_kept_and_sixteen_bits_do_not_saturate():
    assert kept_rows(torch.ones(8), 0.9).all()
    many = torch.full((100_000, 1), 1.0, dtype=torch.bfloat16)
    assert magnitude(many).tolist() == [100_000.0]
    assert magnitude(many).dtype == torch.float32
    assert kept_rows(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 0.5).tolist() == [False, True]


def rows_of(model, mask, *batches):
    model.train()
    backward(model, *batches)
    mask.apply()
    return {name: layer.rows for name, layer in mask.stats().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_accumulation_is_the_union_of_the_batches():
    model = tiny_model("llama").double()
    union = batch(0, rows=6)
    parts = [{k: v[i : i + 2] for k, v in union.items()} for i in (0, 2, 4)]
    with MIGUMask(model) as mask:
        whole = rows_of(model, mask, union)
        assert same(rows_of(model, mask, *parts), whole)
        assert not same(rows_of(model, mask, parts[0]), whole)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_mask(reentrant):
    model = tiny_model("llama").double()
    with MIGUMask(model) as mask:
        plain = rows_of(model, mask, batch(0), batch(1))
        new = hasattr(model, "activation_checkpointing_enable")  # later versions have another name for it
        enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert same(rows_of(model, mask, batch(0), batch(1)), plain)


def test_evaluation_between_steps_is_not_seen():
    model = tiny_model("llama")
    with MIGUMask(model) as mask:
        plain = rows_of(model, mask, batch(0))
        model.eval()
        model(**batch(5))  # with gradients on
        with torch.no_grad():
            model.train()
            model(**batch(6))
        assert same(rows_of(model, mask, batch(0)), plain)
        assert not same(rows_of(model, mask, batch(0), batch(5)), plain)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba2"])
def test_every_family_masks_its_blocks_and_nothing_else(family):
    model = tiny_model(family).train()
    backward(model, batch())
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    with MIGUMask(model) as mask:
        rows = rows_of(model, mask, batch())
    assert len(rows) == {"gpt2": 8, "gpt_neox": 8}.get(family, 14)
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in rows or name.endswith("bias"):
            assert torch.equal(parameter.grad, plain[name]), name
            continue
        # GPT-2's Conv1D has its outputs in columns.
        grad, whole = (g.T if family == "gpt2" else g for g in (parameter.grad, plain[name]))
        assert grad.shape[0] == len(rows[layer])
        assert torch.equal(grad[rows[layer]], whole[rows[layer]])
        assert not grad[~rows[layer]].any()
        assert 0 < int(rows[layer].sum()) < len(rows[layer])


SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(
                    vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            ),
            2 * (4 + 2) + 2 * (8 + 2),  # the decoder's cross-attention too
        ),
        (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=32)), 2 * 6),
        (lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)), 2 * 4),  # fused experts are no layers
    ],
    ids=["t5", "roberta", "mixtral"],
)
def test_models_of_other_kinds(make, expected):
    torch.manual_seed(0)
    model = make().train()
    ids = torch.randint(3, 64, (2, 9))
    with MIGUMask(model) as mask:
        model(input_ids=ids, labels=ids).loss.backward()
        mask.apply()
        stats = mask.stats()
    assert len(stats) == expected
    for name, layer in stats.items():
        assert not model.get_submodule(name).weight.grad[~layer.rows].any()
        assert 0.25 < layer.kept < 0.4


def test_sixteen_bit_models_are_masked_by_sums_in_more():
    model = tiny_model("llama").bfloat16().train()
    with MIGUMask(model) as mask:
        rows_of(model, mask, batch())
        assert {layer.magnitude.dtype for layer in mask.stats().values()} == {torch.float32}


def test_the_head_is_masked_only_where_it_is_named():
    tied = tiny_model("llama", tie_word_embeddings=True).train()
    assert not any("head" in name for name in MIGUMask(tied).layers)
    with MIGUMask(tied, MIGUConfig(target_modules=["lm_head", "q_proj"])) as mask:
        assert mask.layers == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head")
        rows = rows_of(tied, mask, batch())["lm_head"]
    grad = tied.model.embed_tokens.weight.grad
    assert not grad[~rows].any()
    assert grad[rows].any()


def test_names_and_expressions_choose_layers():
    model = tiny_model("llama")

    def names(target):
        with MIGUMask(model, MIGUConfig(target_modules=target)) as mask:
            return mask.layers

    assert names(r".*layers\.1\.mlp\..*") == tuple(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))
    assert names("q_proj,k_proj") == names(["q_proj", "k_proj"])
    assert len(names("q_proj")) == 2


@pytest.mark.parametrize("make", ["adamw", "momentum"])
def test_param_mode_leaves_frozen_rows_alone_bit_for_bit(make):
    model = tiny_model("llama").train()
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        if make == "adamw"
        else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    )
    modules = dict(model.named_modules())
    moved_by_momentum = 0
    for mode in ("grad", "param"):
        with MIGUMask(model, MIGUConfig(mode=mode)) as mask:
            for step in range(3):
                before = copy.deepcopy(model.state_dict())
                backward(model, batch(step))
                mask.apply()
                optimizer.step()
                mask.after_step()
                for name, layer in mask.stats().items():
                    frozen = torch.equal(modules[name].weight[~layer.rows], before[f"{name}.weight"][~layer.rows])
                    if mode == "param":
                        assert frozen
                        assert not torch.equal(modules[name].weight, before[f"{name}.weight"])
                    else:
                        moved_by_momentum += not frozen
    assert moved_by_momentum > 0  # what mode="grad" leaves to the optimizer


def test_for_plain_gradient_descent_both_modes_are_one():
    make = OPTIMIZERS["sgd"]
    one, other = tiny_model("llama"), tiny_model("llama")
    found = [trained(m, MIGUMask(m, MIGUConfig(mode=mode)), make) for m, mode in ((one, "grad"), (other, "param"))]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# LoRA.


def adapted(family="llama", **keys):
    model = tiny_model(family).train()
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "up_proj"]
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=targets, **keys))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_lora_masks_a_by_its_output_and_b_by_the_layers(family, keys):
    model = adapted(family, **keys)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    seen = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda m, i, o, n=name: seen.update({n: (i[0].detach(), o.detach())}))
    with MIGUMask(model) as mask:
        rows = rows_of(model, mask, batch())
        assert len(rows) == 2 * len(seen)
        modules = dict(model.named_modules())
        for name, (x, combined) in seen.items():
            down = modules[name].lora_A["default"]
            expected = kept_rows(magnitude(x @ down.weight.T), 0.7)
            assert torch.equal(rows[f"{name}.lora_A.default"], expected)
            assert int(expected.sum()) == 3  # of 8, as the paper has it
            # B is zero, so its own output would keep every row.
            assert not modules[name].lora_B["default"].weight.any()
            kept = rows[f"{name}.lora_B.default"]
            assert torch.equal(kept, kept_rows(magnitude(combined), 0.7))
            assert 0 < int(kept.sum()) < len(kept) // 2
            assert not modules[name].lora_B["default"].weight.grad[~kept].any()
            assert modules[name].lora_B["default"].weight.grad[kept].any()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            backward(model, batch(step))
            mask.apply()
            optimizer.step()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert any(m.lora_B["default"].weight.any() for m in model.modules() if hasattr(m, "lora_B"))


def test_of_several_adapters_the_trained_one_is_masked():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in name)
    with MIGUMask(model) as mask:
        rows = rows_of(model, mask, batch())
    assert {name.rsplit(".", 1)[1] for name in rows} == {"second"}


# Padding and controls.


def test_padding_counts_only_if_it_should():
    model = tiny_model("llama").double()
    short = batch(0, rows=2, length=6)
    padded = {
        "input_ids": nn.functional.pad(short["input_ids"], (0, 5)),
        "labels": nn.functional.pad(short["labels"], (0, 5), value=-100),
        "attention_mask": nn.functional.pad(torch.ones(2, 6, dtype=torch.long), (0, 5)),
    }
    for one in (model, get_peft_model(model, LoraConfig(target_modules=["q_proj"]))):
        with MIGUMask(one, MIGUConfig(include_padding=False)) as mask:
            assert same(rows_of(one, mask, padded), rows_of(one, mask, short))
        with MIGUMask(one) as mask:
            assert not same(rows_of(one, mask, padded), rows_of(one, mask, short))


def test_controls_choose_rows_by_something_else():
    model = tiny_model("llama").train()
    rows, layer = {}, "model.layers.0.mlp.up_proj"
    for select in ("magnitude", "low-magnitude", "random", "gradient", "weight"):
        with MIGUMask(model, MIGUConfig(select=select)) as mask:
            rows[select] = rows_of(model, mask, batch())[layer]
    assert {int(r.sum()) for r in rows.values()} == {19}  # 64 - ceil(0.7 * 63)
    assert not (rows["magnitude"] & rows["low-magnitude"]).any()
    weight = model.get_submodule(layer).weight
    assert torch.equal(rows["weight"], kept_rows(weight.abs().sum(1), 0.7))
    backward(model, batch())
    assert torch.equal(rows["gradient"], kept_rows(weight.grad.abs().sum(1), 0.7))
    draws = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        with MIGUMask(model, MIGUConfig(select="random", seed=seed)) as mask:
            mask.step = step
            draws.append(rows_of(model, mask, batch())[layer])
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], rows["random"])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_overlap_of_tasks():
    model = tiny_model("llama")
    low, high = ([{"input_ids": torch.randint(a, b, (4, 12))}] for a, b in ((3, 60), (180, 259)))
    one, two = top_rows(model, low), top_rows(model, high)
    assert not model.training
    model.train()
    model.model.layers[0].eval()  # such as one that is held still
    assert all(torch.equal(rows, one[name]) for name, rows in top_rows(model, low).items())
    assert model.training
    assert not model.model.layers[0].training
    assert set(row_overlap(one, one).values()) == {1.0}
    found = row_overlap(one, two)
    assert found.keys() == one.keys()
    assert all(0 <= share <= 1 for share in found.values())  # a small layer's rows may be the same by chance
    assert sum(found.values()) / len(found) < 0.8
    layer = "model.layers.1.mlp.gate_proj"
    assert found[layer] == pytest.approx(float((one[layer] & two[layer]).sum() / one[layer].sum()))
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(UserError, match="at least one batch"):
        top_rows(model, [])


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "less than 1"),
        ({"threshold": -0.1}, "at least 0"),
        ({"threshold": float("nan")}, "less than 1"),
        ({"mode": "both"}, "grad or param"),
        ({"select": "largest"}, "choose one of magnitude"),
        ({"target_modules": "("}, "no regular expression"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        MIGUConfig(**options)


def test_misuse_is_one_sentence():
    model = tiny_model("llama").train()
    with pytest.raises(UserError, match=r"no linear layer \['nothing'\]"):
        MIGUMask(model, MIGUConfig(target_modules=["nothing"]))
    with pytest.raises(UserError, match="numbered blocks"):
        MIGUMask(nn.Linear(3, 3))
    with MIGUMask(model) as mask:
        with pytest.raises(UserError, match="no forward pass"):
            mask.apply()
        model(**batch())
        with pytest.raises(UserError, match="has no gradient"):
            mask.apply()
        backward(model, batch())
        mask.apply()
        with pytest.raises(UserError, match="no forward pass"):
            mask.apply()
        model.requires_grad_(False)
        with pytest.raises(UserError, match="All target layers are frozen"):
            mask.apply()
    model.requires_grad_(True)
    with MIGUMask(model, MIGUConfig(mode="param")) as mask:
        backward(model, batch())
        mask.apply()
        backward(model, batch())
        with pytest.raises(UserError, match=r"after_step\(\) was not called"):
            mask.apply()
    with (
        MIGUMask(model, MIGUConfig(include_padding=False)),
        pytest.raises(UserError, match=r"shape \(batch, tokens\)"),
    ):
        model(**batch(), attention_mask=torch.zeros(3, 1, 10, 10))


def test_frozen_layers_are_skipped_and_unused_ones_have_nothing_to_mask():
    model = tiny_model("llama").train()
    model.model.layers[0].requires_grad_(False)
    with MIGUMask(model) as mask:
        rows = rows_of(model, mask, batch())
    assert rows
    assert not [name for name in rows if ".layers.0." in name]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x, around=False):
            out = self.blocks[0](x)
            return out @ self.blocks[1].weight if around else out

    model = Both()
    with MIGUMask(model) as mask:
        model(torch.randn(3, 4)).sum().backward()
        mask.apply()
        assert list(mask.stats()) == ["blocks.0"]
        model(torch.randn(3, 4), around=True).sum().backward()
        with pytest.raises(UserError, match=r"blocks\.1 has a gradient, but its output was never seen"):
            mask.apply()


def test_sharded_weights_are_refused_not_skipped(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Line(4, 8)
        mask = MIGUMask(model)
        mesh = init_device_mesh("cpu", (1,))
        model.blocks[0].weight = nn.Parameter(distribute_tensor(model.blocks[0].weight.data, mesh, [Shard(0)]))
        with pytest.raises(UserError, match=r"blocks\.0 is sharded"):
            mask.apply()
        with pytest.raises(UserError, match=r"blocks\.0 is sharded"):
            MIGUMask(model)
        assert sum(len(m._forward_hooks) for m in model.modules()) == 1  # the first one's
    finally:
        dist.destroy_process_group()
    model = Line(4, 8)
    model.blocks[0].weight.ds_id = 7  # DeepSpeed's mark of a weight that it partitions
    with pytest.raises(UserError, match=r"blocks\.0 is sharded"):
        MIGUMask(model)
