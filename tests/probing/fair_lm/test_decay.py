"""Which parameters decay: every one in one group, and AdamW shrinks what it should."""

import pytest
import torch
from torch import nn

from modelwright.errors import UserError
from modelwright.models.tiny import FAMILIES, tiny_model
from modelwright.probing.fair_lm import decay_groups, decay_over_run, split_decay_groups
from modelwright.probing.fair_lm.decay import describe_groups
from modelwright.training.resume import decayed_parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_is_in_exactly_one_group(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    frozen = next(p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n)
    frozen.requires_grad_(False)
    decays = {"body": 0.1, "embeddings": 0.2, "head": 0.2 if tied else 0.3}
    groups = split_decay_groups(model, **decays)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_name = {group["name"]: group for group in groups}
    assert id(model.get_input_embeddings().weight) in {id(p) for p in by_name["embeddings"]["params"]}
    assert ("head" in by_name) is not tied
    if not tied:
        assert [id(p) for p in by_name["head"]["params"]] == [id(model.get_output_embeddings().weight)]
    assert {name: by_name[name]["weight_decay"] for name in by_name if name != "rest"} == {
        name: decays[name] for name in by_name if name != "rest"
    }
    matrices = set(decayed_parameters(model))
    named = {id(p): n for n, p in model.named_parameters()}
    assert all(named[id(p)] in matrices for p in by_name["body"]["params"])
    assert not any(named[id(p)] in matrices for p in by_name["rest"]["params"])
    assert by_name["rest"]["weight_decay"] == 0


def test_gpt2s_positions_are_embeddings_and_norms_can_decay():
    model = tiny_model("gpt2", tie_word_embeddings=False)
    groups = {g["name"]: g for g in split_decay_groups(model, 0.1, exempt_norms=False)}
    assert model.transformer.wpe.weight in set(groups["embeddings"]["params"])
    assert groups["rest"]["weight_decay"] == 0.1
    assert (groups["embeddings"]["weight_decay"], groups["head"]["weight_decay"]) == (0, 0)  # the brief experiment


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("matrices", {"embeddings": 1, "head": 1, "body": 1, "rest": 0}),
        ("all", {"embeddings": 1, "head": 1, "body": 1, "rest": 1}),
        ("body", {"embeddings": 0, "head": 0, "body": 1, "rest": 0}),
        ("embeddings", {"embeddings": 1, "head": 0, "body": 0, "rest": 0}),
        ("head", {"embeddings": 0, "head": 1, "body": 0, "rest": 0}),
    ],
)
def test_a_part_decays_alone(on, expected):
    model = tiny_model("llama", tie_word_embeddings=False)
    assert {g["name"]: g["weight_decay"] for g in decay_groups(model, 1.0, on)} == expected


def test_a_shared_weight_cannot_decay_twice():
    model = tiny_model("llama", tie_word_embeddings=True)
    for on in ("embeddings", "head"):
        with pytest.raises(UserError, match="embedding and head are one weight"):
            decay_groups(model, 1.0, on)
    assert decay_groups(model, 1.0, "body")
    with pytest.raises(UserError, match="must be 0 or more"):
        split_decay_groups(model, -0.1)
    with pytest.raises(UserError, match="cannot act on 'norms'"):
        decay_groups(model, 0.1, "norms")


def test_adapters_and_wrappers():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    groups = split_decay_groups(model, 0.1)
    assert [g["name"] for g in groups] == ["body"]
    assert len(groups[0]["params"]) == 4
    assert sum(len(g["params"]) for g in split_decay_groups(torch.compile(model), 0.1)) == 4


def test_what_is_left_of_an_idle_weight_is_what_adamw_leaves():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.5, "name": "body"}], lr=0.1)
    rates = [0.1, 0.05, 0.2]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    amount, left = decay_over_run(rates, 0.5)
    assert amount == pytest.approx(0.175)
    assert weight.detach().tolist() == pytest.approx([left] * 3)


def test_groups_are_described():
    model = tiny_model("llama", tie_word_embeddings=False)
    rows = describe_groups(decay_groups(model, 0.3, "body"))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    assert {row["part"]: row["weight_decay"] for row in rows}["body"] == 0.3
