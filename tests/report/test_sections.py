import json
from pathlib import Path

import pytest

from modelwright.errors import UserError
from modelwright.report import sections
from modelwright.report.render import Page
from modelwright.report.runs import Run, Step
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
    assert sections._range([steep], whole=True) == (pytest.approx(1.1), 10.0, False)
    flat = sections._line("a", [[(0.0, 1.0), (1.0, 1.0)]], "", palette)
    assert sections._range([flat]) == (1.0, 1.0, False)


def test_three_dimensions_are_too_many(palette):
    spec = Curves(title="t", step="train", lines=["a", "b", "c"])
    with pytest.raises(UserError, match="names 3 dimensions"):
        sections.curve_figures(Run(Path("none"), {}, (), 0), spec, palette, "x")


def test_retrieval_over_pairs_skips_the_rows_between_evaluations(tmp_path, palette):
    """A contrastive run logs its loss often and R@1 seldom, sometimes in rows of their own."""
    steps = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = [{"step": i, "pairs": i * 64, "loss": 5.0 / i, "pairs_per_second": 9.0} for i in range(1, 41)]
        for i in (10, 20, 30, 40):
            rows[i - 1 : i] = [rows[i - 1], {"step": i, "pairs": i * 64, "eval_query_to_key_r1": i / 100 + seed / 50}]
        rows.append({"step": 41, "pairs": 41 * 64, "eval_query_to_key_r1": None})
        (folder / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        at = {"method": "a", "seed": seed}
        steps.append(Step(str(seed), "train", "train contrastive", at, {}, {}, 1.0, False, folder))
    run = Run(tmp_path, {}, tuple(steps), 0)
    for x, at in (("pairs", [640.0, 1280.0, 1920.0, 2560.0]), ("step", [10.0, 20.0, 30.0, 40.0])):
        spec = Curves(
            title="t", step="train", x=x, y="eval_query_to_key_r1", lines=["method"], over="seed", label="R@1"
        )
        points = [sections._points(step, spec) for step in steps]
        line = sections._line("a", points, "method", palette)
        assert line.x == at
        assert line.y == pytest.approx([0.11, 0.21, 0.31, 0.41])
        drawn = sections.curve_figures(run, spec, palette, "curve")
        assert "ends at 0.410" in drawn["panels"][0]["figure"]
        assert "R@1" in drawn["panels"][0]["figure"]


def test_what_was_done_once_counts_once(tmp_path):
    """Equal steps share a folder; steps without one stand for themselves."""
    places = [tmp_path / "a", tmp_path / "a", tmp_path / "b", tmp_path, tmp_path]
    steps = tuple(Step(str(i), "train", "train", {}, {}, {}, 10.0, False, place) for i, place in enumerate(places))
    run = Run(tmp_path, {}, steps, 0)
    assert [s.id for s in run.once(run.steps)] == ["0", "2", "3", "4"]
    page = Page(title="t")
    sections.add_tiles(page, run)
    assert page.tiles == [("4", "models trained"), ("40 s", "of work in all steps")]
    assert "40 s in 4 runs" in sections.making(run)["times"]
