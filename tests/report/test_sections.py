from pathlib import Path

import pytest

from modelwright.errors import UserError
from modelwright.report import sections
from modelwright.report.runs import Run
from modelwright.report.spec import Curves


@pytest.fixture
def palette():
    return sections.Palette(Run(Path("none"), {}, (), 0), {"a": "A"})


def test_a_line_is_the_mean_where_all_repetitions_have_been(palette):
    runs = [[(0.0, 1.0), (10.0, 2.0), (20.0, 9.0)], [(0.0, 3.0), (10.0, 4.0)]]
    line = sections._line("a", runs, "method", palette)
    assert (line.label, line.x, line.y) == ("A", [0.0, 10.0], [2.0, 3.0])
    assert (line.low, line.high) == ([1.0, 2.0], [3.0, 4.0])


def test_repetitions_logged_at_other_points_are_interpolated(palette):
    line = sections._line("a", [[(0.0, 0.0), (5.0, 5.0), (10.0, 10.0)], [(0.0, 0.0), (10.0, 20.0)]], "method", palette)
    assert line.x == [0.0, 5.0, 10.0]
    assert line.y == [0.0, 7.5, 15.0]


def test_long_logs_are_thinned_but_keep_their_ends(palette):
    line = sections._line("a", [[(float(i), float(i)) for i in range(5000)]], "method", palette)
    assert len(line.x) <= 240
    assert (line.x[0], line.x[-1]) == (0.0, 4999.0)


def test_the_steep_start_is_left_out_of_the_range(palette):
    steep = sections._line("a", [[(float(i), 10.0 if i < 10 else 1.0 + i / 100) for i in range(100)]], "", palette)
    assert sections._range([steep]) == (pytest.approx(1.2), pytest.approx(1.99), True)
    flat = sections._line("a", [[(0.0, 1.0), (1.0, 1.0)]], "", palette)
    assert sections._range([flat]) == (1.0, 1.0, False)


def test_three_dimensions_are_too_many(palette):
    spec = Curves(title="t", step="train", lines=["a", "b", "c"])
    with pytest.raises(UserError, match="names 3 dimensions"):
        sections.curve_figures(Run(Path("none"), {}, (), 0), spec, palette, "x")
