from __future__ import annotations

import pytest
import torch

from modelwright.compression.selections import Layout, blocks_of
from modelwright.compression.width_pruning import METHODS, prune_width, slice_model, slicing, width_masks
from modelwright.compression.width_pruning.scores import input_norms, magnitude_scores, wanda_scores
from modelwright.errors import UserError
from modelwright.models.loading import load_model, save_model
from modelwright.models.tiny import tiny_model

BATCHES = [{"input_ids": torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]
IDS = BATCHES[0]["input_ids"][:2, :12]


def made(family):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mode", ["same_mlp", "independent", "structural"])
def test_every_method_reaches_the_ratio(family, mode):
    model = made(family)
    for method in ("magnitude", "wanda", "random"):
        masks = width_masks(model, method, 0.5, batches=BATCHES, mode=mode)
        assert 0.47 < masks.ratio <= 0.5


def test_magnitude_and_wanda_by_definition():
    model = made("llama")
    blocks = blocks_of(model)
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    with torch.no_grad():
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).double()
        found = magnitude_scores(model, blocks)[1]
        assert torch.allclose(found["attn_in"], qkv.norm(dim=0))
        assert torch.allclose(found["mlp_out"], mlp.down_proj.weight.double().norm(dim=1))
        unit = torch.cat([mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]]).double()
        assert found["mlp_middle"][5].item() == pytest.approx(unit.norm().item())
        seen = {}
        handles = [
            mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.setdefault("down", []).append(args[0])),
            attention.q_proj.register_forward_pre_hook(lambda m, args: seen.setdefault("attn", []).append(args[0])),
        ]
        for batch in BATCHES:
            model(**batch)
        for handle in handles:
            handle.remove()
        x = torch.cat([t.flatten(0, 1) for t in seen["down"]]).double()
        rms = x.square().mean(0).sqrt()
        norms = input_norms(model, BATCHES)
        assert torch.allclose(norms[1]["down"], rms)
        scores = wanda_scores(model, blocks, norms)[1]
        assert torch.allclose(scores["mlp_middle"], mlp.down_proj.weight.double().abs().sum(0) * rms)
        x = torch.cat([t.flatten(0, 1) for t in seen["attn"]]).double()
        assert torch.allclose(scores["attn_in"], qkv.abs().sum(0) * x.square().mean(0).sqrt())
    assert not any(len(m._forward_pre_hooks) for m in model.modules())


def test_balance_moves_parameters_to_the_mlp():
    model = made("llama")
    middle = [
        width_masks(model, "magnitude", 0.5, balance=balance).widths()[0]["mlp_middle"] for balance in (-0.2, 0.0, 0.2)
    ]
    assert middle[0] < middle[1] < middle[2]


def test_random_depends_on_its_seed_alone():
    model = made("llama")
    a, b, c = (width_masks(model, "random", 0.5, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(x[k], y[k]) for x, y in zip(a.kept, b.kept, strict=True) for k in x)
    assert not all(torch.equal(x[k], y[k]) for x, y in zip(a.kept, c.kept, strict=True) for k in x)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_rotation_without_slicing_changes_nothing(family, monkeypatch):
    model = made(family)
    monkeypatch.setattr(slicing, "sliced_parameters", lambda block, k: block.total // 4)
    whole = slice_model(model, 0.5, BATCHES)
    assert whole.config.sliced_size == 32
    assert torch.allclose(logits(whole), logits(model), atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_slicing_counts_what_it_adds_saves_loads_and_generates(family, tmp_path):
    model = made(family)
    small = slice_model(model, 0.6, BATCHES)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in small.parameters()}  # biases too
    matrices = [p for name, p in small.named_parameters() if ".layers." in name and p.ndim == 2]
    assert sum(p.numel() for p in matrices) == small.config.pruning["block_parameters"]
    total = sum(block.total for block in blocks_of(model))
    assert small.config.pruning["block_parameters"] <= 0.6 * total
    more = sum(slicing.sliced_parameters(block, small.config.sliced_size + 1) for block in blocks_of(model))
    assert more > 0.6 * total
    save_model(small, None, tmp_path / "small")
    loaded = load_model(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))
    out = loaded.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = IDS[:1]
    for _ in range(6):
        plain = torch.cat([plain, loaded(input_ids=plain).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, plain)


def test_a_stream_of_few_directions_is_sliced_almost_without_loss():
    model = made("llama")
    basis = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    projection = basis @ torch.linalg.pinv(basis)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ projection)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(projection @ linear.weight)
    sliced = slice_model(model, 0.5, BATCHES)
    assert sliced.config.sliced_size >= 8
    difference = (logits(sliced) - logits(model)).abs().max()
    by_weights = (logits(prune_width(model, "magnitude", 0.5)) - logits(model)).abs().max()
    assert difference < 1e-3 < by_weights


def test_what_is_refused():
    with pytest.raises(UserError, match="cannot be sliced by rotation here"):
        slice_model(tiny_model("gpt2"), 0.5, BATCHES)
    with pytest.raises(UserError, match="leaves no 1 residual dimensions"):
        slice_model(tiny_model("llama"), 0.001, BATCHES)
    with pytest.raises(UserError, match="needs calibration text"):
        width_masks(tiny_model("llama"), "wanda", 0.5)
    with pytest.raises(UserError, match="give calibration text"):
        prune_width(tiny_model("llama"), "slicegpt", 0.5)
    with pytest.raises(UserError, match="did you mean 'magnitude'"):
        width_masks(tiny_model("llama"), "magnitud", 0.5)
    with pytest.raises(UserError, match="between 0 and 1"):
        prune_width(tiny_model("llama"), "slicegpt", 1.0, batches=BATCHES)
    assert METHODS == ("magnitude", "wanda", "slicegpt", "random")
    assert len(Layout.of(blocks_of(tiny_model("llama"))).selections) == 10
