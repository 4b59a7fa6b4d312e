"""PrFlash equals full attention where all blocks take part, and the masked dense softmax for every draw."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.attention.prflash import ProbFlashConfig, block_attention
from modelwright.attention.prflash import blocks as module
from modelwright.attention.prflash.kernel import as_block_mask, flex_blocks
from modelwright.attention.prflash.reference import prob_flash_reference


def tensors(tokens, heads=4, kept=2, batch=2, size=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, tokens, size, generator=g, dtype=dtype).requires_grad_() for h in (heads, kept, kept)]


def drawn(config, tokens, heads=4, seed=1):
    blocks = -(-tokens // config.block_size)
    kept = config.kept(torch.arange(blocks), blocks, heads, True, seed)
    return kept, config.bias(blocks) if config.correction else None


def same(found, expected, leaves, seed=9, atol=1e-5):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=atol)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    ours = torch.autograd.grad((found * weight).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5 * atol)


@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("tokens", [1, 8, 30, 64])
@pytest.mark.parametrize("per_head", [False, True])
def test_with_all_blocks_it_is_full_attention(tokens, mode, per_head):
    config = ProbFlashConfig(law="uniform", share=1.0, mode=mode, per_head=per_head, block_size=8, correction=True)
    query, key, value = leaves = tensors(tokens)
    kept, correction = drawn(config, tokens)
    found = block_attention(query, key, value, kept, 8, scaling=0.4, correction=correction)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.4, enable_gqa=True
    )
    same(found, expected, leaves)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 70), block=st.integers(1, 17), kept_heads=st.sampled_from([1, 2, 4]),
    law=st.sampled_from(["harmonic", "exponential", "linear", "uniform"]),
    mode=st.sampled_from(["shared", "independent"]), per_head=st.booleans(),
    correction=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_it_is_the_masked_dense_softmax_of_its_draw(tokens, block, kept_heads, law, mode, per_head, correction, seed):
    config = ProbFlashConfig(law=law, reach=3.0, mode=mode, per_head=per_head, block_size=block, correction=correction)
    query, key, value = leaves = tensors(tokens, kept=kept_heads, batch=1)
    kept, bias = drawn(config, tokens, seed=seed)
    found = block_attention(query, key, value, kept, block, scaling=0.35, correction=bias)
    expected, _, _ = prob_flash_reference(
        query, key, value, kept, block, scaling=0.35, log_probabilities=None if bias is None else -bias
    )
    same(found, expected, leaves)


def test_capped_scores_and_float64():
    query, key, value = tensors(30, dtype=torch.float64)
    kept, _ = drawn(ProbFlashConfig(block_size=8), 30)
    plain = block_attention(query, key, value, kept, 8, scaling=0.4)
    expected, _, _ = prob_flash_reference(query, key, value, kept, 8, scaling=0.4)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(block_attention(query, key, value, kept, 8, scaling=0.4, softcap=1e6), plain)
    capped = block_attention(query, key, value, kept, 8, scaling=0.4, softcap=0.5)
    assert float((capped - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("start", [0, 5, 8, 23, 29])
def test_some_rows_are_those_rows_of_all(start):
    config = ProbFlashConfig(block_size=8, mode="independent")
    query, key, value = tensors(30)
    kept, _ = drawn(config, 30)
    whole = block_attention(query, key, value, kept, 8, scaling=0.4)
    part = block_attention(query[:, :, start:], key, value, kept[:, start // 8 :], 8, scaling=0.4, first=start)
    torch.testing.assert_close(part, whole[:, :, start:], rtol=0, atol=1e-5)


def test_the_future_changes_nothing():
    query, key, value = (t.detach() for t in tensors(40))
    kept, _ = drawn(ProbFlashConfig(block_size=8), 40)
    before = block_attention(query, key, value, kept, 8, scaling=0.4)
    for t in (query, key, value):
        t[:, :, 21:] = 1e3
    after = block_attention(query, key, value, kept, 8, scaling=0.4)
    assert torch.equal(before[:, :, :21], after[:, :, :21])
    assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_what_is_dropped_is_neither_loaded_nor_computed(mode, monkeypatch):
    config = ProbFlashConfig(block_size=8, mode=mode)
    query, key, value = (t.detach() for t in tensors(96))
    kept, _ = drawn(config, 96)
    scores = []

    def spy(query, key, *args, **keys):
        scores.append(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2])
        return real(query, key, *args, **keys)

    real = module.attend
    monkeypatch.setattr(module, "attend", spy)
    expected = block_attention(query, key, value, kept, 8, scaling=0.4)
    assert sum(scores) == 2 * 4 * int(kept.sum()) * 8 * 8  # batch, heads, blocks and their entries: no more
    for column in range(12):
        if not bool(kept[0, column + 1 :, column].any()):  # only its own row sees it
            key[:, :, column * 8 : column * 8 + 8] = torch.nan
            found = block_attention(query, key, value, kept, 8, scaling=0.4)
            others = torch.ones(96, dtype=torch.bool)
            others[column * 8 : column * 8 + 8] = False
            assert torch.equal(found[:, :, others], expected[:, :, others])
            break
    else:
        pytest.fail("this draw drops no column")


@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_corrected_numerators_and_denominators_are_those_of_full_attention_on_average(mode):
    config = ProbFlashConfig(block_size=4, mode=mode, correction=True)
    query, key, value = (t.detach() for t in tensors(16, heads=1, kept=1, batch=1, size=4, seed=3))
    everything = torch.ones(1, 4, 4).tril().bool()
    _, numerator, denominator = prob_flash_reference(query, key, value, everything, 4, scaling=0.5)
    bias = config.bias(4)
    draws = 5000
    # The masked softmax is what the blocks compute, which another test says; here its sums are averaged over draws.
    found = [
        prob_flash_reference(
            query, key, value, config.kept(torch.arange(4), 4, 1, True, seed), 4, scaling=0.5, log_probabilities=-bias
        )[1:]
        for seed in range(draws)
    ]
    for expected, sums in ((numerator, [n for n, _ in found]), (denominator, [d for _, d in found])):
        stacked = torch.cat(sums)
        error = stacked.std(0) / draws**0.5
        assert bool(((stacked.mean(0) - expected[0]).abs() <= 5 * error + 1e-9).all())
    # Without the correction the sums are too small.
    plain = torch.cat(
        [
            prob_flash_reference(query, key, value, config.kept(torch.arange(4), 4, 1, True, seed), 4, scaling=0.5)[2]
            for seed in range(500)
        ]
    ).mean(0)
    assert float((plain[0, -4:] / denominator[0, 0, -4:]).max()) < 0.8


@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("per_head", [False, True])
def test_flex_attention_is_told_the_same(mode, per_head):
    from torch.nn.attention.flex_attention import flex_attention

    config = ProbFlashConfig(block_size=16, mode=mode, per_head=per_head, correction=True)
    query, key, value = (t.detach() for t in tensors(70, size=16))
    kept, bias = drawn(config, 70)
    expected = block_attention(query, key, value, kept, 16, scaling=0.4, correction=bias, softcap=2.0)

    def plain(query, key, value, score_mod, block_mask, scaling):
        return flex_attention(query, key, value, score_mod, block_mask, scale=scaling, enable_gqa=True)

    found = flex_blocks(query, key, value, kept, 16, scaling=0.4, correction=bias, softcap=2.0, attention=plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # What a kernel loads is its lists of blocks, which flex_attention without one does not look at.
    mask = as_block_mask(kept, 16, 70, torch.device("cpu"))
    assert torch.equal(mask.to_dense()[0].bool(), kept)
    count, columns = mask.full_kv_num_blocks[0], mask.full_kv_indices[0]
    for head in range(kept.shape[0]):
        for row in range(5):
            listed = columns[head, row, : count[head, row]].tolist()
            assert listed == [c for c in range(row) if kept[head, row, c]]
            assert mask.kv_indices[0, head, row, 0] == row
            assert mask.kv_num_blocks[0, head, row] == 1
