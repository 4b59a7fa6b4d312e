from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelwright.compression.budget import by_rank, choose
from modelwright.compression.selections import FAMILIES, KINDS, Block, Layout, Masks, blocks_of
from modelwright.errors import UserError
from modelwright.models.tiny import tiny_model

BLOCKS = (Block(12, 3, 8, 8, 20, 2), Block(12, 3, 8, 8, 28, 2))


def test_parameters_are_the_papers_formula_for_multi_head_and_grouped_attention():
    s = {"attn_in": 5, "attn_out": 7, "mlp_in": 4, "mlp_middle": 9, "mlp_out": 3}
    heads = Block(hidden=12, groups=3, query=4, key_value=8, middle=20, into=2)
    assert heads.parameters(s) == 3 * 5 * 12 + 7 * 12 + 2 * 4 * 9 + 9 * 3
    grouped = Block(hidden=16, groups=2, query=8, key_value=8, middle=20, into=1)
    assert grouped.parameters(s) == 5 * (16 + 2 * 8) + 7 * 16 + 4 * 9 + 9 * 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"])
def test_the_whole_is_what_the_matrices_of_the_blocks_hold(family):
    model = tiny_model(family)
    layers = [p for name, p in model.named_parameters() if (".layers." in name or ".h." in name) and p.ndim == 2]
    assert sum(block.total for block in blocks_of(model)) == sum(p.numel() for p in layers)


def test_layouts():
    independent, same, structural = (Layout.of(BLOCKS, mode) for mode in ("independent", "same", "structural"))
    assert [s.name for s in same.selections] == ["residual"]
    assert [s.name for s in Layout.of(BLOCKS, "same_mlp").selections] == ["residual", "0.mlp_middle", "1.mlp_middle"]
    assert [s.name for s in independent.selections][:5] == [
        "0.attn_in", "0.attn_out", "0.mlp_in", "0.mlp_middle", "0.mlp_out",
    ]  # fmt: skip
    assert len(independent.selections) == 10
    assert len(same.selections[0].uses) == 8
    assert [s.name for s in structural.selections] == ["residual", "0.heads", "0.mlp_middle", "1.heads", "1.mlp_middle"]
    with pytest.raises(UserError, match="no mode 'sam': did you mean .*'same'"):
        Layout.of(BLOCKS, "sam")


@given(st.integers(0, 10**6), st.sampled_from(["independent", "same", "same_mlp", "structural"]))
def test_the_differentiable_share_is_the_counted_ratio(seed, mode):
    layout = Layout.of(BLOCKS, mode)
    generator = torch.Generator().manual_seed(seed)
    gates = [torch.rand(s.size, generator=generator) < 0.6 for s in layout.selections]
    masks = layout.masks(gates)
    assert masks.parameters == layout.parameters([int(g.sum()) for g in gates])
    assert float(layout.share([g.float() for g in gates])) == pytest.approx(masks.ratio, rel=1e-6)


@given(
    st.integers(0, 10**6),
    st.sampled_from(["independent", "same", "same_mlp", "structural"]),
    st.floats(0.2, 0.95),
    st.sampled_from([1, 1, 4]),
)
def test_a_choice_is_at_most_the_target_and_less_than_a_gate_below_it(seed, mode, ratio, round_to):
    layout = Layout.of(BLOCKS, mode)
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(s.size, generator=generator) for s in layout.selections]
    masks = choose(layout, scores, ratio, round_to)
    target = ratio * layout.total
    assert masks.parameters <= target
    widths = [len(masks.index(*s.uses[0])) for s in layout.selections]
    for i, selection in enumerate(layout.selections):
        kept = masks.kept[selection.uses[0][0]][selection.uses[0][1]]
        if round_to > 1 and not selection.whole:
            assert widths[i] % round_to == 0
        # Within a selection, the best stay.
        if 0 < widths[i] < selection.size and round_to == 1:
            assert scores[i][kept].min() >= scores[i][~kept].max()
        if widths[i] < selection.size:
            more = list(widths)
            more[i] += 1 if selection.whole else min(round_to, selection.size - widths[i])
            assert layout.parameters(more) > target


def test_equal_scores_fall_in_network_order_and_twice_the_same():
    layout = Layout.of(BLOCKS, "independent")
    scores = [torch.zeros(s.size) for s in layout.selections]
    first, second = choose(layout, scores, 0.5), choose(layout, scores, 0.5)
    for a, b in zip(first.kept, second.kept, strict=True):
        assert all(torch.equal(a[kind], b[kind]) for kind in a)
    assert first.widths()[0]["attn_in"] == 12  # before all others
    assert first.widths()[1]["mlp_middle"] == 0


def test_by_rank_gives_every_selection_the_same_share():
    layout = Layout.of(BLOCKS, "independent")
    scores = [10.0 ** (3 * i) * torch.rand(s.size) for i, s in enumerate(layout.selections)]
    masks = choose(layout, by_rank(scores), 0.5)
    shares = [len(masks.index(*s.uses[0])) / s.size for s in layout.selections]
    assert max(shares) - min(shares) < 0.1


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_0_and_1_is_refused(ratio):
    layout = Layout.of(BLOCKS)
    with pytest.raises(UserError, match="share of the blocks' parameters to keep, between 0 and 1"):
        choose(layout, [torch.zeros(s.size) for s in layout.selections], ratio)


def test_every_attention_keeps_a_head():
    layout = Layout.of(BLOCKS, "structural")
    scores = [torch.zeros(s.size) for s in layout.selections]
    scores[0] += 1
    scores[1] -= 1
    assert all(own["heads"] >= 1 for own in choose(layout, scores, 0.3).widths())


def test_masks_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="no selection 'attn_in' of"):
        Masks(BLOCKS[:1], ({"attn_in": torch.ones(5, dtype=torch.bool)},))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mamba2"])
def test_other_families_are_refused_by_name(family):
    with pytest.raises(UserError, match="cannot be pruned in width .*llama, mistral, qwen2"):
        blocks_of(tiny_model(family))


def test_quantised_weights_and_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UserError, match="quantised"):
        blocks_of(model)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="merge them first"):
        blocks_of(adapted)


def test_the_families_are_those_that_the_roles_know():
    from modelwright.models.roles import KNOWN

    assert set(FAMILIES) <= set(KNOWN)
    assert len(KINDS) == 6
