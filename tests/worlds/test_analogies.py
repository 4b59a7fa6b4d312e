from collections import Counter

import pytest

from modelwright.errors import UserError
from modelwright.worlds.analogies import analogies


def test_a_word_stands_with_its_row_and_column():
    world = analogies(0, rows=8, columns=2, sentences=2000, fillers=40)
    together = Counter()
    for row in world.sentences:
        words = row["text"].split()
        assert len(words) == 9
        together.update((a, b) for a in words for b in words)
    grid = {word for row in world.questions + world.tests for word in row.values()}
    assert len(grid) == 16
    # Two words of the grid are never in one sentence, so nothing but their neighbours tells which belong together.
    assert not any(together[a, b] for a in grid for b in grid if a != b)
    for row in world.questions:
        near = {key: {b for (a, b), n in together.items() if a == row[key] and n} - grid for key in "abcd"}
        shared = near["a"] & near["b"]  # of the row, and fillers
        assert len(shared & near["c"]) < len(shared)


def test_questions_and_tests_ask_for_other_rows():
    world = analogies(1)
    words = [{word for row in rows for word in row.values()} for rows in (world.questions, world.tests)]
    assert not words[0] & words[1]
    assert world.as_file(world.tests).count("\n") == len(world.tests) + 1


def test_the_same_seed_gives_the_same_bytes():
    assert analogies(3).fingerprint() == analogies(3).fingerprint() != analogies(4).fingerprint()


@pytest.mark.parametrize("options", [{"rows": 3}, {"columns": 1}, {"sentences": 0}, {"length": 3}])
def test_bad_options(options):
    with pytest.raises(UserError):
        analogies(0, **options)
