"""Answers match labels by whole words; the published rule is kept beside it, with what it lets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.evaluation.matching import ModelJudge, agrees, check_protocol, match, repeated_share
from modelwright.models.tiny import byte_tokenizer, tiny_model


@pytest.mark.parametrize(
    ("answer", "label", "kind", "right"),
    [
        ("October", "October", "text", True),
        ("It is in october, I think", "October", "text", True),
        ("Horror", "Fantasy and Horror", "text", True),
        ("", "October", "text", False),
        ("   ", "October", "text", False),
        ("a", "a town in Spain", "text", False),
        ("the", "The", "text", True),
        ("Oct", "October", "text", False),
        ("north", "no", "text", False),
        ("New York City", "York", "text", True),
        ("Fantasy Horror", "Fantasy and Horror", "text", False),
        ("No.", "No", "yes_no", True),
        ("North", "No", "yes_no", False),
        ("Yes, not no", "No", "yes_no", False),
        ("The answer is (D) October", "D", "letter", True),
        ("The answer is A. October", "D", "letter", False),
        ("a dog", "A", "letter", False),
        ("C", "C", "letter", True),
    ],
)
def test_the_rule_of_whole_words(answer, label, kind, right):
    assert match(answer, label, kind) is right


def test_the_published_rule_lets_through_what_it_lets_through():
    assert match("", "October", "text", "paper")
    assert match("north", "No", "yes_no", "paper")
    assert match("A red door", "D", "letter", "paper")
    assert not match("Paris", "October", "text", "paper")


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_match_by_words_is_symmetric_for_texts_and_needs_a_word(a, b):
    assert match(a, b) == match(b, a)
    if not any(c.isalnum() or c == "_" for c in a):
        assert not match(a, b)


def test_the_judge_is_asked_only_where_the_rule_finds_nothing():
    asked = []

    def judge(answer, label):
        asked.append((answer, label))
        return True

    assert agrees("October", "October", judge=judge)
    assert asked == []
    assert agrees("the tenth month", "October", judge=judge)
    assert asked == [("the tenth month", "October")]
    assert not agrees("", "October", judge=judge)  # nothing was said, so there is nothing to judge
    assert not agrees("maybe", "Yes", "yes_no", judge=judge)
    assert len(asked) == 1


def test_a_model_judges_and_its_nonsense_is_a_no():
    judge = ModelJudge(tiny_model("llama"), byte_tokenizer())
    assert judge("a", "b") in (True, False)
    assert len(judge._known) == 1


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match="no protocol 'wrod': did you mean 'word'"):
        check_protocol("wrod")


def test_repetition():
    assert repeated_share(["one two three four"]) == 0.0
    assert repeated_share(["no no no no"]) == 1.0
    assert repeated_share(["a b a b a b"], n=2) == pytest.approx(4 / 5)
    assert repeated_share([""]) == 0.0
