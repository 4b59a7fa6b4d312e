import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelwright.editing.grace.codebook import GAP, Codebook, Entry
from modelwright.errors import UserError


def entry(id, key, label, value=0.0):
    return Entry(str(id), torch.tensor(key, dtype=torch.float32), tuple(label), torch.full((2,), float(value)))


def test_far_from_all_others_an_edit_makes_a_record():
    book = Codebook(1.0)
    book.add(entry("a", [0, 0], [5]))
    book.add(entry("b", [2.01, 0], [5]))
    assert [r.radius for r in book.records] == [1, 1]
    assert [r.entries for r in book.records] == [["a"], ["b"]]


def test_near_one_of_the_same_label_it_makes_that_grow():
    book = Codebook(1.0)
    book.add(entry("a", [0, 0], [5, 6], 1))
    book.add(entry("b", [1.5, 0], [5, 6], 2))
    (record,) = book.records
    assert record.radius == pytest.approx(1.5, rel=1e-3)
    assert record.radius >= 1.5
    assert record.value.tolist() == [2, 2]
    assert book.look_up(torch.tensor([[1.5, 0], [0, 0], [1.6, 0]])).tolist() == [0, 0, -1]


def test_inside_the_ball_growing_does_not_shrink_it():
    book = Codebook(1.0)
    book.add(entry("a", [0, 0], [5]))
    book.add(entry("b", [0.5, 0], [5]))
    assert book.records[0].radius == 1


def test_near_one_of_another_label_both_take_half_the_distance():
    book = Codebook(1.0)
    book.add(entry("a", [0, 0], [5, 6]))
    book.add(entry("b", [1.5, 0], [6, 5]))
    assert [r.radius for r in book.records] == pytest.approx([0.75 - GAP, 0.75], abs=1e-9)
    assert book.look_up(torch.tensor([[0.75, 0], [0.7499, 0], [2.0, 0], [2.3, 0]])).tolist() == [1, 0, 1, -1]


def test_labels_with_the_same_mean_are_not_the_same():
    book = Codebook(1.0)
    book.add(entry("a", [0, 0], [1, 3]))
    assert book.case(torch.tensor([0.5, 0]), (2, 2))[0] == "split"
    assert book.case(torch.tensor([0.5, 0]), (1, 3))[0] == "grow"


def test_the_label_of_each_record_stays_with_its_key():
    # The labels must not come in another order than the keys.
    book = Codebook(1.0)
    for i, label in enumerate([[1], [2], [3]]):
        book.add(entry(i, [10 * i, 0], label))
    assert book.case(torch.tensor([20.0, 0]), (3,))[:2] == ("grow", 2)
    assert book.case(torch.tensor([0.0, 0]), (1,))[:2] == ("grow", 0)


def test_two_edits_at_one_key_with_different_labels_are_disjoint_and_the_later_counts():
    book = Codebook(1.0)
    book.add(entry("a", [1, 1], [5], 1))
    book.add(entry("b", [1, 1], [6], 2))
    assert book.records[0].radius < 0 <= book.records[1].radius
    assert book.look_up(torch.tensor([[1.0, 1.0]])).tolist() == [1]


def test_a_fact_that_is_edited_anew_keeps_its_ball_where_rounding_moves_the_query():
    book = Codebook(1.0)
    for name, shift, label in (("a", 0.0, 5), ("b", 1e-6, 6), ("c", 0.0, 5)):
        book.add(entry(name, [10 + shift, 1], [label]))
        near = torch.tensor([[10.0, 1.0], [10.0 - 1e-5, 1.0], [10.3, 1.0]])
        assert book.look_up(near).tolist() == [len(book.records) - 1] * 3
    assert [r.radius > 0 for r in book.records] == [False, False, True]
    book.delete("c")
    assert book.look_up(near).tolist() == [1] * 3


def test_deleting_an_edit_is_as_if_it_had_never_been():
    a, b, c = entry("a", [0, 0], [5], 1), entry("b", [1.5, 0], [6], 2), entry("c", [0.5, 0], [5], 3)
    book = Codebook(1.0, [a, b, c])
    for gone, kept in (("b", [a, c]), ("a", [b, c]), ("c", [a, b])):
        changed = book.copy()
        changed.delete(gone)
        assert repr(changed.records) == repr(Codebook(1.0, kept).records)
    assert len(book.entries) == 3
    with pytest.raises(UserError, match="no edit 'z'"):
        book.delete("z")


def test_a_trained_value_reaches_its_record_only():
    book = Codebook(1.0, [entry("a", [0, 0], [5], 1), entry("b", [9, 0], [5], 2)])
    book.set_value(torch.tensor([7.0, 7.0]))
    assert [r.value.tolist() for r in book.records] == [[1, 1], [7, 7]]
    assert book.stacked(torch.device("cpu"))[1].tolist() == [[1, 1], [7, 7]]


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4), st.integers(0, 2)), min_size=1, max_size=15))
def test_copied_described_and_trained_it_is_what_adding_all_again_makes(edits):
    book = Codebook(1.5)
    for number, (x, y, label) in enumerate(edits):
        key = torch.tensor([float(x), float(y)])
        case, near, _ = book.case(key, (label,))
        value = book.records[near].value if case == "grow" else torch.full((2,), float(number))
        book.add(Entry(f"e{number}", key, (label,), value))
        book.set_value(torch.full((2,), number + 0.5))
    wanted = repr(Codebook(1.5, book.entries).records)
    assert repr(book.records) == wanted
    copied = book.copy()
    again = Codebook.of_records(1.5, book.entries, json.loads(json.dumps(book.described())))
    assert repr(copied.records) == repr(again.records) == wanted
    for other in (copied, again):
        other.add(Entry("more", torch.tensor([0.5, 0.5]), (1,), torch.zeros(2)))
        other.set_value(torch.ones(2))
    assert repr(copied.records) == repr(again.records) == repr(Codebook(1.5, again.entries).records)
    assert repr(book.records) == wanted


def test_an_empty_codebook_holds_nothing():
    assert Codebook().look_up(torch.zeros(3, 2)).tolist() == [-1, -1, -1]


@given(
    st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6), st.integers(0, 1)), min_size=1, max_size=12),
    st.integers(1, 20),
)
def test_look_up_is_the_nearest_key_if_it_is_within_reach(edits, scale):
    book = Codebook(1.0)
    for number, (x, y, label) in enumerate(edits):
        book.add(entry(number, [x / 3 + scale, y / 3], [label]))
    queries = torch.stack([torch.tensor([x / 5 + scale, y / 5]) for x in range(-10, 11, 2) for y in range(-10, 11, 2)])
    found = book.look_up(queries).tolist()
    for query, got in zip(queries, found):
        distances = [float((query - r.key).norm()) for r in book.records]
        nearest = min(distances)
        ties = [i for i, d in enumerate(distances) if d <= nearest + 1e-6]
        assert got in [*ties, -1]
        if all(nearest < book.records[i].radius - 1e-6 for i in ties):
            assert got in ties
        if all(nearest > book.records[i].radius + 1e-6 for i in ties):
            assert got == -1


def test_an_edits_own_key_is_served_by_its_own_label():
    generator = torch.Generator().manual_seed(0)
    book = Codebook(1.0)
    keys = torch.randn(30, 4, generator=generator)
    for number, key in enumerate(keys):
        book.add(Entry(str(number), key, (number,), torch.zeros(2)))
    # With labels that all differ, each key that is nearest to itself lies in its own ball.
    assert book.look_up(keys).tolist() == list(range(30))
