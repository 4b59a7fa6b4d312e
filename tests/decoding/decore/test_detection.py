import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.decore.decore_cases import ATTENTION, TOKENIZER, make
from forked import modelwright
from modelwright.attention.string import StringConfig, apply_string
from modelwright.decoding.decore import HeadScores, Needle, RetrievalHeadScorer
from modelwright.decoding.decore.detection import Sample, copy_scores, eager, strongest, unigram_recall
from modelwright.errors import UserError
from modelwright.models.heads import fingerprint
from modelwright.models.loading import save_model
from modelwright.models.tiny import tiny_model
from modelwright.progress import Silent
from modelwright.verbs.heads_detect import HeadsDetect

NEEDLE = Needle("The dog of Fozabu is called Rex.", "What is the dog of Fozabu called?", "Rex")
HAY = "It rained all day. The sun shone at night. Nobody came. " * 4


@pytest.mark.parametrize("form", ["set", "steps"])
def test_one_perfect_copying_head_scores_exactly_one_and_others_nothing(form):
    prompt = [5, 6, 7, 8, 9, 10, 11]
    start, end = 2, 6
    written = prompt[start:end]
    attention = torch.zeros(len(written), 3, 4, len(prompt))
    attention[..., 0] = 1.0  # everyone looks at the first token ...
    for step in range(len(written)):
        attention[step, 1, 2] = torch.nn.functional.one_hot(torch.tensor(start + step), len(prompt))
        # ... one head at the needle, but never at the token that is written,
        attention[step, 0, 1] = torch.nn.functional.one_hot(torch.tensor(start + (step + 1) % 4), len(prompt))
        # ... and one at a token of the same kind outside of the needle.
    looked = torch.stack([strongest([a[None, :, None] for a in step], 3, len(prompt)) for step in attention])
    found = copy_scores(looked, written, prompt, start, end, form)
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    wanted[1, 2] = 1
    assert torch.equal(found, wanted)


def test_the_two_forms_differ_where_a_token_is_copied_twice():
    prompt, looked = [3, 4, 4, 5], torch.tensor([1, 1, 2, 2, 3])[:, None, None]
    assert float(copy_scores(looked, [4, 4, 4, 4, 5], prompt, 1, 4, "set")) == 1.0
    assert float(copy_scores(looked, [4, 4, 4, 4, 5], prompt, 1, 4, "steps")) == 1.0  # 5/3, held to 1
    assert float(copy_scores(looked, [4, 9, 9, 9, 9], prompt, 1, 4, "set")) == 0.5
    assert float(copy_scores(looked, [4, 9, 9, 9, 9], prompt, 1, 4, "steps")) == pytest.approx(1 / 3)
    # The same token elsewhere in the prompt is no hit.
    assert float(copy_scores(torch.tensor([0])[:, None, None], [4], [4, 4], 1, 2, "set")) == 0.0
    assert float(copy_scores(torch.zeros(0, 1, 1, dtype=torch.long), [], prompt, 1, 4)) == 0.0
    with pytest.raises(UserError, match="The needle is not in the prompt"):
        copy_scores(looked, [4] * 5, prompt, 2, 5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_scores_against_the_definition(seed):
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 5, (9,), generator=draw).tolist()
    written = torch.randint(0, 5, (6,), generator=draw).tolist()
    looked = torch.randint(0, 12, (6, 2, 3), generator=draw)
    for layer in range(2):
        for head in range(3):
            copied = [
                token for step, token in enumerate(written)
                if 3 <= (j := int(looked[step, layer, head])) < 7 and prompt[j] == token
            ]  # fmt: skip
            needle = set(prompt[3:7])
            assert float(copy_scores(looked, written, prompt, 3, 7)[layer, head]) == pytest.approx(
                len(set(copied) & needle) / len(needle)
            )
            steps = copy_scores(looked, written, prompt, 3, 7, "steps")[layer, head]
            assert float(steps) == pytest.approx(min(1, len(copied) / 4))


