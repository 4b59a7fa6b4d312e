import math

import pytest
import torch

from modelwright.editing.learning import Lessons, Schedule, learn, order, plain_inputs
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model


def setup(rate=1.0):
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    return module, torch.optim.SGD(module.parameters(), lr=rate)


def test_the_best_weights_by_the_held_out_loss_are_kept_and_patience_ends_it():
    module, optimizer = setup()
    losses = iter([1.0, 0.5, 2.0, 0.4, 3.0, 4.0, 5.0, 6.0])
    report = learn(
        module, optimizer, lambda step: -module.weight.sum(),
        Schedule(steps=100, accumulate=2, eval_every=4, patience=8),
        validate=lambda: next(losses),
    )  # fmt: skip
    # Looks: before, then after 4, 8, 12 …; the third after training (12) is the best, and 8 more see none better.
    assert report["best_step"] == 12
    assert report["best_validation_loss"] == 0.4
    assert report["steps"] == 20
    assert float(module.weight.detach()) == 12  # each summed pair of gradients moves by 2


def test_gradients_are_summed_and_clipped():
    module, optimizer = setup()
    learn(module, optimizer, lambda step: -module.weight.sum(), Schedule(steps=10, accumulate=5, clip=3.0))
    assert float(module.weight.detach()) == pytest.approx(6.0)


def test_a_loss_that_is_no_number_ends_it():
    module, optimizer = setup()
    with pytest.raises(UserError, match="diverged"):
        learn(module, optimizer, lambda step: module.weight.sum() * math.nan, Schedule(steps=3))


def test_every_pass_sees_every_example_once():
    for turn in range(3):
        assert sorted(order(7, 5, 5 * turn + i) for i in range(5)) == list(range(5))
    assert [order(0, 50, i) for i in range(50)] != [order(1, 50, i) for i in range(50)]


FACTS = [EditRequest("The letter of {} is", f"Land {i}", "Z", old_answer="P") for i in range(20)]


def test_lessons_hold_out_a_tenth_and_never_mix_a_fact_with_itself():
    lessons = Lessons(FACTS, others=3)
    assert len(lessons.training) == 18
    assert [lesson.request for lesson in lessons.held_out()] == FACTS[18:]
    for step in range(60):
        lesson = lessons.at(step)
        assert lesson == lessons.at(step)
        assert lesson.request in FACTS[:18]
        assert lesson.request.subject not in lesson.elsewhere.replace(" is P", "|").split("|")[0].split(" of ")[1:]
        assert lesson.elsewhere.endswith(" P")
        assert lesson.request not in lesson.others
        assert len(lesson.others) == 3
    assert {lessons.at(step).request for step in range(18)} == set(FACTS[:18])


def test_given_texts_are_what_must_stay():
    lessons = Lessons(FACTS, ["one", " ", "two"])
    assert {lessons.at(step).elsewhere for step in range(4)} == {"one", "two"}
    with pytest.raises(UserError, match="blank"):
        Lessons(FACTS, [" "])
    with pytest.raises(UserError, match="at least 2"):
        Lessons(FACTS[:1])


def test_plain_inputs_are_padded_on_the_right_and_cut_to_the_model():
    model = tiny_model("llama", max_position_embeddings=8)
    inputs = plain_inputs(model, byte_tokenizer(), ["abc", "a" * 20])
    assert inputs["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 8]
    assert inputs["input_ids"][0, 3:].tolist() == [0] * 5
