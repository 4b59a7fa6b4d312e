import pytest
from pydantic import ValidationError

from modelwright.report.spec import ReportSpec
from report import make_run

COMPARE = {"title": "t", "metric": "evaluate.result.bits_per_byte", "rows": "method"}


def test_the_example_is_read():
    spec = ReportSpec.model_validate(make_run.REPORT)
    assert spec.compare[0].over == "seed"
    assert spec.curves[0].lines == ["method", "architecture"]
    assert ReportSpec.model_validate({}) == ReportSpec()


def test_one_line_dimension_may_be_a_word():
    assert ReportSpec.model_validate({"curves": [{"title": "t", "step": "s", "lines": "m"}]}).curves[0].lines == ["m"]


@pytest.mark.parametrize(
    ("block", "where"),
    [
        ({"qestion": "?"}, ("qestion",)),
        ({"compare": [{**COMPARE, "row": "x"}]}, ("compare", 0, "row")),
        ({"compare": [{**COMPARE, "metric": "bits_per_byte"}]}, ("compare", 0, "metric")),
        ({"compare": [{**COMPARE, "metric": "evaluate.options.seed"}]}, ("compare", 0, "metric")),
        ({"compare": [{**COMPARE, "better": "more"}]}, ("compare", 0, "better")),
        ({"compare": [{"title": "t", "metric": "a.result.b"}]}, ("compare", 0, "rows")),
    ],
)
def test_mistakes_are_located(block, where):
    with pytest.raises(ValidationError) as caught:
        ReportSpec.model_validate(block)
    assert caught.value.errors()[0]["loc"] == where
