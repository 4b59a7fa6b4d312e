import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelwright.verify.statistics import Sample, mean_and_spread, number, t_cdf, t_quantile

scipy_stats = pytest.importorskip("scipy.stats")


@given(t=st.floats(-50, 50), dof=st.integers(1, 200))
def test_cdf_agrees_with_scipy(t, dof):
    # scipy itself is 3e-12 off next to t = 0.
    assert t_cdf(t, dof) == pytest.approx(scipy_stats.t.cdf(t, dof), abs=1e-11)


@given(t=st.floats(-1e3, 1e3))
def test_cdf_has_closed_forms(t):
    assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-15)
    assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-15)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 5, 9, 10, 29, 100])
@pytest.mark.parametrize("probability", [0.5, 0.8, 0.95, 0.975, 0.995])
def test_quantile_agrees_with_scipy(probability, dof):
    assert t_quantile(probability, dof) == pytest.approx(scipy_stats.t.ppf(probability, dof), rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_bounds_agree_with_scipy(values):
    sample = Sample.of(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    expected = statistics.fmean(values) - scipy_stats.t.ppf(0.95, len(values) - 1) * error
    assert sample.lower_bound() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    low, high = sample.interval()
    half = scipy_stats.t.ppf(0.975, len(values) - 1) * error
    assert high - sample.mean == pytest.approx(half, rel=1e-6, abs=1e-6)
    assert sample.mean - low == pytest.approx(half, rel=1e-6, abs=1e-6)


def test_one_number_has_no_spread():
    sample = Sample.of([2.0])
    assert (sample.sd, sample.lower_bound(), sample.interval()) == (None, None, None)
    assert mean_and_spread(sample, 2) == "2.00"


def test_out_of_range():
    with pytest.raises(ValueError, match="no mean"):
        Sample.of([])
    with pytest.raises(ValueError, match="degree"):
        t_cdf(1.0, 0)
    with pytest.raises(ValueError, match="probability"):
        t_quantile(1.0, 3)


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (-0.25, 2, False, "−0.25"),
        (0.25, 2, True, "+0.25"),
        (-0.001, 2, True, "0.00"),
        (12345.6, 1, False, "12,345.6"),
        (None, 2, False, "–"),
        (float("nan"), 2, False, "–"),
        (float("inf"), 2, False, "–"),
    ],
)
def test_numbers_are_written_for_readers(value, digits, sign, text):
    assert number(value, digits, sign) == text


def test_mean_and_spread():
    assert mean_and_spread(Sample.of([2.0, 2.1, 2.2]), 2) == "2.10 ± 0.10"
