"""PrFlash on a person's model: training, decoding, padding, saving, and what it refuses."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modelwright.attention.prflash import ProbFlashConfig
from modelwright.errors import UserError
from modelwright.models.loading import load_model, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model

FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox")
IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
SOME = ProbFlashConfig(block_size=8, keep=(0, 2))
DRAWS = ProbFlashConfig(block_size=8, law="uniform", share=0.4)


def sharp(family="llama", **options):
    model = tiny_model(family, initializer_range=0.3, **options)
    model.generation_config.eos_token_id = None
    return model


def gradients(model, ids=IDS, seed=0, **more):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **more).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_blocks_it_is_the_model_in_training_and_evaluation(family):
    model = sharp(family)
    expected = model(IDS).logits
    loss, slopes = gradients(model.train())
    with ProbFlashConfig(block_size=8, law="uniform", share=1.0).apply(model):
        found_loss, found = gradients(model)
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
        for one, other in zip(found, slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    model.eval()
    with DRAWS.apply(model):
        torch.testing.assert_close(
            model(IDS).logits, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max())
        )


def test_training_draws_by_torchs_seed_and_each_layer_for_itself(monkeypatch):
    model = sharp().train()
    draws = []
    real = ProbFlashConfig.kept

    def spy(self, *args):
        draws.append(real(self, *args))
        return draws[-1]

    monkeypatch.setattr(ProbFlashConfig, "kept", spy)
    with ProbFlashConfig(block_size=2).apply(model):
        first, other, again = (gradients(model, seed=seed)[0] for seed in (0, 1, 0))
    assert first == again != other
    assert len(draws) == 6
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[4])
    assert torch.equal(draws[1], draws[5])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_a_gradient_checkpoint_reuses_the_draw(reentrant, mode):
    config = ProbFlashConfig(block_size=4, mode=mode, per_head=mode == "independent")
    model = sharp().train()
    with config.apply(model):
        loss, expected = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found_loss, found = gradients(model)
        other = gradients(model, seed=5)[1]
    assert found_loss == loss
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(one, wanted) for one, wanted in zip(other, expected, strict=True))


def test_padding_in_training_changes_no_gradient():
    """Blocks are counted from the first real token, and one draw serves the batch."""
    model = sharp().train()
    left = torch.cat((torch.zeros(2, 5, dtype=torch.long), IDS), dim=1)
    right = torch.cat((IDS, torch.zeros(2, 3, dtype=torch.long)), dim=1)
    with DRAWS.apply(model):
        torch.manual_seed(0)
        expected = model(IDS, use_cache=False).logits
        for ids, part in ((left, slice(5, None)), (right, slice(0, 40))):
            torch.manual_seed(0)
            mask = (ids > 0).long()
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            found = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[:, part]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            assert found.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("config", [SOME, DRAWS], ids=["some blocks", "all blocks"])
def test_cached_decoding_is_the_whole_pass(family, config):
    model = sharp(family)
    with config.apply(model), torch.no_grad():
        expected = model(IDS).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
            steps = [(0, 20), (20, 21), (21, 22), (22, 40)]
            found = torch.cat([model(IDS[:, a:b], past_key_values=cache).logits for a, b in steps], dim=1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("config", [SOME, DRAWS], ids=["some blocks", "all blocks"])
def test_generation_is_greedy_on_whole_passes_in_a_padded_batch(config, cache):
    model, ids = sharp(), IDS[:, :24]
    padded = torch.cat((torch.zeros(2, 7, dtype=torch.long), ids), dim=1)
    mask = torch.cat(((padded > 0).long(), torch.ones(1, 31, dtype=torch.long)))
    padded = torch.cat((padded, IDS[:1, :31]))
    more = {"cache_implementation": cache} if cache else {}
    with config.apply(model):
        found = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, **more)[:2, 7:]
        for _ in range(6):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("config", [SOME, DRAWS], ids=["some blocks", "all blocks"])
def test_padding_in_between_is_hidden_in_a_batch_of_one_too(config):
    """``generate`` puts its tokens behind a prompt that was padded on the right."""
    model = sharp()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 20:25] = 0
    with config.apply(model), torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits[:1, 25:]
        found = model(IDS[:1], attention_mask=mask[:1]).logits[:, 25:]
        other = IDS[:1].clone()
        other[0, 20:25] = 7
        changed = model(other, attention_mask=mask[:1]).logits[:, 25:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(changed, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "compiled"), [(8, False), (16, True)])
def test_heads_too_small_for_the_compiled_kernel_go_to_the_blocks(size, compiled, monkeypatch):
    from modelwright.attention.prflash import attention, kernel

    calls = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(kernel, "flex_blocks", lambda query, *_, **__: calls.append("kernel") or query)
    monkeypatch.setattr(attention, "block_attention", lambda query, *_, **__: calls.append("blocks") or query)
    query = torch.zeros(1, 4, 256, size)
    config = ProbFlashConfig(keep=(0,))
    attention.prob_flash_attention(config, model := sharp(), query, query, query, None, scaling=1.0)
    assert not model.training
    assert calls == ["kernel" if compiled else "blocks"]


def test_a_decoding_step_reads_the_kept_blocks_of_the_cache_only():
    model = sharp()
    with SOME.apply(model), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(IDS[:, :35], past_key_values=cache)
        expected = model(IDS[:, 35:36], past_key_values=cache).logits
        cache.crop(-1)
        for layer in cache.layers:
            layer.keys[:, :, :16] = layer.values[:, :, 24:32] = torch.nan  # blocks 0, 1 and 3; the token is in 4
        assert torch.equal(model(IDS[:, 35:36], past_key_values=cache).logits, expected)


def test_by_name_saved_and_loaded(tmp_path):
    model = sharp()
    plain = model(IDS).logits
    model.set_attn_implementation("prob_flash")
    torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=1e-4)
    SOME.install(model)
    expected = model(IDS).logits
    assert float((expected - plain).abs().max()) > 1e-2
    save_model(model, byte_tokenizer(), tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m", device="cpu")(IDS).logits, expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="prob_flash")
    assert torch.equal(theirs(IDS).logits, expected)


def test_bfloat16():
    model = sharp().bfloat16()
    with SOME.apply(model):
        found = model(IDS).logits
    assert found.dtype == torch.bfloat16
    with SOME.apply(model.float()):
        torch.testing.assert_close(found.float(), model(IDS).logits, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_sliding_windows_are_refused(family):
    model = tiny_model(family)
    with pytest.raises(UserError, match="sliding window"), ProbFlashConfig().apply(model):
        pass
    model.set_attn_implementation("prob_flash")
    with pytest.raises(UserError, match="sliding window"):
        model(IDS)


def test_a_window_for_all_layers_is_refused():
    with (
        pytest.raises(UserError, match="sliding window"),
        ProbFlashConfig().apply(tiny_model("mistral", sliding_window=8)),
    ):
        pass


def test_other_masks_and_weights_are_refused():
    model = sharp()
    with DRAWS.apply(model):
        with pytest.raises(UserError, match="four dimensions"):
            model(IDS, attention_mask=torch.ones(2, 1, 40, 40).tril().bool())
        with pytest.raises(UserError, match="packed"):
            model(IDS[:1], position_ids=torch.cat((torch.arange(15), torch.arange(25)))[None], use_cache=False)


def test_dropout_of_attention_is_kept():
    model = sharp(attention_dropout=0.5).train()
    with ProbFlashConfig(block_size=8, law="uniform", share=1.0).apply(model):
        losses = [gradients(model, seed=seed)[0] for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
