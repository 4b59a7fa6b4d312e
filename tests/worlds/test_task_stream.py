import pytest

from modelwright.errors import UserError
from modelwright.worlds.task_stream import task_stream


def test_texts_hold_the_cues_of_their_class_and_tasks_share_no_word():
    world = task_stream(3, tasks=3, classes=3, train_rows=60, test_rows=30)
    assert world.fingerprint() == "be6bd7dcc27c1d6308f3be0c79573bb18171088e749310887202f6a5ee44b506"
    words = {}
    for row in world.train + world.test:
        task = world.tasks[row["task"]]
        found = row["text"].split()
        speaking = {label for label, cues in task["cues"].items() for word in found if word in cues}
        assert speaking == {row["label"]}
        assert sum(word in task["cues"][row["label"]] for word in found) == 2
        assert len(found) == 6
        words.setdefault(row["task"], set()).update(found)
    assert len(words) == 3
    assert not set.intersection(*words.values())
    assert len({label for task in world.tasks.values() for label in task["labels"]}) == 9
    held = {row["text"] for row in world.test}
    assert not held & {row["text"] for row in world.train}
    assert world.counts == {"train": {"rows": 180}, "test": {"rows": 90}}
    assert world.truth["chance"] == 1 / 3
    counts = [
        sum(r["task"] == "task-1" and r["label"] == label for r in world.test)
        for label in world.tasks["task-1"]["labels"]
    ]
    assert counts == [10, 10, 10]


@pytest.mark.parametrize(("labels", "different"), [("disjoint", 12), ("pair", 8), ("shared", 4)])
def test_label_words_are_shared_as_asked(labels, different):
    world = task_stream(tasks=3, labels=labels, train_rows=8, test_rows=4)
    assert len({label for task in world.tasks.values() for label in task["labels"]}) == different
    assert (world.tasks["task-2"]["labels"] == world.tasks["task-3"]["labels"]) == (labels != "disjoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, "at least 2"),
        ({"cues_in_text": 7}, "only 6 words"),
        ({"labels": "disjont"}, "did you mean 'disjoint'"),
        ({"cues": 1, "fillers": 1, "length": 2, "test_rows": 40}, "too few different texts"),
    ],
)
def test_faults(options, message):
    with pytest.raises(UserError, match=message):
        task_stream(**options)
