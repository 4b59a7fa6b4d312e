import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.probing.memorization.templating import (
    is_incrementing,
    is_repeating,
    pieces,
    shannon_code_length,
    templating,
)

COUNTING = [
    "1, 2, 3, 4, 5",
    "1 2 3",
    "5 3 1",
    "A.1 , A.2 , A.3 , A.4",
    "T0, T1, T2, T3, T4, T5, T6, T7",
    "23: 0xf1, 24: 0xf2, 25: 0xf3, 26: 0xf4, 27: 0xf5",
]
PROSE = "It was the 3rd of May 1901 when all 12 of them, 4 with umbrellas, left the house."


@pytest.mark.parametrize("text", COUNTING)
@pytest.mark.parametrize("legacy", [False, True])
def test_counters_increment(text, legacy):
    assert templating(text, legacy=legacy) == (True, False)


@pytest.mark.parametrize("text", ["Go Go Go Go", "ababab", "1 1 1 1 1 1"])
@pytest.mark.parametrize("legacy", [False, True])
def test_repetitions_repeat(text, legacy):
    assert templating(text, legacy=legacy) == (False, True)


@pytest.mark.parametrize("text", ["1, 2, 4, 8", "3 2 7", PROSE, "", "a", "7", "1 2", "ab"])
@pytest.mark.parametrize("legacy", [False, True])
def test_other_texts_are_no_templates(text, legacy):
    assert templating(text, legacy=legacy) == (False, False)


def test_a_triple_that_bends_downwards_counts_only_for_the_official_code():
    assert not is_incrementing("1 2 1")
    assert is_incrementing("1 2 1", legacy=True)
    for text in ("2 2 2", "0 4 4"):
        assert not is_incrementing(text)
        assert not is_incrementing(text, legacy=True)


@pytest.mark.parametrize("text", ["xababay", "a go go 1", "3 0 0 3"])
def test_the_ends_of_a_repetition_count_but_for_the_official_code(text):
    assert not is_repeating(text)
    assert templating(text, legacy=True) == (False, True)


@pytest.mark.parametrize("text", [",,,", "aa"])
def test_three_characters_repeat_but_for_the_official_code(text):
    assert is_repeating(text)
    assert not is_repeating(text, legacy=True)


def test_three_compound_units_are_seen_though_their_ends_may_be_cut():
    text = "23: 0xf1, 24: 0xf2, 25: 0xf3"
    assert is_incrementing(text)
    assert not is_incrementing(text, legacy=True)
    assert pieces(text)[:3] == [23, ":", 0xF1]
    assert pieces(text, legacy=True)[:5] == [23, ":", 0, "xf", 1]


def test_halves_at_both_ends_do_not_matter():
    assert is_incrementing("99, item 10, item 11, item 12, item 13, it")


def repeats_by_definition(text):
    return any(all(text[i] == text[i - p] for i in range(p, len(text))) for p in range(1, len(text) // 2 + 1))


@given(st.one_of(st.text("ab", max_size=14), st.tuples(st.text("abc", min_size=1, max_size=4), st.integers(1, 5))))
def test_repeating_is_its_definition(made):
    text = made if isinstance(made, str) else (made[0] * made[1])[: len(made[0]) * made[1]]
    assert is_repeating(text) == repeats_by_definition(text)


@given(st.integers(-5, 900), st.integers(-9, 9).filter(bool), st.integers(4, 12), st.sampled_from([", ", " - ", "; x"]))
def test_every_progression_with_words_between_increments(start, step, count, between):
    numbers = [start + i * step for i in range(count)]
    if min(numbers) >= 0:
        assert is_incrementing(between.join(map(str, numbers)))
        # (Of more numbers, every third may still make a progression with a long enough period: the rule allows it.)
        wrong = [*numbers[:2], numbers[2] + 1, *numbers[3:5]]
        assert not is_incrementing(between.join(map(str, wrong)))


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 6])
def test_uniform_characters_need_their_bits(bits):
    text = "".join(chr(65 + i) for i in range(2**bits)) * 3
    assert shannon_code_length(text) == bits


@given(st.text(min_size=1, max_size=60))
def test_the_code_is_between_the_entropy_and_one_bit_more(text):
    shares = [c / len(text) for c in Counter(text).values()]
    entropy = -sum(p * math.log2(p) for p in shares)
    assert entropy - 1e-9 <= shannon_code_length(text) < entropy + 1


def test_texts_of_one_character_or_none_have_length_0():
    assert shannon_code_length("aaaa") == shannon_code_length("") == 0


def test_a_run_of_thousands_of_digits_is_no_error():
    assert not is_incrementing("1" * 5000 + " 2 3 4")
