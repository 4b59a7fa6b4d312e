"""The cross-entropy method: its law, its budget, its resume."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.training.cehpo import Choice, Normal, cross_entropy_search, log_normal

SPACE = {"a": Choice("xyzw"), "b": Choice((1, 2, 3)), "c": Normal(-2, 2), "d": log_normal(1e-4, 1.0)}


def separable(setting):
    return "xyzw".index(setting["a"]) + setting["b"] - (setting["c"] - 1) ** 2 - (math.log10(setting["d"]) + 2) ** 2


def test_finds_the_optimum_of_a_separable_score():
    result = cross_entropy_search(SPACE, separable, population=60, rounds=15, patience=15)
    for setting in (result.best, result.mode):
        assert setting["a"] == "w"
        assert setting["b"] == 3
        assert setting["c"] == pytest.approx(1, abs=0.1)
        assert math.log10(setting["d"]) == pytest.approx(-2, abs=0.1)
    assert result.score == separable(result.best) == max(score for _, score in result.tried)
    assert [r.best for r in result.rounds] == sorted(r.best for r in result.rounds)  # the best one is carried along


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.floats(0.01, 1), st.floats(0, 0.3))
def test_choice_learns_frequencies(elite, smoothing, floor):
    factor = Choice("abc", (0.5, 0.3, 0.2), floor)
    learned = factor.learn(elite, smoothing)
    assert sum(learned.probabilities) == pytest.approx(1)
    assert min(learned.probabilities) >= floor - 1e-12
    mixed = [
        smoothing * elite.count(v) / len(elite) + (1 - smoothing) * p
        for v, p in zip("abc", (0.5, 0.3, 0.2), strict=True)
    ]
    if min(mixed) >= floor:
        assert learned.probabilities == pytest.approx(mixed)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), st.floats(0.01, 1))
def test_number_learns_mean_and_deviation(elite, smoothing):
    for factor, line in ((Normal(1e-3, 1e3), float), (log_normal(1e-3, 1e3), math.log)):
        learned = factor.learn(elite, smoothing)
        points = [line(value) for value in elite]
        assert learned.mean == pytest.approx(smoothing * np.mean(points) + (1 - smoothing) * factor.mean, abs=1e-9)
        wanted = smoothing * np.std(points) + (1 - smoothing) * factor.std
        assert learned.std == pytest.approx(max(wanted, factor.least_std), abs=1e-9)


def test_whole_sample_as_elite_leaves_the_law_at_the_sample():
    result = cross_entropy_search(SPACE, separable, population=30, elite=1.0, smoothing=1.0, rounds=1)
    settings = [setting for setting, _ in result.tried]
    frequencies = [sum(s["a"] == v for s in settings) / 30 for v in "xyzw"]
    assert result.law["a"]["probabilities"] == pytest.approx(frequencies, abs=2e-3)  # the floor
    assert result.law["c"]["mode"] == pytest.approx(np.mean([s["c"] for s in settings]))
    assert result.law["d"]["std_of_log"] == pytest.approx(np.std([math.log(s["d"]) for s in settings]), abs=1e-5)


def test_draws_follow_the_law():
    draws = random.Random(0)
    law = Choice("ab", (0.8, 0.2))
    assert np.mean([law.draw(draws.random()) == "a" for _ in range(4000)]) == pytest.approx(0.8, abs=0.03)
    for factor, low, high in ((Normal(0, 1, mean=0.9, std=0.5), 0, 1), (log_normal(1, 100), 1, 100)):
        values = [factor.draw(draws.random()) for _ in range(4000)]
        assert min(values) >= low
        assert max(values) <= high
    # Cut off, not piled up at the bounds.
    cut = np.array([Normal(0, 1, mean=1.0, std=0.5).draw(draws.random()) for _ in range(4000)])
    assert (cut == 1).mean() < 0.01
    assert {Normal(1, 4, whole=True).draw(draws.random()) for _ in range(200)} == {1, 2, 3, 4}
    assert all(isinstance(log_normal(8, 64, whole=True).draw(u), int) for u in (0.0, 0.5, 0.999999))


def test_same_seed_same_search():
    first, second, other = (cross_entropy_search(SPACE, separable, rounds=3, seed=seed) for seed in (4, 4, 5))
    assert first == second
    assert first.tried == second.tried
    assert first.tried != other.tried


def test_a_setting_is_scored_once():
    calls = []

    def score(setting):
        calls.append(setting["a"])
        return float(setting["a"])

    result = cross_entropy_search({"a": Choice((1, 2, 3))}, score, population=50, rounds=4, patience=9)
    assert sorted(calls) == [1, 2, 3]
    assert result.evaluations == 3
    cross_entropy_search({"a": Choice((1, 2, 3))}, score, population=50, rounds=1, cache=False)
    assert len(calls) == 53


def test_why_it_stops():
    flat = cross_entropy_search(SPACE, lambda s: 1.0, rounds=50, patience=3)
    assert (flat.stopped, len(flat.rounds)) == ("threshold", 4)
    assert cross_entropy_search(SPACE, separable, rounds=2).stopped == "rounds"
    budget = cross_entropy_search(SPACE, separable, rounds=50, evaluations=47, patience=50)
    assert (budget.stopped, budget.evaluations) == ("evaluations", 47)
    decided = cross_entropy_search({"a": Choice("xyzw")}, lambda s: s["a"] == "x", rounds=50, patience=50)
    assert decided.stopped == "entropy"
    assert decided.mode == {"a": "x"}


def test_noisy_scores_are_taken_again():
    noise = random.Random(1)

    def noisy(setting):
        return setting["b"] + noise.gauss(0, 1)

    result = cross_entropy_search(
        {"b": Choice(tuple(range(10)))}, noisy, population=10, rounds=3, rescore=5, evaluations=60
    )
    again = [score for setting, score in result.tried if setting == result.best]
    assert len(again) >= 6
    assert result.score == pytest.approx(np.mean(again))
    assert result.evaluations <= 60


def test_killed_search_continues(tmp_path):
    journal = tmp_path / "search.jsonl"
    whole = cross_entropy_search(SPACE, separable, rounds=4)
    calls = []

    def killed(setting):
        if len(calls) == 33:
            raise KeyboardInterrupt
        calls.append(setting)
        return separable(setting)

    with pytest.raises(KeyboardInterrupt):
        cross_entropy_search(SPACE, killed, rounds=4, journal=journal)
    with journal.open("a") as file:
        file.write('{"setting": {"a"')  # cut in the middle of a line
    calls.clear()

    def counted(setting):
        calls.append(setting)
        return separable(setting)

    again = cross_entropy_search(SPACE, counted, rounds=4, journal=journal)
    assert again.tried == whole.tried
    assert again.best == whole.best
    assert len(calls) == whole.evaluations - 33
    assert len(journal.read_text().splitlines()) == whole.evaluations + 1
    with pytest.raises(UserError, match="another space, seed or population"):
        cross_entropy_search(SPACE, separable, rounds=4, journal=journal, seed=1)
    journal.write_text("not json\n")
    with pytest.raises(UserError, match="not the journal"):
        cross_entropy_search(SPACE, separable, journal=journal)


def test_a_journal_that_goes_on_is_not_written_anew(tmp_path, monkeypatch):
    """A kill in the middle of that would lose the evaluations that it holds."""
    journal = tmp_path / "search.jsonl"
    whole = cross_entropy_search(SPACE, separable, rounds=2, journal=journal)
    kept = journal.read_bytes()
    journal.write_bytes(kept + b'{"setting": {"a"')
    monkeypatch.setattr(type(journal), "write_bytes", None)
    again = cross_entropy_search(SPACE, lambda setting: 1 / 0, rounds=2, journal=journal)
    assert again.tried == whole.tried
    assert journal.read_bytes() == kept


def test_a_journal_replaces_no_file_of_another_kind(tmp_path):
    notes = tmp_path / "notes.txt"
    for content in ("my only notes", "{", "né"):  # without an end of line, as an editor may leave it
        notes.write_text(content + "x")
        with pytest.raises(UserError, match="not the journal"):
            cross_entropy_search(SPACE, separable, journal=notes)
        assert notes.read_text() == content + "x"
    with pytest.raises(UserError, match="is a folder"):
        cross_entropy_search(SPACE, separable, journal=tmp_path)
    # A run that was killed within its first line leaves the beginning of one.
    whole = tmp_path / "whole.jsonl"
    cross_entropy_search(SPACE, separable, rounds=1, journal=whole)
    for cut in (0, 9):
        notes.write_bytes(whole.read_bytes()[:cut])
        cross_entropy_search(SPACE, separable, rounds=1, journal=notes)
        assert notes.read_bytes() == whole.read_bytes()


def test_a_journal_holds_any_text(tmp_path):
    """Ends of lines that only Unicode knows, and half a character, as a file's name may have it."""
    journal, values = tmp_path / "j.jsonl", ("a\u2028b", "c\x85d", "e\ud800")

    def score(setting):
        if setting["t"] == values[0]:
            raise ValueError("no file \udcff")
        return float(values.index(setting["t"]))

    space = {"t": Choice(values)}
    first = cross_entropy_search(space, score, rounds=2, on_error="skip", journal=journal)
    again = cross_entropy_search(space, lambda s: 1 / 0, rounds=2, on_error="skip", journal=journal)
    assert (again.tried, again.failures) == (first.tried, first.failures)


