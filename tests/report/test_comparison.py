"""The page that sets a method beside the plain model."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.report.comparison import SHOWN, marked, write_comparison

SUMMARY = {
    "method": "string", "completions": 2, "completions_that_differ": 1, "mean_first_difference": 2.0,
    "plain_tokens_per_second": 20.0, "tokens_per_second": 30.0,
}  # fmt: skip
SETTINGS = {"model": "m", "with": [["string", {"window": 128}]], "sampling": {"temperature": 0.0, "stop": []}}
ROWS = [
    {"prompt": "Where?", "plain": "In the old town.", "completion": "In the <b>new</b> town.", "first_difference": 2},
    {"prompt": "p" * 2000, "plain": "Yes.", "completion": "Yes.", "first_difference": None},
]


def text(runs):
    return "".join(piece for _, piece in runs)


@given(st.text("ab c.,\n", max_size=40), st.text("ab c.,\n", max_size=40))
def test_nothing_is_lost_and_only_what_differs_is_marked(left, right):
    ours, theirs = marked(left, right)
    assert (text(ours), text(theirs)) == (left, right)
    if left == right:
        assert not any(changed for changed, _ in ours + theirs)
    elif "".join(left.split()) != "".join(right.split()):
        assert any(changed for changed, _ in ours + theirs)


def test_words_are_marked_whole_and_changed_sentences_once():
    ours, theirs = marked("I said yes to him today.", "I said nothing at all today.")
    assert ours == [(False, "I said "), (True, "yes to him"), (False, " today.")]
    assert theirs == [(False, "I said "), (True, "nothing at all"), (False, " today.")]


def test_the_page_is_whole_and_safe(tmp_path):
    page = tmp_path / "page.html"
    assert write_comparison(page, ROWS, SUMMARY, settings=SETTINGS) == {"page": str(page)}
    html = page.read_text()
    assert "<mark>old</mark>" in html
    assert "&lt;b&gt;new&lt;/b&gt;" in html or "&lt;" in html
    assert "<b>" not in html
    assert not re.search(r"(src|href)=\"https?:", html)
    assert "1.50 ×" in html
    assert "differs from token 3 on" in html
    assert "temperature 0.0" in html
    with pytest.raises(UserError, match="--force"):
        write_comparison(page, ROWS, SUMMARY, settings=SETTINGS)


def test_scores_where_there_are_answers(tmp_path):
    rows = [{**ROWS[0], "answers": ["The new town", "b"]}, {**ROWS[1], "gold": "yes"}]
    found = write_comparison(tmp_path / "a.html", rows, SUMMARY, settings=SETTINGS)
    assert found["scores"]["contains the answer"] == {"plain": 0.0, "string": 1.0}
    assert found["scores"]["exact match"] == {"plain": 0.0, "string": 0.0}
    assert "lacks the answer" in (tmp_path / "a.html").read_text()
    found = write_comparison(tmp_path / "b.html", rows, SUMMARY, settings=SETTINGS, answer_field="gold")
    assert found["scores"]["exact match"] == {"plain": 1.0, "string": 1.0}
    with pytest.raises(UserError, match="'right'"):
        write_comparison(tmp_path / "c.html", rows, SUMMARY, settings=SETTINGS, answer_field="right")
    assert not (tmp_path / "c.html").exists()


def test_a_long_run_shows_what_differs_first(tmp_path):
    rows = [ROWS[1]] * 3 * SHOWN + [ROWS[0]]
    summary = {**SUMMARY, "completions": len(rows)}
    write_comparison(tmp_path / "a.html", rows, summary, settings=SETTINGS)
    html = (tmp_path / "a.html").read_text()
    assert html.count('<article class="pair') == SHOWN
    assert f"{3 * SHOWN + 1} · differs" in html
