"""The masked model, the smaller model, and the plain one that needs nothing of ours."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from modelwright.compression.gating import masked
from modelwright.compression.selections import KINDS, Masks, blocks_of
from modelwright.compression.shrink import shrink, to_plain
from modelwright.errors import UserError
from modelwright.models.loading import load_model, save_model
from modelwright.models.roles import roles
from modelwright.models.tiny import byte_tokenizer, tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox"]
IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


def made(family, **options):
    """A tiny model with norms and biases that are not their defaults."""
    if family == "qwen3":
        config = Qwen3Config(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            head_dim=8, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
    else:
        model = tiny_model(family, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3)
    return model


def masks_of(model, kind="random", seed=0):
    blocks, generator = blocks_of(model), torch.Generator().manual_seed(seed)
    kept = []
    for block in blocks:
        own = {}
        for name in KINDS:
            size = block.size(name)
            mask = torch.rand(size, generator=generator) < 0.5
            if kind == "one" or (name == "heads" and not mask.any()):
                mask = torch.arange(size) == size // 2
            elif kind == "empty" and name != "heads":
                mask = torch.zeros(size, dtype=torch.bool)
            elif kind == "all":
                mask = torch.ones(size, dtype=torch.bool)
            own[name] = mask
        kept.append(own)
    return Masks(blocks, tuple(kept))


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_gates_on_nothing_changes(family):
    model = made(family)
    masks, plain = masks_of(model, "all"), logits(model)
    with masked(model, masks):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(shrink(model, masks)), plain)
    assert masks.ratio == 1


@pytest.mark.parametrize("kind", ["random", "one", "empty"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_smaller_and_plain_model_compute_the_same(family, kind):
    model = made(family).double()
    masks = masks_of(model, kind)
    with masked(model, masks):
        expected = logits(model)
    assert not torch.allclose(expected, logits(model), atol=1e-3)
    small = shrink(model, masks)
    # RMSNorm computes in float32 whatever the model's dtype, so a difference of 1e-16 before it may become one of 1e-7.
    tolerance = 1e-10 if family in ("gpt2", "gpt_neox") else 2e-6
    assert (logits(small) - expected).abs().max() < tolerance
    assert (logits(to_plain(small)) - expected).abs().max() < tolerance
    float32 = made(family)
    with masked(float32, masks):
        expected = logits(float32)
    assert (logits(shrink(float32, masks)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_the_counter_counts_the_matrices_and_every_number_is_an_original_one(family):
    model = made(family)
    masks = masks_of(model)
    small = shrink(model, masks)
    matrices = [
        p for name, p in small.named_parameters() if (".layers." in name or ".h." in name) and p.ndim == 2
    ]  # fmt: skip
    assert sum(p.numel() for p in matrices) == masks.parameters
    assert small.config.widths == masks.widths()
    originals = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        # Values are distinct (random), so that being among the original's is being an entry of it.
        assert torch.isin(parameter, originals[name]).all(), name


def test_rows_and_columns_are_those_that_were_kept():
    model = made("llama")
    masks = masks_of(model)
    small = shrink(model, masks)
    for i, (old, new) in enumerate(zip(model.model.layers, small.model.layers, strict=True)):
        a, m, o = masks.index(i, "attn_in"), masks.index(i, "mlp_middle"), masks.index(i, "mlp_out")
        heads = masks.index(i, "heads")
        rows = torch.cat([torch.arange(16 * h, 16 * h + 16) for h in heads.tolist()])
        assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[rows][:, a])
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[o][:, m])
        assert torch.equal(new.self_attn.input_index, a)
        kept = (new.mlp.output_place < len(o)).nonzero().flatten()
        assert torch.equal(kept, o)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_by_the_auto_class(family, tmp_path):
    model = made(family)
    small = shrink(model, masks_of(model), {"method": "test"})
    save_model(small, byte_tokenizer(), tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.bin"))
    for loaded in (load_model(tmp_path / "small"), AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()):
        assert type(loaded) is type(small)
        assert torch.equal(logits(loaded), logits(small))
        assert loaded.config.pruning == {"method": "test"}
    half = load_model(tmp_path / "small", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert all(b.dtype == torch.int64 for name, b in half.named_buffers() if "index" in name or "place" in name)
    assert torch.isfinite(logits(half)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache_and_left_padding(family):
    model = made(family)
    small = shrink(model, masks_of(model))
    small.generation_config.eos_token_id = None
    prompt = IDS[:1, :7]
    cached = small.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = prompt
    for _ in range(8):
        plain = torch.cat([plain, logits(small, plain)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, plain)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], 1)
    both = torch.cat([padded, IDS[1:, :10]])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    batch = small.generate(both, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(batch[0, 3:], cached[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_stay_tied(family, tmp_path):
    model = made(family, tie_word_embeddings=True)
    masks = masks_of(model)
    small = shrink(model, masks)
    with masked(model, masks):
        assert torch.allclose(logits(small), logits(model), atol=1e-5)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    save_model(small, None, tmp_path / "small")
    loaded = load_model(tmp_path / "small")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(small))


def test_adapters_attach_train_and_merge():
    from peft import LoraConfig, get_peft_model

    model = made("llama")
    small = shrink(model, masks_of(model))
    before = logits(small)
    adapted = get_peft_model(small, LoraConfig(r=2, target_modules="all-linear"))
    assert len(adapted.targeted_module_names) == 14
    assert torch.allclose(logits(adapted), before, atol=1e-6)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    expected = logits(adapted.eval())
    assert torch.allclose(logits(adapted.merge_and_unload()), expected, atol=1e-5)


def test_gradient_checkpointing_and_attentions():
    model = made("llama")
    small = shrink(model, masks_of(model))
    found = small(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert len(found.hidden_states) == 3
    found.loss.backward()
    expected = {name: p.grad.clone() for name, p in small.named_parameters()}
    small.zero_grad()
    small.gradient_checkpointing_enable()
    small.train()
    small(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in small.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name
    small.set_attn_implementation("eager")
    weights = small.eval()(input_ids=IDS, output_attentions=True).attentions
    assert len(weights) == 2


def test_to_plain_is_smaller_where_only_the_mlp_was_cut(tmp_path):
    model = made("llama")
    masks = masks_of(model)
    only = Masks(masks.blocks, tuple({"mlp_middle": own["mlp_middle"]} for own in masks.kept))
    plain = to_plain(shrink(model, only))
    assert plain.config.model_type == "llama"
    assert plain.config.intermediate_size == max(w["mlp_middle"] for w in only.widths()) < 64
    with masked(model, only):
        assert torch.allclose(logits(plain), logits(model), atol=1e-5)
    save_model(plain, None, tmp_path / "plain")
    assert "modelwright" not in (tmp_path / "plain" / "config.json").read_text()
    assert torch.equal(logits(load_model(tmp_path / "plain")), logits(plain))
    with pytest.raises(UserError, match="not a pruned one"):
        to_plain(model)


def test_a_pruned_model_is_not_pruned_again_and_wrong_widths_are_refused():
    model = made("llama")
    small = shrink(model, masks_of(model))
    with pytest.raises(UserError, match="pruned already"):
        blocks_of(small)
    config = type(small.config)(**{**small.config.to_dict(), "widths": small.config.widths[:1]})
    with pytest.raises(UserError, match="for each of 2 blocks"):
        type(small)(config)


def test_the_model_itself_is_left_alone():
    model = made("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    shrink(model, masks_of(model))
    with masked(model, masks_of(model)):
        logits(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes
    assert roles(shrink(made("llama"), masks_of(made("llama")))).layers[1].gate.weight().shape[0] < 64
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any(hooks)
    assert len(list(itertools.chain(roles(model).layers))) == 2


def test_no_model_shares_memory_with_the_one_it_came_from():
    model = made("llama", tie_word_embeddings=True)
    small = shrink(model, masks_of(model))
    for one, other in ((small, model), (to_plain(small), small)):
        theirs = {p.untyped_storage().data_ptr() for p in other.parameters()}
        assert not theirs & {p.untyped_storage().data_ptr() for p in one.parameters()}