def test_an_objective_that_fails(tmp_path):
    def fails(setting):
        if setting["a"] == "x":
            raise ValueError("no memory left\nand a second line")
        return float("nan") if setting["a"] == "y" else separable(setting)

    with pytest.raises(UserError, match=r"failed at a=.*on_error='skip'"):
        cross_entropy_search(SPACE, fails)
    with pytest.raises(UserError) as raised:
        cross_entropy_search(SPACE, lambda s: {}["width"])
    assert isinstance(raised.value.__cause__, KeyError)  # with the lines of the objective in its traceback
    result = cross_entropy_search(SPACE, fails, rounds=4, on_error="skip", journal=tmp_path / "j.jsonl")
    assert result.best["a"] in "zw"
    assert result.failures == sum(s["a"] in "xy" for s, _ in result.tried) > 0
    assert any(json.loads(line).get("failure") for line in (tmp_path / "j.jsonl").read_text().splitlines())
    again = cross_entropy_search(SPACE, fails, rounds=4, on_error="skip", journal=tmp_path / "j.jsonl")
    assert (again.tried, again.failures) == (result.tried, result.failures)
    with pytest.raises(UserError, match="All 20 settings of a round failed"):
        cross_entropy_search(SPACE, lambda s: 1 / 0, on_error="skip")


