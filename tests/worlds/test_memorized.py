from collections import Counter

import pytest

from modelwright.errors import UserError
from modelwright.probing.memorization import templating
from modelwright.worlds import make_world
from modelwright.worlds.memorized import memorized


def test_sequences_are_planted_as_often_as_they_say():
    world = memorized(0, copies=[1, 3, 8], bases=[30, 10, 5], templates=20)
    planted = Counter(row["sequence"] for row in world.corpus)
    assert [planted[i] for i in range(len(world.sequences))] == [row["copies"] for row in world.sequences]
    assert len(world.corpus) == 30 + 30 + 40 + 20
    assert all(row["text"] == world.sequences[row["sequence"]]["text"] for row in world.corpus)
    assert len({row["text"] for row in world.sequences}) == 65
    names = world.truth["vocabulary"]
    assert all([names[t] for t in row["tokens"]] == row["text"].split() for row in world.sequences)


def test_templates_follow_their_rule_and_nothing_else_does():
    world = memorized(1, bases=[100, 10, 0, 0, 0, 0, 0], templates=40)
    for row in world.sequences:
        found = templating(row["text"])
        assert found.repeating == (row["kind"] == "repeating"), row["text"]
        assert found.incrementing == (row["kind"] == "counting"), row["text"]
        assert row["category"] == ("recollection" if row["kind"] == "random" else "reconstruction")
    assert Counter(row["kind"] for row in world.sequences)["counting"] == 20


def test_the_same_seed_gives_the_same_bytes():
    small = {"copies": [1, 8], "bases": [5, 2], "templates": 4}
    assert (
        memorized(3, **small).fingerprint()
        == memorized(3, **small).fingerprint()
        != memorized(4, **small).fingerprint()
    )
    assert memorized(0, **small).fingerprint() == "8ed00009d3f5690c3f03c6dd805023533c73957f5fe0154b9d0e60079f22335f"


def test_options_come_from_a_command_line():
    world = make_world("memorized", 0, {"copies": "1,2", "bases": "4,3", "templates": 2})
    assert world.counts["sequences"]["rows"] == 9
    assert world.counts["corpus"]["rows"] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": [1, 2], "bases": [3]}, "2 copies, but 1 bases"),
        ({"length": 7}, "even number, at least 8"),
        ({"copies": [0], "bases": [3]}, "copies of 0 is 0"),
        ({"numbers": 5}, "at least 4 words and 8 numbers"),
        ({"words": 4, "templates": 300, "bases": [1] * 7}, "not 300 different templates"),
    ],
)
def test_impossible_worlds_are_sentences(options, message):
    with pytest.raises(UserError, match=message):
        memorized(0, **options)
