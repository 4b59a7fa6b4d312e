from __future__ import annotations

import pytest
import torch

from modelwright.compression.measure import Comparison, decode, prefill, speeds, weight_bytes
from modelwright.compression.width_pruning import prune_width
from modelwright.models.tiny import byte_tokenizer, tiny_model


def test_bytes_are_those_of_parameters_and_buffers():
    model = tiny_model("llama", tie_word_embeddings=True)
    small = prune_width(model, "random", 0.5)
    indices = sum(b.numel() * 8 for name, b in small.named_buffers() if "index" in name or "place" in name)
    assert indices > 0
    gone = 4 * (small.config.pruning["block_parameters_before"] - small.config.pruning["block_parameters"])
    assert weight_bytes(small) == weight_bytes(model) - gone + indices


def test_speeds_are_of_all_models_and_relative_to_the_first():
    model = tiny_model("llama")
    found = speeds({"dense": model, "small": prune_width(model, "random", 0.5)}, length=600, new_tokens=2, rounds=2)
    assert found["dense"]["prefill_times"] == found["dense"]["decode_times"] == 1
    assert all(value > 0 for value in found["small"].values())


def test_what_is_timed_is_the_work():
    model = tiny_model("gpt2")
    seen = []
    handle = model.transformer.h[0].register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[:2])))
    ids = torch.ones(3, 7, dtype=torch.long)
    prefill(model, ids)
    decode(model, ids, 3)
    handle.remove()
    assert seen == [(3, 7), (3, 7), (3, 1), (3, 1)]


def test_a_comparison_keeps_ratio_and_quality():
    model = tiny_model("llama")
    comparison = Comparison(model, byte_tokenizer(), ["some text"] * 3, tasks=lambda m: {"t": {"acc": 0.5}}, length=8)
    row = comparison.add("random", prune_width(model, "random", 0.5))
    assert [r["name"] for r in comparison.rows] == ["dense", "random"]
    assert row["ratio"] == pytest.approx(0.5, abs=0.01)
    assert comparison.rows[0]["block_parameters"] > 1.9 * row["block_parameters"]
    assert comparison.rows[0]["perplexity"] != row["perplexity"]
    assert row["tasks"] == {"t": {"acc": 0.5}}