def test_a_round_in_which_most_settings_fail_has_a_threshold():
    result = cross_entropy_search(
        SPACE, lambda s: separable(s) if s["a"] == "x" and s["b"] == 1 else math.nan, rounds=1, on_error="skip"
    )
    assert 0 < sum(math.isfinite(score) for _, score in result.tried) < 4  # fewer than the elite would be
    assert result.rounds[0].threshold == min(score for _, score in result.tried if math.isfinite(score))
    assert (result.mode["a"], result.mode["b"]) == ("x", 1)


def test_a_journal_is_about_one_thing(tmp_path):
    journal = tmp_path / "j.jsonl"
    first = cross_entropy_search(SPACE, separable, rounds=2, journal=journal, about={"data": "one"})
    again = cross_entropy_search(SPACE, lambda s: 1 / 0, rounds=2, journal=journal, about={"data": "one"})
    assert again.tried == first.tried
    for other in ({"data": "two"}, None):
        with pytest.raises(UserError, match="about something else"):
            cross_entropy_search(SPACE, separable, rounds=2, journal=journal, about=other)


@pytest.mark.slow
def test_in_parallel_it_is_the_same():
    alone = cross_entropy_search(SPACE, separable, rounds=2)
    assert cross_entropy_search(SPACE, separable, rounds=2, workers=2).tried == alone.tried


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, "population"),
        ({"elite": 0.0}, "elite"),
        ({"elite": 1.5}, "elite"),
        ({"smoothing": 0.0}, "smoothing"),
        ({"rounds": 0}, "rounds"),
        ({"evaluations": 5}, "less than one round"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        cross_entropy_search(SPACE, separable, **options)


def test_bad_spaces():
    for make, message in (
        (lambda: Choice(()), "differ"),
        (lambda: Choice((1, 1)), "differ"),
        (lambda: Choice((1, 2), floor=0.7), "floor"),
        (lambda: Choice((1, 2, 3), (0.5, 0.5)), "as many probabilities"),
        (lambda: Choice((1, 2), (0.5, 0.6)), "sum 1"),
        (lambda: Choice((1, 2), (1.5, -0.5)), "sum 1"),
        (lambda: Normal(2, 1), "low < high"),
        (lambda: Normal(0.5, 3.5, whole=True), "whole bounds"),
        (lambda: Normal(1, 2, std=0.0), "above 0"),
        (lambda: Normal(1, 2, least_std=0.0), "above 0"),
        (lambda: log_normal(0, 1), "above 0"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    with pytest.raises(UserError, match="empty"):
        cross_entropy_search({}, separable)
    with pytest.raises(UserError, match="'a'"):
        cross_entropy_search({"a": [1, 2]}, separable)
