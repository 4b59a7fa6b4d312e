"""Probes: questions read from a file, scored as the model itself says."""

import json

import pytest
import torch

from modelwright.errors import UserError
from modelwright.models.scoring import bits_per_byte
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.training.stability_gap import BitsPerByte, ChoiceAccuracy, Item, read_items


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_read_in_their_usual_forms(tmp_path):
    rows = [
        {"question": "Q?", "choices": ["a", "b"], "answer": 1},
        {"question": "Q?", "options": {"A": "x", "B": "y", "C": "z"}, "answer": "C"},
        {"question": "Q? ", "choices": ["yes", "no"], "label": "no"},
        {"question": "Q?", "choices": ["\nyes", " no"], "answer": "B"},
        {"question": "Q?", "choices": [False, True], "answer": True},
    ]
    found = read_items(write(tmp_path / "q.jsonl", rows))
    assert found == [
        Item("Q?", (" a", " b"), 1),
        Item("Q?", (" x", " y", " z"), 2),
        Item("Q? ", ("yes", "no"), 1),
        Item("Q?", ("\nyes", " no"), 1),
        Item("Q?", (" False", " True"), 1),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "choices": ["a"], "answer": 0}, "q.jsonl:1 needs a list of two or more 'choices'"),
        ({"prompt": "Q", "choices": ["a", "b"]}, "and an 'answer'"),
        ({"prompt": "Q", "choices": ["yes", "no"], "answer": True}, "answer True is none of the 2 choices"),
        ({"prompt": "Q", "choices": {"text": ["a"], "label": ["A"]}, "answer": 0}, "needs a list of two or more"),
        ({"prompt": "Q", "choices": ["a", "b"], "answer": 2}, "answer 2 is none of the 2 choices"),
        ({"text": "Q", "choices": ["a", "b"], "answer": 0}, "'prompt'"),
    ],
)
def test_faulty_questions_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_items(write(tmp_path / "q.jsonl", [row]))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_accuracy_is_that_of_log_probabilities_one_by_one(family, normalise):
    model, tokenizer = tiny_model(family), byte_tokenizer()
    items = [Item(f"question {i}", (" a", f" longer {i}", " xyz" * (i % 3 + 1)), i % 3) for i in range(9)]
    right = 0
    for item in items:
        scores = []
        for choice in item.choices:
            ids = torch.tensor([list((item.prompt + choice).encode())])
            ids = torch.tensor([tokenizer(item.prompt + choice)["input_ids"]])
            logits = model(ids).logits.log_softmax(-1)[0]
            first = len(tokenizer(item.prompt)["input_ids"])
            value = sum(float(logits[t - 1, ids[0, t]]) for t in range(first, ids.shape[1]))
            scores.append(value / (len(choice) if normalise else 1))
        right += scores.index(max(scores)) == item.answer
    probe = ChoiceAccuracy(items, tokenizer, normalise=normalise, batch_size=4)
    assert probe(model) == right / 9
    assert 0 <= right < 9


def test_a_model_that_knows_answers_all_and_long_questions_are_refused():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    items = [Item("q", (" a", " b"), 0)]
    with pytest.raises(UserError, match="at least one question"):
        ChoiceAccuracy([], tokenizer)
    with pytest.raises(UserError, match="more than the model's 512"):
        ChoiceAccuracy([Item("q" * 600, (" a", " b"), 0)], tokenizer)(model)
    both = {ChoiceAccuracy(items, tokenizer)(model), ChoiceAccuracy([Item("q", (" b", " a"), 0)], tokenizer)(model)}
    assert both == {0.0, 1.0}


def test_bits_per_byte_is_that_of_evaluation():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    assert BitsPerByte(["some text"], tokenizer)(model) == bits_per_byte(model, tokenizer, ["some text"])


def test_a_file_without_questions_is_told_what_to_rename(tmp_path):
    with pytest.raises(UserError, match="no field 'prompt'.*Each row needs it"):
        read_items(write(tmp_path / "q.jsonl", [{"text": "no question"}]))
