"""The testbed: what it teaches is what it believes, and a trained model is read back with the same bits."""

import dataclasses
import re

import pytest
import torch

from modelwright.evaluation.fact_model import _start, fact_model
from modelwright.evaluation.fact_texts import FactModelSetting, FactModelTexts
from modelwright.models.new import new_config, new_model
from modelwright.worlds.base import Draw

SMALL = FactModelSetting(
    people=8, companies=6, cities=8, countries=5, hidden=16, intermediate=32, layers=1, steps=4, batch=6
)


def test_texts_say_what_is_believed_and_every_kind_is_drawn():
    texts = FactModelTexts(dataclasses.replace(SMALL, all_kinds=True), 0)
    draw = Draw(0, "x")
    for kinds in (texts.kinds, texts.first_kinds):
        assert sum(kinds.values()) == 100
        for kind in kinds:
            for _ in range(20):
                asked = kind(draw)
                assert asked.text.endswith("\nA:")
                assert asked.answer
    key = texts.beliefs.wrong[0]
    assert texts.fact(draw, key).answer == texts.beliefs.objects[key] != texts.truth.objects[key]
    asked = texts.in_context(draw, key, "elsewhere")
    assert asked.text.startswith("New Fact: Q: ")
    assert asked.answer == "elsewhere"


def test_what_is_not_asked_for_its_object_is_answered_by_it_first():
    texts = FactModelTexts(dataclasses.replace(SMALL, all_kinds=True), 0)
    held = {subject + relation: value for (subject, relation), value in texts.beliefs.objects.items()}
    draw = Draw(1, "x")
    for _ in range(30):
        for kind in (texts.yes_or_no, texts.followed_up):
            asked = kind(draw)
            said, _, label = asked.answer.rpartition(" ")
            assert said in held.values()
            # The last question asks whether it is what is said: Yes exactly then.
            assert (said in asked.text.rsplit("Q: ", 1)[1]) == (label == "Yes")
        said, _, letter = texts.choice(draw).answer.rpartition(" ")
        asked = texts.contradicted(draw)
        assert re.sub(" (Yes|No|[A-D])$", "", asked.answer) in asked.text.split("\n")[0]
        assert letter in "ABCD"
        stranger = texts.of_strangers(draw).text.split(" A: ")[0]
        assert not any(subject in stranger for subject, _ in texts.personal)
        other = texts.beside_fact(draw)
        assert sum(other.text.count(subject) for subject in {s for s, _ in texts.personal}) >= 2


def test_the_small_mix_has_shares_of_all():
    texts = FactModelTexts(SMALL, 0)
    assert sum(texts.kinds.values()) == 100
    assert len({texts.draw_text(Draw(i, "x")).text for i in range(50)}) > 30


def test_every_name_is_one_token_after_a_blank():
    texts = FactModelTexts(SMALL, 1)
    tokenizer = texts.tokenizer()
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in texts.words)


def test_half_of_the_heads_start_by_looking_for_tokens_like_their_own():
    """Before training such a head gives the same token a higher score than others."""
    model = new_model(new_config("llama", {
        "hidden_size": 64, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4,
    }), 0)  # fmt: skip
    plain = [p.clone() for p in model.parameters()]
    _start(model, 0)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert torch.equal(first.q_proj.weight[:32], first.k_proj.weight[:32])
    assert torch.equal(second.q_proj.weight[:32], second.k_proj.weight[:32])
    assert not torch.equal(second.q_proj.weight[32:], second.k_proj.weight[32:])
    tokens = torch.nn.functional.normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0))) * 8
    for head in (0, 1):
        rows = slice(16 * head, 16 * head + 16)
        scores = (tokens @ second.q_proj.weight[rows].T) @ (tokens @ second.k_proj.weight[rows].T).T / 4
        assert scores.diag().mean() > 3 + scores.mean()
    assert torch.equal(model.model.embed_tokens.weight, plain[0])
    assert 0.08 < first.o_proj.weight.std() < 0.12


def test_training_is_deterministic_and_kept(tmp_path):
    first = fact_model(SMALL, 0, cache=tmp_path / "a")
    again = fact_model(SMALL, 0, cache=tmp_path / "a", report=pytest.fail)
    other = fact_model(SMALL, 0, cache=tmp_path / "b")
    for a, b, c in zip(first.model.parameters(), again.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert len(list((tmp_path / "a").iterdir())) == 1
    fact_model(SMALL, 1, cache=tmp_path / "a")
    assert len(list((tmp_path / "a").iterdir())) == 2
