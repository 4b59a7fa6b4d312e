from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.worlds import WORLDS, make_world, world_function
from modelwright.worlds.base import Draw
from modelwright.worlds.names import Names

seeds = st.integers(-(2**40), 2**40)


def test_draws_never_change():
    draw = Draw(7, "stream")
    assert [draw.below(1000) for _ in range(6)] == [898, 876, 692, 321, 727, 260]
    assert Draw(7, "stream").shuffled("abcdef") != Draw(7, "other").shuffled("abcdef")


@given(seed=seeds, n=st.integers(1, 50), low=st.integers(-9, 9), width=st.integers(0, 9))
def test_draws_stay_in_range(seed, n, low, width):
    draw = Draw(seed, "range")
    assert all(0 <= draw.below(n) < n for _ in range(20))
    assert all(low <= draw.between(low, low + width) <= low + width for _ in range(20))
    assert sorted(draw.shuffled(range(n))) == list(range(n))
    chosen = draw.sample(range(n), n // 2)
    assert len(set(chosen)) == n // 2


def test_shuffles_and_samples_are_uniform():
    draw = Draw(0, "uniform")
    shuffles = Counter("".join(draw.shuffled("abc")) for _ in range(6000))
    samples = Counter("".join(draw.sample("abc", 2)) for _ in range(6000))
    assert len(shuffles) == len(samples) == 6
    # Six standard deviations of a count of 1000.
    assert all(abs(n - 1000) < 6 * (6000 * 5 / 36) ** 0.5 for n in (*shuffles.values(), *samples.values()))


def test_names_are_never_part_of_one_another():
    names = Names(Draw(0, "names"), avoid="banana dalimo")
    words = [names.word().lower() for _ in range(20_000)]
    assert len(set(words)) == len(words)
    assert {len(word) for word in words} == {6}
    assert not {"banana", "dalimo"} & set(words)


def test_names_run_out_with_a_sentence(monkeypatch):
    monkeypatch.setattr("modelwright.worlds.names.CAPACITY", 5)
    names = Names(Draw(0, "names"))
    with pytest.raises(UserError, match="more than 5 names"):
        [names.word() for _ in range(7)]


@pytest.mark.parametrize("name", WORLDS)
def test_every_world_is_found_and_documented(name):
    assert world_function(name.replace("_", "-")) is world_function(name)
    assert "Args:" in world_function(name).__doc__


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("domain", {}, "did you mean 'domains'"),
        ("domains", {"pool_siz": 3}, "did you mean 'pool_size'"),
        ("domains", {"pool_size": "many"}, "'many': give a value of type int"),
        ("domains", {"pool_size": True}, "True: give a value of type int"),
        ("domains", {"target_share": 1.5}, "between 0 and 1"),
        ("domains", {"target_share": 0.6, "markov_share": 0.6}, "between 0 and 1"),
        ("domains", {"min_chars": 500}, "below min_chars"),
        ("domains", {"pool_size": 0}, "at least 1"),
        ("graded", {"levels": 1}, "at least 2"),
        ("stdlib_text", {"root": "/"}, "no option 'root'"),
        ("stdlib_text", {"max_bytes": 610}, "min_bytes"),
        ("facts", {"people": 2}, "at least 3"),
        ("facts", {"heldout_templates": 4}, "at most 3"),
        ("facts", {"repeat_counts": [2, 0]}, "repeat_counts is 0"),
        ("facts", {"repeat_counts": "1,x"}, "'x': give a value of type int"),
        ("retrieval", {"unit": "token"}, "did you mean 'tokens'"),
        ("retrieval", {"unit": "tokens"}, "tokenizer"),
        ("retrieval", {"lengths": 20}, "too short"),
        ("retrieval", {"depths": [2.0]}, "between 0 and 1"),
        ("retrieval", {"needle": "no marks"}, "{key}"),
        ("retrieval", {"keys": 10, "value_digits": 1}, "value_digits larger"),
        ("retrieval", {"value_digits": 400}, "at most 15"),
        ("pictures", {"image_size": 16}, "image_size is 16: give at least 24"),
        ("pictures", {"image_size": 1024}, "image_size is 1024: give at most 512"),
        ("pictures", {"max_objects": 4}, "at most 3"),
        ("pictures", {"heldout_wordings": 5}, "at most 4"),
        ("pictures", {"combinations_share": 0.6}, "at most 0.5"),
        ("pictures", {"noisy_share": 0.6}, "add up to 1.2"),
        ("pictures", {"noisy_share": -0.1}, "noisy_share is -0.1: give a share"),
        ("pictures", {"min_noise": 0.95}, "below min_noise, which is 0.95"),
        ("pictures", {"duplicate_share": 0.5, "easy_share": 0.0}, "needs clean rows to copy"),
        (
            "pictures",
            {"pool_size": 1, "mismatched_share": 1.0, "noisy_share": 0.0, "easy_share": 0.0, "duplicate_share": 0.0},
            "no two different scenes",
        ),
        ("pictures", {"max_objects": 1, "heldout_size": 4000, "image_size": 24}, "too few scenes"),
        ("pictures", {"vary": "shape,color"}, "no attribute 'color' to vary: did you mean 'colour'"),
        ("pictures", {"vary": []}, "vary is empty"),
        ("pictures", {"vary": "shape"}, "without varying places only 1 has room"),
        ("pictures", {"pool_siz": 1}, "did you mean 'pool_size'"),
        ("fact_pairs", {"pairs_per_fact": 0}, "at least 1"),
        ("fact_pairs", {"mismatched_share": 2.0}, "between 0 and 1"),
    ],
)
def test_bad_options_get_one_sentence(name, options, message):
    with pytest.raises(UserError) as error:
        make_world(name, 0, options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sequences_may_be_typed_with_commas():
    options = {"lengths": "400, 500", "depths": 1, "train-per-cell": 1, "heldout_per_cell": 0}
    assert sorted(row["length"] for row in make_world("retrieval", 0, options).train) == [400, 500]
