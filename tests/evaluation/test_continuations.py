"""Scores of given continuations, MemoTrap and NQ-Swap in their published forms."""

import csv
import json
import math

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from modelwright.decoding.parts import RULED_OUT, Applied, Parts, read_parts
from modelwright.errors import UserError
from modelwright.evaluation import memotrap, nq_swap
from modelwright.evaluation.continuations import Continuation, score_continuations, split
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.memotrap import MemoTrap
from modelwright.verbs.nq_swap import NqSwap

TOKENIZER = byte_tokenizer()
PAIRS = [("a prompt", " x"), ("another, longer prompt ", "and more"), ("", "alone"), ("p", "q")]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_each_text_alone(family, batch_size):
    model = tiny_model(family, seed=1).double()
    with Parts().on(model, TOKENIZER) as applied:
        found = list(score_continuations(applied, [Continuation(*p) for p in PAIRS], batch_size=batch_size))
    for (prompt, text), value in zip(PAIRS, found, strict=True):
        before, more = split(TOKENIZER, prompt, text)
        with torch.no_grad():
            law = model(torch.tensor([before + more])).logits[0].log_softmax(-1)
        expected = sum(float(law[len(before) - 1 + i, token]) for i, token in enumerate(more))
        assert value == pytest.approx(expected, abs=1e-4)


def test_as_lm_eval_cuts_a_prompt_from_its_continuation():
    assert split(TOKENIZER, "ab ", "c") == (TOKENIZER("ab")["input_ids"], TOKENIZER(" c")["input_ids"])


class Difference:
    """With context minus without, both given: what a contrast must be handed."""

    exact = False
    needs_context = True

    def next_token_log_probs(self, model, input_ids, attention_mask, without_context_ids, without_context_mask):
        self.seen = [
            [TOKENIZER.decode(r[m.bool()]) for r, m in zip(ids, mask)]
            for ids, mask in ((input_ids, attention_mask), (without_context_ids, without_context_mask))
        ]
        return model(input_ids=input_ids).logits.float().log_softmax(-1)


def test_a_contrast_gets_both_prompts_with_the_same_end():
    decoder = Difference()
    applied = Applied(tiny_model("llama"), TOKENIZER, decoder)
    pairs = [Continuation("context. why?", " so.", "why?"), Continuation("c. a?", " b", "a?")]
    list(score_continuations(applied, pairs, batch_size=2))
    assert decoder.seen == [["context. why? so", "c. a? "], ["why? so", "a? "]]
    with pytest.raises(UserError, match="without its context, which p:3 has not"):
        list(score_continuations(applied, [Continuation("a", "b", None, "p:3")]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_model(tiny_model("llama", seed=1), TOKENIZER, folder / "model")
    (folder / "data").mkdir()
    for name, size in (("1-proverb-ending", 3), ("2-other", 1)):
        with (folder / "data" / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["prompt", "classes", "answer_index"])
            for i in range(size):
                writer.writerow([f'End in "{i}":\nAs they say {i}', str([f" it's {i}.", " no\n"]), i % 2])
    rows = [
        {"question": f"who is {i // 2}", "org_context": f"It is A{i}.", "org_answer": ["A"],
         "sub_context": f"It is B{i}.", "sub_answer": ["B", "b b"]}
        for i in range(12)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "dev.parquet")
    return folder


def test_memotrap_from_its_files(folder, tmp_path):
    keys = {"model": str(folder / "model"), "data": [str(folder / "data")], "device": "cpu"}
    found = MemoTrap(**keys, output=tmp_path / "a.json", samples=tmp_path / "a.jsonl").run(Silent())
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found["questions"] == {"proverb-ending": 3, "other": 1}
    for row in rows:
        first, second = row["scores"]
        assert row["right"] == ((first > second) == (row["answer_index"] == 0))
    ending = sum(row["right"] for row in rows if row["subset"] == "proverb-ending") / 3
    other = float(rows[3]["right"])
    assert found["macro"] == pytest.approx((ending + other) / 2)
    assert found["micro"] == pytest.approx((3 * ending + other) / 4)
    drafted = MemoTrap(**keys, output=tmp_path / "b.json", batch_size=1, limit=2,
                       with_=["multi-draft: {prompt_lookup: true}"]).run(Silent())  # fmt: skip
    assert drafted["questions"] == {"proverb-ending": 2, "other": 1}


def test_the_published_macro_counts_all_as_a_fifth():
    rows = [{"subset": "a", "right": True}] * 3 + [{"subset": "b", "right": False}]
    assert memotrap.summarise(rows)["macro"] == 0.5
    assert memotrap.summarise(rows, macro_with_all=True)["macro"] == pytest.approx((1 + 0 + 0.75) / 3)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"classes": "[1", "answer_index": 0}, "classes is not a list"),
        ({"classes": "['a']", "answer_index": 0}, "two texts or more"),
        ({"classes": "__import__('os')", "answer_index": 0}, "classes is not a list"),
        ({"classes": "['a', 'b']", "answer_index": 2}, "answer_index is 2"),
        ({"classes": "['a', 'b']", "answer_index": "x"}, "whole number"),
    ],
)
def test_a_bad_row_is_named(row, sentence, folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", **row}) + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:1.*{sentence}"):
        MemoTrap(model=str(folder / "model"), data=[str(tmp_path / "a.jsonl")], output=tmp_path / "o").run(Silent())