def test_recall_is_that_of_rouge():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"], use_stemmer=False)
    for reference, text in (
        ("boiled plums, brown bread", "Plums and bread."), ("a b b c", "b b b"), ("x", ""), ("Rex", "It is rex!")
    ):  # fmt: skip
        assert unigram_recall(reference, text) == pytest.approx(scorer.score(reference, text)["rouge1"].recall)


@pytest.mark.parametrize("family", ATTENTION)
def test_positions_are_exact_and_scores_are_those_of_the_models_own_weights(family):
    model = make(family, max_position_embeddings=512)
    own = model.config._attn_implementation
    scorer = RetrievalHeadScorer(model, TOKENIZER, new_tokens=4, least_recall=0.0)
    for probe in scorer.probes([HAY], [NEEDLE], [230, 260], 3):
        assert TOKENIZER.decode(probe.ids[probe.start : probe.end]).strip() == "Rex"
        assert len(probe.ids) <= probe.cell[0]
        text = TOKENIZER.decode(probe.ids)
        assert text.count(NEEDLE.text) == 1
        assert text.endswith(f"Question: {NEEDLE.question}\nAnswer:")
    sample = scorer.run(probe)
    assert model.config._attn_implementation == own
    ids = torch.tensor([probe.ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    said = out[0, len(probe.ids) :].tolist()
    said = said[: next((i + 1 for i, t in enumerate(said) if "\n" in TOKENIZER.decode([t])), 4)]
    with eager(model), torch.no_grad():
        weights = model(out[:, :-1], output_attentions=True, use_cache=False).attentions
    looked = torch.stack([
        torch.stack([w[0, :, len(probe.ids) - 1 + step].argmax(-1) for w in weights]) for step in range(len(said))
    ])  # fmt: skip
    wanted = copy_scores(looked, said, probe.ids, probe.start, probe.end)
    assert sample.scores == wanted.tolist()


def test_depths_are_where_they_should_be():
    scorer = RetrievalHeadScorer(make(), TOKENIZER, new_tokens=4)
    first, middle, last = (probe.start for probe in scorer.probes([HAY], [NEEDLE], [400], 3))
    begin = len(scorer._around(NEEDLE)[0])
    assert first == begin + len(" The dog of Fozabu is called")
    # To the nearest sentence, of which the longest has 25 tokens.
    assert last - first > 200
    assert abs((middle - first) - (last - first) / 2) <= 13


def test_a_trained_copier_is_found_and_kept_samples_are_those_that_were_right():
    scorer = RetrievalHeadScorer(make(), TOKENIZER)
    right = Sample((1, 0.0, 0, 0), 0.8, [[0, 0, 0, 0], [0, 1.0, 0, 0.2]], "Rex")
    wrong = Sample((1, 0.0, 0, 0), 0.5, [[1.0] * 4] * 2, "no")
    found = scorer.collect([right, wrong], {"lengths": [1]})
    assert found.samples == 1
    assert found.top(2) == [(1, 1), (1, 3)]
    assert found.settings["asked"] == 2
    assert found.fingerprint == fingerprint(scorer.model)
    with pytest.raises(UserError, match=r"None of 1 answers .* Such as: 'no'"):
        scorer.collect([wrong])


def test_what_is_refused():
    model = make()
    scorer = RetrievalHeadScorer(model, TOKENIZER, new_tokens=4)
    with pytest.raises(UserError, match="does not have its answer 'Max' in it"):
        scorer.probes([HAY], [Needle("The dog is Rex.", "?", "Max")], [300])
    with pytest.raises(UserError, match="do not fit a prompt of 50 tokens"):
        scorer.probes([HAY], [NEEDLE], [50])
    with pytest.raises(UserError, match="beyond the 512 positions"):
        scorer.probes([HAY], [NEEDLE], [511])
    with pytest.raises(UserError, match="no text in it"):
        scorer.probes(["  "], [NEEDLE], [300])
    with pytest.raises(UserError, match="Depths must lie between 0 and 1"):
        scorer.probes([HAY], [NEEDLE], [300], [1.5])
    with pytest.raises(UserError, match="no form 'sum'"):
        RetrievalHeadScorer(model, TOKENIZER, form="sum")
    with pytest.raises(UserError, match="no attention weights"):
        strongest(None, 2, 9)
    with pytest.raises(UserError, match="no attention weights"):
        strongest((None, None), 2, 9)
    with apply_string(model, StringConfig(shift=64, window=8)), pytest.raises(UserError, match="leave its context"):
        scorer.run(scorer.probes([HAY], [NEEDLE], [300], 1)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(make(max_position_embeddings=512), TOKENIZER, path)
    return path


KEYS = {"lengths": 2, "depths": 2, "new_tokens": 3, "least_recall": 0.0}


def test_the_verb_writes_scores_that_its_model_takes(tmp_path, folder):
    (tmp_path / "hay.txt").write_text(HAY)
    (tmp_path / "needles.jsonl").write_text(
        json.dumps({"text": NEEDLE.text, "question": NEEDLE.question, "answer": "Rex"}) + "\n"
        + json.dumps({"text": "A cat sat.", "needle": "", "question": "Who sat?", "real_needle": "cat"}) + "\n"
    )  # fmt: skip
    out = tmp_path / "heads.json"
    verb = HeadsDetect(
        model=str(folder), output=out, haystack=[str(tmp_path / "hay.txt")], needles=[str(tmp_path / "needles.jsonl")],
        **KEYS,
    )  # fmt: skip
    summary = verb.run(Silent())
    assert summary["prompts"] == 8
    assert len(summary["top"]) == 8
    found = HeadScores.load_json(out, make(max_position_embeddings=512))
    assert found.samples == 8
    assert found.settings["needles"] == 2
    with pytest.raises(UserError, match="exists already"):
        verb.run(Silent())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, folder):
    class Stop(Silent):
        done = 0

        def advance(self, units=1, note=""):
            self.done += units
            if self.done == 5:
                raise KeyboardInterrupt

    whole = HeadsDetect(model=str(folder), output=tmp_path / "whole.json", **KEYS)
    whole.run(Silent())
    cut = HeadsDetect(model=str(folder), output=tmp_path / "cut.json", **KEYS)
    with pytest.raises(KeyboardInterrupt):
        cut.run(Stop())
    partial = tmp_path / "cut.json.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 6
    with partial.open("a") as stream:
        stream.write('{"cell": [1')  # half a line, as a kill may leave it
    with pytest.raises(UserError, match="other options"):
        HeadsDetect(model=str(folder), output=tmp_path / "cut.json", **{**KEYS, "new_tokens": 2}).run(Silent())
    seen = []

    class Watch(Silent):
        def message(self, text):
            seen.append(text)

    cut.run(Watch())
    assert seen[0] == "5 of 12 prompts were done before."
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not partial.exists()


def test_a_run_without_one_right_answer_leaves_what_was_measured_and_says_so(tmp_path, folder):
    verb = HeadsDetect(model=str(folder), output=tmp_path / "x.json", **{**KEYS, "least_recall": 0.9})
    with pytest.raises(UserError, match="None of 12 answers"):
        verb.run(Silent())
    assert not (tmp_path / "x.json").exists()


@pytest.mark.slow
def test_the_command(tmp_path, folder):
    done = modelwright(
        *["heads", "detect", "--model", folder, "--output", tmp_path / "h.json"],
        *["--lengths", "1", "--depths", "1", "--new-tokens", "2", "--least-recall", "0"],
    )
    assert done.returncode == 0, done.stderr
    assert "layer   0, head" in done.stdout + done.stderr


def test_a_model_that_was_trained_with_another_attention_is_refused():
    from modelwright.attention.rope_alibi import RopeAlibiConfig

    model = tiny_model("llama")
    RopeAlibiConfig().install(model)  # its weights are not those of the eager attention
    with pytest.raises(UserError, match="changed this model's attention"), eager(model):
        pass
