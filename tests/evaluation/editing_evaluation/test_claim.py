"""The claim runs from end to end in miniature, and its bars name what it measures."""

import pytest

from modelwright.catalog import find
from modelwright.progress import Silent
from modelwright.verify.runner import check_claim, load_claim, run_claim


@pytest.mark.slow
def test_the_claim_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    claim = load_claim(find("editing-evaluation"))
    document = run_claim(claim, "miniature", [0], 1, Silent(), cache=tmp_path)
    assert set(document["summary"]) == set(claim.variants)
    assert document["prepared"]["options"]
    assert all(m["base"]["abilities"] == m["base"]["abilities_few"] for m in document["measurements"].values())


def test_the_claim_can_be_judged():
    check_claim(load_claim(find("editing-evaluation")))
