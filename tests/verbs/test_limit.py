"""A limit below 1 is one sentence in every verb that has one, before anything is read."""

import pytest

from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.verbs import load_verb

VERBS = {
    "tokenizer": {"data": ["d.jsonl"]},
    "evaluate perplexity": {"model": "m", "data": ["d.jsonl"]},
    "evaluate nq-swap": {"model": "m", "data": ["d.jsonl"]},
    "generate": {"model": "m", "prompt": ["a"]},
    "speculate analyse": {"target": "m", "draft": "m", "prompt": ["a"]},
    "probe token-loss": {"model": "m", "data": ["d.jsonl"], "counts": "c.parquet"},
    "probe memorization": {"model": ["m"], "corpus": ["d.jsonl"]},
    "edit": {"model": "m", "method": "rome", "requests": ["d.jsonl"]},
    "edit trace": {"model": "m", "requests": ["d.jsonl"]},
    "edit hallucinations": {"model": "m", "questions": ["d.jsonl"]},
    "edit sequence": {"model": "m", "requests": ["d.jsonl"]},
}


@pytest.mark.parametrize("limit", [0, -1])
@pytest.mark.parametrize("name", VERBS)
def test_a_limit_below_1_is_refused(name, limit, tmp_path):
    options = {**VERBS[name], "output": tmp_path / "out.jsonl", "limit": limit}
    with pytest.raises(UserError, match=f"--limit is {limit}: give at least 1"):
        load_verb(name)(**options).run(Silent())
    assert not list(tmp_path.iterdir())
