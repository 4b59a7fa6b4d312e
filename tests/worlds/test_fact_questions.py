"""Mistaken beliefs exchange objects and nothing else; chains and choices have exactly one answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.worlds import fact_questions as bank
from modelwright.worlds.base import Draw
from modelwright.worlds.facts import RELATIONS, facts

WORLD = facts(3, people=20, companies=5, cities=6, countries=3, aliases=False)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 50))
def test_mistakes_exchange_objects_so_that_each_stays_as_frequent(share, seed):
    truth, wrong = bank.truth_of(WORLD), bank.mistaken(WORLD, share, seed)
    for relation in ("born_in", "mentor", "plays", "works_for", "speaks"):
        pick = [sorted(o for (_, r), o in b.objects.items() if r == relation) for b in (truth, wrong)]
        assert pick[0] == pick[1]
    assert {k for k in truth.objects if truth.objects[k] != wrong.objects[k]} == set(wrong.wrong)
    assert all(s != o for (s, r), o in wrong.objects.items() if r == "mentor")
    people = [r.name for r in RELATIONS if r.subject == "person"]
    assert {r for _, r in wrong.wrong} <= set(people)


def test_about_the_asked_share_is_wrong():
    wrong = bank.mistaken(WORLD, 0.5, 0).wrong
    assert 0.8 * 40 <= len(wrong) <= 40


def test_every_relation_has_its_templates():
    assert set(bank.YES_NO) == set(bank.REVERSED) == {r.name for r in RELATIONS}
    for relation in RELATIONS:
        assert "Bo" in bank.question(relation.name, "Bo")
        assert "Ky" in bank.yes_no(relation.name, "Bo", "Ky")
        assert "Bo" not in bank.reversed_question(relation.name, "Ky")
    with pytest.raises(UserError, match="no relation 'lives_in'"):
        bank.question("lives_in", "Bo")


def test_a_chain_goes_on_from_the_edited_object():
    truth = bank.truth_of(WORLD)
    (person, _), city = next((k, o) for k, o in truth.objects.items() if k[1] == "born_in")
    other = next(o for o in truth.candidates("born_in") if o != city)
    question, answer = truth.chain(person, "born_in", other, 2, Draw(0, "x"))
    assert question == f"In which country does the city where {person} was born lie?"
    assert answer == truth.objects[other, "located_in"]
    _, answer = truth.chain(person, "born_in", other, 3, Draw(0, "x"))
    assert answer == truth.objects[truth.objects[other, "located_in"], "speaks"]
    assert truth.chain(person, "born_in", other, 4, Draw(0, "x")) is None
    assert truth.chain(person, "plays", "harp", 2, Draw(0, "x")) is None


def test_the_letter_is_that_of_the_right_choice():
    for seed in range(10):
        choices, letter = bank.multiple_choice("Rome", ["Oslo", "Bern", "Riga"], Draw(seed, "x"))
        assert f"{letter}. Rome" in choices
        assert choices.count("  ") == 3
