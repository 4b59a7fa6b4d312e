"""Scores of short answers."""

import pytest

from modelwright.evaluation.answers import answers_of, contains, exact_match, f1, normalise


def test_normalised_as_squad_does():
    assert normalise("  The  U.S. Army, an   anthem") == "us army anthem"
    assert normalise("theatre at last") == "theatre at last"


@pytest.mark.parametrize(
    ("said", "answers", "scores"),
    [
        ("The Beatles!", ["beatles"], (1, 1, 1)),
        ("It was the Beatles", ["Beatles", "Stones"], (0, 1, 0.5)),
        ("Stones", ["Beatles", "The Stones"], (1, 1, 1)),
        ("nobody", ["Beatles"], (0, 0, 0)),
        ("", ["Beatles"], (0, 0, 0)),
    ],
)
def test_scores(said, answers, scores):
    assert (exact_match(said, answers), contains(said, answers), f1(said, answers)) == pytest.approx(scores)


def test_answers_in_the_forms_that_data_sets_have():
    assert answers_of({"answer": "x"}) == ["x"]
    assert answers_of({"answers": {"text": ["a", "b"], "answer_start": [1, 2]}}) == ["a", "b"]
    assert answers_of({"sub_answer": [["a"], "b"]}, "sub_answer") == ["a", "b"]
    assert answers_of({"answers": [], "answer": 7}) == ["7"]
    assert answers_of({"answer": " "}) is None
    assert answers_of({"other": "x"}) is None
