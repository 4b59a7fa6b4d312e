"""`modelwright speculate analyse`, and multi-draft decoding from options."""

import json

import pytest
import torch

from modelwright import catalog
from modelwright.decoding.generate import Sampling
from modelwright.decoding.multi_draft import MultiDraftOptions, acceptance_probability, optimal_acceptance
from modelwright.decoding.multi_draft.analyse import analyse, laws_along
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.models.tokenizers import train_bpe
from modelwright.progress import Silent
from modelwright.verbs.speculate_analyse import SpeculateAnalyse

TOKENIZER = byte_tokenizer()
TARGET, DRAFT = tiny_model("llama", seed=1, initializer_range=0.3), tiny_model("gpt2", seed=2, initializer_range=0.2)


def test_laws_are_those_of_both_models_with_warpers_and_draft_temperature():
    ids = torch.tensor([5, 6, 7, 8, 9])
    sampling = Sampling(temperature=0.5, top_k=7, repetition_penalty=1.5)
    found = list(laws_along(TARGET, DRAFT, ids, 3, sampling, draft_temperature=2.0))
    assert len(found) == 2
    for at, (p, q) in enumerate(found):
        for model, law, flat in ((DRAFT, p, 2.0), (TARGET, q, 1.0)):
            with torch.no_grad():
                logits = model(ids[None, : 3 + at]).logits[0, -1].double()
            seen = ids[: 3 + at].unique()
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.5, logits[seen] / 1.5)
            top = logits.topk(7)
            wanted = torch.zeros_like(law).index_copy(0, top.indices, (top.values / 0.5 / flat).softmax(0))
            torch.testing.assert_close(law, wanted, rtol=0, atol=1e-6)


def test_a_greedy_target_is_a_point():
    ids = torch.tensor([5, 6, 7, 8])
    for _, q in laws_along(TARGET, DRAFT, ids, 1, Sampling(temperature=0)):
        assert sorted(q.unique().tolist()) == [0, 1]


def test_the_table_is_the_mean_over_the_tokens():
    sampling = Sampling(max_new_tokens=5, temperature=1.0, top_k=9)
    found = analyse(TARGET, DRAFT, TOKENIZER, ["abc", "de"], sampling=sampling, num_drafts=(1, 3))
    assert (found["prompts"], found["tokens"]) == (2, 10)
    rows = {(row["drafts"], row["verifier"]): row for row in found["table"]}
    assert all(row["acceptance"] <= row["optimum"] + 1e-9 for row in found["table"])
    assert rows[3, "optimum"]["left"] == 0
    assert rows[1, "is"]["acceptance"] == pytest.approx(rows[1, "optimum"]["acceptance"], abs=1e-12)
    assert rows[3, "balanced"]["acceptance"] > rows[1, "single"]["acceptance"]
    assert rows[3, "balanced"]["acceptance"] >= rows[3, "spectr"]["acceptance"] - 1e-9
    assert rows[3, "balanced"]["standard_error"] > 0


