import pytest

from modelwright.errors import UserError
from modelwright.worlds.copying import copying


def test_needles_are_sentences_that_end_in_their_answer():
    world = copying(0, needles=12, haystacks=2, sentences=30)
    for row in world.needles:
        assert row["text"].endswith(f" {row['answer']}.")
        subject = next(word for word in row["question"].strip("?").split() if word[0].isupper() and len(word) == 6)
        assert subject in row["text"]
        assert all(row["answer"] not in hay["text"] for hay in world.haystacks)
    assert len({row["text"] for row in world.needles}) == 12
    assert [hay["text"].count(".") for hay in world.haystacks] == [30, 30]
    assert world.haystacks[0] != world.haystacks[1]


def test_the_same_seed_gives_the_same_bytes():
    assert copying(3).fingerprint() == copying(3).fingerprint() != copying(4).fingerprint()
    assert copying(0, sentences=5).fingerprint() == "04377c1940a5dc2312d35dbed6a5694534ff47f6389b3adbe7bd50c78a30a459"


def test_sizes():
    with pytest.raises(UserError, match="needles is 0"):
        copying(0, needles=0)