def test_nq_swap_from_its_file(folder, tmp_path):
    keys = {"model": str(folder / "model"), "data": [str(folder / "dev.parquet")], "device": "cpu"}
    found = NqSwap(**keys, output=tmp_path / "a.json", shots=2, max_new_tokens=4).run(Silent())
    rows = [json.loads(line) for line in (tmp_path / "a.samples.jsonl").read_text().splitlines()]
    assert found["questions"] == len(rows) == 8  # two questions, four rows, are the examples
    assert rows[0]["prompt"].endswith(
        "Context: It is B0.\nQuestion: who is 0\nAnswer: B\n\nContext: It is B2.\nQuestion: who is 1\nAnswer: B\n\n"
        "Context: It is B4.\nQuestion: who is 2\nAnswer:"
    )
    assert rows[0]["prompt_without_context"] == rows[0]["prompt"].replace("Context: It is B4.\n", "")
    assert found["sub_em"] == 0
    with pytest.raises(UserError, match="fewer --shots"):
        NqSwap(**keys, output=tmp_path / "b.json", shots=6).run(Silent())
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "sub_context": "c"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1 has no 'sub_answer'"):
        NqSwap(**{**keys, "data": [str(tmp_path / "bad.jsonl")]}, output=tmp_path / "b.json").run(Silent())


def test_answers_of_nq_swap_are_scored_by_the_first_line():
    row = {"sub_answer": ["The Beatles"], "org_answer": [["Queen"]]}
    assert nq_swap.score({**row, "completion": " beatles.\nQueen"}) == {
        "sub_em": 1, "sub_contains": 1, "org_em": 0, "org_contains": 0,
    }  # fmt: skip
    assert nq_swap.score({**row, "completion": "the band Queen"})["org_contains"] == 1
    assert nq_swap.score({**row, "completion": ""})["sub_em"] == 0


def test_under_a_context_scores_change_and_come_back():
    model = tiny_model("llama", seed=1)
    pairs = [Continuation("a long prompt " * 4, "end")]
    with Parts().on(model, TOKENIZER) as applied:
        plain = list(score_continuations(applied, pairs))
    with read_parts(["string: {shift: 10, window: 2}"]).on(model, TOKENIZER) as applied:
        assert list(score_continuations(applied, pairs)) != plain
    with Parts().on(model, TOKENIZER) as applied:
        assert list(score_continuations(applied, pairs)) == plain


def test_texts_that_a_method_rules_out_can_still_be_compared():
    model = tiny_model("llama", seed=1)
    with read_parts(["dola: {layers: '0,1', relative_top: 1.0}"]).on(model, TOKENIZER) as applied:
        ids = torch.tensor([TOKENIZER("a prompt")["input_ids"]])
        best = TOKENIZER.decode(model(ids).logits[0, -1].argmax())
        texts = ["xyz", "xy", "x"]
        assert best[:1] not in texts
        scores = list(score_continuations(applied, [Continuation("a prompt", text) for text in texts]))
    assert all(math.isfinite(score) for score in scores)
    assert scores[0] < scores[1] < scores[2] == RULED_OUT


def test_scores_that_are_not_numbers_are_refused():
    model = tiny_model("llama", seed=1)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with Parts().on(model, TOKENIZER) as applied, pytest.raises(UserError, match="are not numbers"):
        list(score_continuations(applied, [Continuation("a prompt", "end")]))
