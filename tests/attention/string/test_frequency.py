"""Counts of relative positions against the definition."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.attention.string.frequency import frequency_of_data, position_frequency, share_at_least
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer


def test_one_sequence_of_four():
    assert position_frequency([4], 4).tolist() == [4, 3, 2, 1]
    assert position_frequency([4], 6).tolist() == [4, 3, 2, 1, 0, 0]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 12))
def test_against_the_definition(lengths, longest):
    def count(sequences):
        return [sum(max(s - i, 0) for s in sequences) for i in range(longest)]

    pieces = [min(longest, n - begin) for n in lengths for begin in range(0, n, longest)]
    assert position_frequency(lengths, longest).tolist() == count(pieces)
    assert position_frequency(lengths, longest, "truncate").tolist() == count([min(n, longest) for n in lengths])
    total = sum(lengths)
    packed = [longest] * (total // longest) + [total % longest]
    assert position_frequency(lengths, longest, "pack").tolist() == count(packed)


def test_shapes_that_the_paper_names():
    """Packed data fall linearly, uniform lengths quadratically."""
    length = 1000
    packed = position_frequency([length] * 7, length)
    assert np.array_equal(packed, 7 * (length - np.arange(length)))
    uniform = position_frequency(range(1, length + 1), length)
    rest = length - np.arange(length)
    assert np.array_equal(uniform, rest * (rest + 1) // 2)
    assert share_at_least(packed, 667) == pytest.approx(1 / 9, abs=0.001)
    assert share_at_least(uniform, 667) == pytest.approx(1 / 27, abs=0.001)
    assert share_at_least(position_frequency([], 5), 2) == 0.0


def test_data_files(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in ("abcd", "ef", "")))
    found = frequency_of_data(file, byte_tokenizer(), 6, text_field="body", batch_size=2)
    assert found.tolist() == position_frequency([4, 2, 0], 6).tolist() == [6, 4, 2, 1, 0, 0]


def test_bad_values():
    with pytest.raises(UserError, match="max_length is 0"):
        position_frequency([1], 0)
    with pytest.raises(UserError, match="A length is -1"):
        position_frequency([-1], 5)
    with pytest.raises(UserError, match="use split, truncate or pack"):
        position_frequency([1], 5, "cut")
