"""The numbers of the gap on curves drawn by hand, and when to look."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.training.stability_gap.metrics import gap_metrics, gap_report, probe_steps


def test_a_rising_curve_has_no_gap():
    found = gap_metrics([0, 10, 20, 40], [0.2, 0.3, 0.3, 0.9])
    assert (found["drop"], found["area"], found["tokens_to_recover"]) == (0, 0, 0)
    assert (found["peak"], found["tokens_to_peak"], found["start"], found["end"]) == (0.9, 40, 0.2, 0.9)


def test_a_v_gives_its_numbers():
    # Down by 0.4 until 10, back at 30, above until 50: the area is the triangle 30 x 0.4 / 2.
    found = gap_metrics([0, 10, 30, 50], [0.8, 0.4, 0.8, 0.9])
    assert found["drop"] == pytest.approx(0.4)
    assert (found["worst"], found["tokens_to_worst"], found["tokens_to_recover"]) == (0.4, 10, 30)
    assert found["area"] == pytest.approx(6.0)
    assert (found["peak"], found["tokens_to_peak"]) == (0.9, 50)


def test_the_area_ends_where_the_line_crosses_the_start():
    # From 0.5 at 10 to 1.1 at 40 the line is at 0.8 at 25: 10 x 0.3 / 2 + 15 x 0.3 / 2.
    assert gap_metrics([0, 10, 40], [0.8, 0.5, 1.1])["area"] == pytest.approx(3.75)
    assert gap_metrics([0, 10, 40], [0.8, 1.1, 0.5])["area"] == pytest.approx(0.3 * 15 / 2)
    assert gap_metrics([0, 10, 40], [0.8, 1.1, 0.5])["tokens_to_recover"] is None


def test_a_late_fall_is_the_worst_point_and_ties_take_the_first():
    found = gap_metrics([0, 1, 2, 3, 4], [0.5, 0.4, 0.6, 0.1, 0.1])
    assert found["tokens_to_worst"] == 3
    assert found["drop"] == pytest.approx(0.4)
    assert found["tokens_to_recover"] is None
    assert found["tokens_to_peak"] == 2


@given(st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=20), st.floats(0.5, 3))
def test_a_loss_is_a_score_upside_down_and_scales(values, factor):
    tokens = [i * 3 for i in range(len(values))]
    up, down = gap_metrics(tokens, values), gap_metrics(tokens, [-v for v in values], "lower")
    assert up["drop"] == down["drop"] >= 0
    assert up["area"] == down["area"] >= 0
    assert up["tokens_to_recover"] == down["tokens_to_recover"]
    assert up["peak"] == -down["peak"]
    scaled = gap_metrics([t * factor for t in tokens], values)
    assert scaled["area"] == pytest.approx(up["area"] * factor)


def test_a_report_has_every_probe():
    history = [{"tokens": 0, "qa": 0.5, "loss": 2.0}, {"tokens": 8, "qa": 0.4, "loss": 1.0}]
    found = gap_report(history, {"qa": "higher", "loss": "lower"})
    assert found["qa"]["drop"] == pytest.approx(0.1)
    assert found["loss"]["drop"] == 0


@pytest.mark.parametrize(
    ("tokens", "values", "message"),
    [
        ([], [], "as many tokens as values"),
        ([0, 1], [1.0], "as many tokens as values"),
        ([0, 0], [1.0, 1.0], "must increase"),
        ([0, 1], [1.0, math.nan], "not finite"),
    ],
)
def test_curves_that_make_no_sense_are_refused(tokens, values, message):
    with pytest.raises(UserError, match=message):
        gap_metrics(tokens, values)


def test_probes_are_dense_at_first_and_then_regular():
    assert probe_steps(100, 10, 200) == [1, 2, 3, 4, 7, 10, 15, 20, 40, 60, 80, 100]
    assert probe_steps(7, 10, 1000) == [1, 2, 3, 4, 7]
    assert probe_steps(3, 1000, 1) == [1, 2, 3]


@given(st.integers(1, 500), st.integers(1, 50), st.integers(1, 3000))
def test_probes_end_with_the_run_and_are_never_farther_apart_than_asked(total, step, every):
    found = probe_steps(total, step, every)
    assert found == sorted(set(found))
    assert found[-1] == total
    assert found[0] == 1 or found[0] <= max(1, round(every / step))
    assert all(b - a <= max(1, round(every / step)) for a, b in zip([0, *found], found, strict=False))
