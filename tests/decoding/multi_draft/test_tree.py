"""One call for all drafts: the tree scores each as if it stood alone, and the cache comes out as if never disturbed."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modelwright.decoding.multi_draft.cache import Forward, Kept
from modelwright.decoding.multi_draft.drafts import Copied
from modelwright.decoding.multi_draft.tree import RowScores, TreeScores, ancestors, join, takes_trees
from modelwright.models.tiny import tiny_model

FAMILIES = ("gpt2", "llama", "qwen2", "mistral", "gemma", "gpt_neox")
PROMPTS = [[7, 8, 9, 10, 11], [20, 21]]
DRAFTS = [[[30, 31, 32], [30, 33], [40]], [[31, 31, 31], [30, 31, 32]]]


def double(family, attention="sdpa"):
    model = tiny_model(family, seed=1, attn_implementation=attention)
    # Eager attention takes its softmax in float32 anyway, where the least float64 is minus infinity.
    return model.double() if attention == "sdpa" else model


def filled(model, prompts):
    """A cache of all tokens of left-padded prompts but the last."""
    width = max(map(len, prompts)) - 1
    ids = torch.tensor([[0] * (width + 1 - len(p)) + p[:-1] for p in prompts])
    mask = torch.tensor([[0] * (width + 1 - len(p)) + [1] * (len(p) - 1) for p in prompts])
    kept = Kept(DynamicCache(), [0] * len(prompts))
    Forward(model)(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), kept.cache, last=True)
    kept.held = [len(p) - 1 for p in prompts]
    return kept


def alone(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def test_common_beginnings_are_joined():
    tree = join(1, [Copied([2, 3]), Copied([2, 4]), Copied([2, 3, 5]), Copied([])])
    assert tree.tokens == [1, 2, 3, 4, 5]
    assert tree.parents == [-1, 0, 1, 1, 2]
    assert tree.depths == [0, 1, 2, 2, 3]
    assert tree.nodes == [[0, 1, 2], [0, 1, 3], [0, 1, 2, 4], [0]]
    seen = ancestors(tree.parents, 6)
    assert seen[4].tolist() == [True, True, True, False, True, False]
    assert seen[5].tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("layout", [TreeScores, RowScores])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_drafts_are_scored_as_if_each_stood_alone(family, attention, layout):
    model = double(family, attention)
    close = {"rtol": 0, "atol": 1e-10 if attention == "sdpa" else 1e-5}
    for prompts, drafts in ((PROMPTS, DRAFTS), (PROMPTS[:1], DRAFTS[:1]), (PROMPTS[1:], [[]])):
        kept = filled(model, prompts)
        copied = [[Copied(d) for d in some] for some in drafts]
        scored = layout(Forward(model), kept, [p[-1] for p in prompts], copied, torch.device("cpu"))
        for b, (prompt, some) in enumerate(zip(prompts, drafts, strict=True)):
            for k, draft in enumerate(some):
                wanted = alone(model, prompt + draft)[len(prompt) - 1 :]
                for depth in range(len(draft) + 1):
                    torch.testing.assert_close(scored.scores[scored.place(b, k, depth)], wanted[depth], **close)
            torch.testing.assert_close(scored.scores[scored.place(b, 0, 0)], alone(model, prompt)[-1], **close)


@pytest.mark.parametrize("layout", [TreeScores, RowScores])
@pytest.mark.parametrize(
    "paths", [[(1, 2), (0, 1)], [(2, 1), (1, 3)], [(0, 3), (0, 3)], [(0, 0), (1, 2)], [(1, 0), (0, 0)]]
)
@torch.no_grad()
def test_the_cache_is_that_of_the_tokens_that_stayed(layout, paths):
    model = double("llama")
    for rows in ([0, 1], [0], [1]):
        prompts, some = [list(PROMPTS[r]) for r in rows], [DRAFTS[r] for r in rows]
        kept = filled(model, prompts)
        # Twice, so that the second step stands on what the first left.
        for _ in range(2):
            copied = [[Copied(d) for d in drafts] for drafts in some]
            scored = layout(Forward(model), kept, [p[-1] for p in prompts], copied, torch.device("cpu"))
            taken = [paths[r] for r in rows]
            scored.commit(taken)
            for prompt, drafts, (k, depth) in zip(prompts, some, taken, strict=True):
                prompt += [*drafts[k][:depth], 99]
            assert kept.held == [len(p) - 1 for p in prompts]
            assert kept.width == max(kept.held)
            fresh = filled(model, prompts)
            for layer, other in zip(kept.cache.layers, fresh.cache.layers, strict=True):
                for b, held in enumerate(kept.held):
                    for mine, wanted in ((layer.keys, other.keys), (layer.values, other.values)):
                        torch.testing.assert_close(mine[b, :, -held:], wanted[b, :, -held:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_sequences_that_ended_leave_the_cache():
    model = double("llama")
    kept = filled(model, [*PROMPTS, [5, 6, 7]])
    kept.select([1, 2])
    assert (kept.held, kept.width) == ([1, 2], 2)
    fresh = filled(model, [PROMPTS[1], [5, 6, 7]])
    torch.testing.assert_close(kept.cache.layers[1].keys[1], fresh.cache.layers[1].keys[1])
    assert kept.mask(torch.ones(2, 1)).tolist() == [[0, 1, 1], [1, 1, 1]]


def by_place(module, query, key, value, attention_mask, **options):
    """Attention that takes the place in the cache for the position, and knows nothing of trees."""
    length, total = query.shape[2], key.shape[2]
    causal = torch.ones(length, total, dtype=torch.bool).tril(total - length)
    return sdpa_attention_forward(module, query, key, value, causal[None, None], **options)


def test_attention_that_cannot_read_a_tree_is_found_out():
    ids = torch.tensor([5, 6, 7])
    assert all(takes_trees(tiny_model(family), ids) for family in FAMILIES)
    AttentionInterface.register("test_by_place", by_place)
    AttentionMaskInterface.register("test_by_place", sdpa_mask)
    model = tiny_model("llama")
    model.set_attn_implementation("test_by_place")
    assert not takes_trees(model, ids)


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch):
    from transformers.models.llama import modeling_llama

    from modelwright.decoding.multi_draft import tree

    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", by_place)
    model = copy.deepcopy(tiny_model("llama"))
    assert not tree._probe(model, torch.tensor([5, 6, 7]))
