"""Choosing documents of low perplexity: whatever the pool's order, to the token, without the traps."""

import json
import warnings

import numpy as np
import pytest
from datasets import Dataset

from modelwright.curation.ngram_perplexity import NGramScorer, PerplexitySelector, select_lowest_perplexity
from modelwright.curation.overlap import HeldOut
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer
from modelwright.progress import Silent
from modelwright.verbs.select import Select

REFERENCE = [f"the heart of patient {i} pumps blood through the body and the lungs take in air" for i in range(30)]
GOOD = [f"the lungs of patient {i * 7} take in air and the heart pumps blood" for i in range(20)]
BAD = [f"stocks number {i} fell sharply today while the market of bonds number {i * 3} rose" for i in range(20)]


@pytest.fixture(scope="module")
def scorer():
    return NGramScorer(order=3, engine="numpy").fit(REFERENCE)


def pick(pool, scorer, **keys):
    return select_lowest_perplexity(
        pool, scorer, **{"target_tokens": 700, "tokenizer": byte_tokenizer(), "min_tokens": 8, **keys}
    )


def test_the_best_are_taken_until_the_next_would_exceed(scorer):
    pool = [t for pair in zip(BAD, GOOD, strict=True) for t in pair]
    chosen = pick(pool, scorer)
    assert set(chosen["text"]) <= set(GOOD)
    assert chosen["rank"] == list(range(1, len(chosen) + 1))
    assert chosen["ppl"] == sorted(chosen["ppl"])
    np.testing.assert_allclose(chosen["ppl"], scorer.perplexity(chosen["text"]))
    recount = [len(text.encode()) for text in chosen["text"]]
    assert chosen["n_tokens"] == recount
    assert 700 - max(map(len, pool)) < sum(recount) <= 700


def test_the_ranking_does_not_depend_on_the_pools_order(scorer):
    # Two documents of the same words in another order of characters that the model does not know: equal perplexity.
    pool = [*GOOD, *BAD, "the zebra pumps blood", "the zobra pumps blood"]
    expected = pick(pool, scorer, target_tokens=1500).to_dict()
    assert scorer.perplexity(pool[-1:]) == scorer.perplexity(pool[-2:-1])
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(pool).tolist()
        assert pick(Dataset.from_dict({"text": shuffled}), scorer, target_tokens=1500).to_dict() == expected


def test_short_blank_double_and_contaminated_documents_are_left_out(scorer):
    pool = [*GOOD, "the", "", "  ", GOOD[0].upper(), "  " + GOOD[1]]
    with (
        pytest.warns(UserWarning, match="only .* tokens that qualify"),
        pytest.warns(UserWarning, match="2 documents without a word"),
    ):
        found = pick(pool, scorer, target_tokens=9_999)
    assert sorted(t.strip() for t in found["text"]) == sorted(GOOD)
    with pytest.warns(UserWarning, match="only"):
        assert len(pick(pool[:20] + pool[23:], scorer, target_tokens=9_999, dedup=False)) == len(GOOD) + 2
    heldout = HeldOut(n=5).add(["of patient 21 take in"])
    with pytest.warns(UserWarning, match="only"):
        left = pick(GOOD, scorer, target_tokens=9_999, heldout=heldout)["text"]
    assert sorted(left) == sorted(t for t in GOOD if "patient 21 " not in t)


def test_a_pool_that_is_too_small_warns_or_raises(scorer):
    with pytest.raises(UserError, match="has only .* tokens that qualify, fewer than the 9,999"):
        pick(GOOD, scorer, target_tokens=9_999, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pick(GOOD, scorer, target_tokens=sum(map(len, GOOD)))  # just enough
    with pytest.raises(UserError, match="None of the 2 documents has 8 tokens"):
        pick(["a", "b"], scorer)
    with pytest.raises(UserError, match="more than the budget"):
        pick(GOOD, scorer, target_tokens=5)
    with pytest.raises(UserError, match="target_tokens must be at least 1"):
        pick(GOOD, scorer, target_tokens=0)


def test_the_score_is_the_mean_log_probability_and_drops_short_documents(scorer):
    selector = PerplexitySelector(order=3, min_tokens=5).fit(REFERENCE)
    scores = selector.score([GOOD[0], "the heart", "", BAD[0]])
    np.testing.assert_allclose(10 ** -scores[[0, 3]], scorer.perplexity([GOOD[0], BAD[0]]), rtol=1e-6)
    assert np.isnan(scores[[1, 2]]).all()
    assert selector.details()["ngrams"][0] > 10
    low = PerplexitySelector(min_tokens=1, lowercase=True).fit(["A B c"])
    assert low.score(["a b C"]) == low.score(["A B C"])


def test_select_perplexity_on_the_command_line(tmp_path):
    for name, texts in (("pool", BAD + GOOD), ("good", REFERENCE)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    keys = {"method": "perplexity", "pool": [str(tmp_path / "pool.jsonl")], "top": 20, "options": {"min_tokens": "3"}}
    result = Select(**keys, target=[str(tmp_path / "good.jsonl")], output=tmp_path / "a.jsonl").run(Silent())
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} == set(GOOD)
    assert result["details"]["ngrams"]
    NGramScorer().fit(REFERENCE).save(tmp_path / "good.arpa")
    keys["options"]["model"] = str(tmp_path / "good.arpa")
    Select(**keys, output=tmp_path / "b.jsonl").run(Silent())
    again = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [row["text"] for row in again] == [row["text"] for row in rows]
    with pytest.raises(UserError, match="Perplexity needs a reference"):
        Select(method="perplexity", pool=keys["pool"], top=1, output=tmp_path / "c.jsonl").run(Silent())


@pytest.mark.parametrize("options", [{"min_tokens": -1}, {"order": 7}])
def test_bad_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        PerplexitySelector(**options)
