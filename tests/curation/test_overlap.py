"""Duplicates and contamination."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelwright.curation.overlap import HeldOut, duplicate_hash

_WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


def test_equal_words_are_duplicates() -> None:
    assert duplicate_hash("The cat  sat.\n") == duplicate_hash("the CAT, sat")
    assert duplicate_hash("the cat sat") != duplicate_hash("the sat cat")
    assert duplicate_hash("ab c") != duplicate_hash("a bc")
    assert duplicate_hash("+++") != duplicate_hash("---")
    assert duplicate_hash("\ud800") != duplicate_hash("\ud801")


@given(st.lists(_WORDS, max_size=5), _WORDS, st.integers(1, 6))
def test_shared_ngrams_are_found_exactly(heldout: list[list[str]], document: list[str], n: int) -> None:
    found = HeldOut(n=n, shortest=1).add(" ".join(h) for h in heldout).shared(" ".join(document))

    def contains(part: list[str]) -> bool:
        return any(document[i : i + len(part)] == part for i in range(len(document) - len(part) + 1))

    expected = set()
    for h in heldout:
        size = min(n, len(h))
        if size:
            expected |= {tuple(h[i : i + size]) for i in range(len(h) - size + 1) if contains(h[i : i + size])}
    assert bool(found) == bool(expected)
    assert {tuple(gram.split()) for gram in found.values()} <= expected
    for position, gram in found.items():
        assert gram in " ".join(heldout[position])


def test_short_held_out_documents_count_as_a_whole_but_a_few_words_do_not() -> None:
    heldout = HeldOut(n=13).add(["One two, three four five six!", "yes no"])
    assert heldout.ignored == 1
    assert heldout.shared("zero one two three four five six seven") == {0: "one two three four five six"}
    assert heldout.shared("one two three four five") == {}
    assert heldout.shared("yes no") == {}


def test_the_fingerprint_follows_the_ngrams() -> None:
    text = " ".join(map(str, range(30)))
    assert HeldOut().add([text]).fingerprint() == HeldOut().add([text]).fingerprint()
    assert HeldOut().add([text]).fingerprint() != HeldOut(n=12).add([text]).fingerprint()
    assert HeldOut().add([text]).fingerprint() != HeldOut().add([text + " x"]).fingerprint()
