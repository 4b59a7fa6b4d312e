"""The claims of both benchmarks run from end to end in miniature, and their bars name what they measure."""

import pytest

from modelwright.catalog import find
from modelwright.progress import Silent
from modelwright.verify.runner import check_claim, load_claim, run_claim


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hallueditbench", "editing-evaluation"])
def test_the_claim_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    claim = load_claim(find(name))
    check_claim(claim)
    document = run_claim(claim, "miniature", [0], 1, Silent(), cache=tmp_path)
    assert set(document["summary"]) == set(claim.variants)
    assert all(len(options) > 0 for options in [document["prepared"]["options"]])
    if name == "hallueditbench":
        assert all(m[v]["before"] == 0.0 for m in document["measurements"].values() for v in ("rome", "ice"))
    else:
        assert all(m["base"]["abilities"] == m["base"]["abilities_few"] for m in document["measurements"].values())


@pytest.mark.parametrize("name", ["hallueditbench", "editing-evaluation"])
def test_the_claim_can_be_judged(name):
    check_claim(load_claim(find(name)))
