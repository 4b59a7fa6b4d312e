import pytest

from modelwright.verify.runner import judge
from modelwright.verify.view import bar_rows, minutes
from verify import toy_claims as toys


@pytest.mark.parametrize(
    ("gain", "seen"),
    [(0.1 - 4e-6, "lower bound +0.099996"), (0.1 + 4e-6, "lower bound +0.100"), (0.2, "+0.200 ± 0.000")],
)
def test_rounding_never_contradicts_the_verdict(gain, seen):
    measured = {str(s): {"ours": {"loss": 1.0}, "plain": {"loss": 1.0 + gain}, "strong": {}} for s in range(3)}
    bar = judge(toys.PLAIN, toys.HOLDS, measured)
    document = {"bars": [bar], "metrics": {"loss": {"digits": 3}}}
    (row,) = bar_rows(document)
    assert row.met == ("met" if gain >= 0.1 else "not met")
    assert seen in row.seen


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (4320, "1 h 12 min")],
)
def test_durations(seconds, text):
    assert minutes(seconds) == text
