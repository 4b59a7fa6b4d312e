"""The claim runs from end to end in miniature, and its bars name what it measures."""

import pytest

from modelwright.catalog import find
from modelwright.progress import Silent
from modelwright.verify.runner import check_claim, load_claim, run_claim


@pytest.mark.slow
def test_the_claim_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    claim = load_claim(find("hallueditbench"))
    document = run_claim(claim, "miniature", [0], 1, Silent(), cache=tmp_path)
    assert set(document["summary"]) == set(claim.variants)
    # Every method was tuned, and what it edits was wrong before.
    tuned = document["prepared"]["options"]
    assert set(tuned) == {"ice", "ft-l", "ft-m", "lora", "rome", "rome-c", "memit", "grace"}
    for measured in document["measurements"].values():
        assert all(measured[variant]["before"] == 0.0 for variant in tuned)
        assert measured["model"].keys() >= {"efficacy", "yes", "no", "multiple_choice", "robustness"}


def test_the_claim_can_be_judged():
    check_claim(load_claim(find("hallueditbench")))