def test_a_greedy_target_keeps_what_greedy_decoding_would():
    """Blocks of one drafted token: the same tests, counted by the decoding loop itself."""
    from modelwright.decoding.multi_draft import MultiDraftDecoding

    draft = tiny_model("llama", seed=1, initializer_range=0.3)
    with torch.no_grad():
        draft.lm_head.weight += 0.1 * torch.randn(
            draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    sampling = Sampling(max_new_tokens=30, temperature=0.0)
    table = analyse(TARGET, draft, TOKENIZER, ["abc"], sampling=sampling, num_drafts=(2,))["table"]
    rows = {row["verifier"]: row["acceptance"] for row in table}
    ids = TOKENIZER("abc", return_tensors="pt")
    out = TARGET.generate(**ids, max_new_tokens=30, do_sample=False)
    decode, kept = MultiDraftDecoding(draft, num_drafts=2, draft_length=1), 0
    for at in range(ids["input_ids"].shape[1], out.shape[1]):
        decode.stats.clear()
        prefix = out[:, :at]
        TARGET.generate(
            prefix, attention_mask=torch.ones_like(prefix), max_new_tokens=2, do_sample=False, custom_generate=decode
        )
        kept += decode.stats.by_depth[0][1]
    assert rows["balanced"] == rows["optimum"] == pytest.approx(kept / 30)
    assert 0 < rows["single"] < rows["balanced"] < 1


def test_the_table_by_hand(monkeypatch):
    from modelwright.decoding.multi_draft import analyse as module

    sampling = Sampling(max_new_tokens=4, temperature=1.0)
    seen = []
    along = module.laws_along

    def spy(*args, **keys):
        for pair in along(*args, **keys):
            seen.append(pair)
            yield pair

    monkeypatch.setattr(module, "laws_along", spy)
    found = analyse(TARGET, DRAFT, TOKENIZER, ["abc"], sampling=sampling, num_drafts=(2,))
    rows = {row["verifier"]: row["acceptance"] for row in found["table"]}
    assert rows["spectr"] == pytest.approx(sum(acceptance_probability(p, q, 2, "spectr") for p, q in seen) / len(seen))
    assert rows["optimum"] == pytest.approx(sum(optimal_acceptance(p, q, 2) for p, q in seen) / len(seen))


@pytest.fixture
def models(tmp_path):
    save_model(TARGET, TOKENIZER, tmp_path / "target")
    save_model(DRAFT, TOKENIZER, tmp_path / "draft")
    return tmp_path


def verb(folder, **options):
    options = {"target": str(folder / "target"), "draft": str(folder / "draft"), "prompt": ["hello"], **options}
    return SpeculateAnalyse(output=folder / "out.json", **{"max_new_tokens": 3, "num_drafts": [2], **options})


def test_the_verb_writes_its_table(models):
    (models / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three"}\n')
    result = verb(models, prompts=[str(models / "p.jsonl")], limit=2, measure=True).run(Silent())
    written = json.loads((models / "out.json").read_text())
    assert written["prompts"] == result["prompts"] == 3
    assert 0 < result["acceptance"] <= result["optimum"] <= 1
    assert {row["verifier"] for row in written["table"]} >= {"is", "balanced", "spectr", "specinfer", "optimum"}
    assert written["measured"][0]["verifier"] == "no draft"
    assert all(row["tokens_per_second"] > 0 and row["block_efficiency"] >= 1 for row in written["measured"])
    with pytest.raises(UserError, match="give --force"):
        verb(models).run(Silent())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "no prompts"),
        ({"num_drafts": [0]}, "at least 1, not"),
        ({"draft_temperature": 0.0}, "above 0"),
        ({"lp_size": 50}, "above alphabet_size"),
        ({"temperature": -1.0}, "0 or more"),
        ({"draft_length": 0}, "at least 1 token, not 0"),
    ],
)
def test_the_verb_refuses_what_makes_no_sense(models, options, message):
    with pytest.raises(UserError, match=message):
        verb(models, **options).run(Silent())
    assert not (models / "out.json").exists()


def test_a_draft_of_another_tokenizer_is_refused(models):
    for name, text in (("mine", "some text to learn a tokenizer from"), ("other", "nothing alike: 12345 12345 zyx")):
        save_model(tiny_model("llama", vocab_size=270), train_bpe([text] * 3, 270), models / name)
    with pytest.raises(UserError, match="another tokenizer"):
        verb(models, target=str(models / "mine"), draft=str(models / "other")).run(Silent())
    save_model(tiny_model("llama", vocab_size=300), TOKENIZER, models / "wide")
    with pytest.raises(UserError, match="--pad-vocabulary"):
        verb(models, draft=str(models / "wide")).run(Silent())
    verb(models, draft=str(models / "wide"), pad_vocabulary=True).run(Silent())


def test_options_make_a_decoding_loop(models):
    options = catalog.load("generators", "multi-draft")
    assert options is MultiDraftOptions
    decode = options(
        draft=[str(models / "draft")], num_drafts=3, verifier="spectr", prompt_lookup=True
    ).custom_generate(TARGET, TOKENIZER)
    inputs = TOKENIZER("hello", return_tensors="pt")
    wanted = TARGET.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(TARGET.generate(**inputs, max_new_tokens=6, do_sample=False, custom_generate=decode), wanted)
    assert decode.verifier.method == "spectr"
    with pytest.raises(UserError, match="nothing to draft with"):
        options().custom_generate(TARGET, TOKENIZER)
