"""Batches, answers, EWC, O-LoRA and replay: each against what it must be."""

import pytest
import torch
from torch import nn

from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.training.continual import ContinualOptions, Example, Task
from modelwright.training.continual.ewc import ElasticWeights
from modelwright.training.continual.examples import Encoder, answer_loss, correct, fit, normalise
from modelwright.training.continual.similarity import task_overlap
from modelwright.training.continual.tasks import drawn
from modelwright.training.continual.trainer import Passes
from modelwright.training.continual.tuning import Adaptation

ENCODER = Encoder(byte_tokenizer(), 64)


def test_only_answers_are_learnt_and_padding_changes_nothing():
    rows = [ENCODER.row(Example(prompt, answer)) for prompt, answer in (("ab", "yes"), ("a much longer one", "no"))]
    assert [token for token in rows[0]["labels"] if token != -100] == ENCODER.tokenizer(" yes")["input_ids"] + [2]
    batch = ENCODER.batch(rows)
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 21)
    )
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    model = tiny_model("llama").double()

    def loss(chosen, items=None):
        one = ENCODER.batch(chosen)
        return answer_loss(model(one["input_ids"], attention_mask=one["attention_mask"]), one["labels"], items)

    items = [5, 4]  # tokens of " yes" and " no", with the end
    parts = [loss([row]) for row in rows]
    assert torch.allclose(loss(rows), sum(p * n for p, n in zip(parts, items, strict=True)) / 9)
    assert torch.allclose(sum(loss([row], 9) for row in rows), loss(rows))
    reference = model(**ENCODER.batch(rows[:1])).loss
    assert torch.allclose(parts[0], reference)


def test_long_prompts_lose_their_middle():
    short = Encoder(byte_tokenizer(), 10)
    assert short.tokenizer.decode(short.prompt(Example("abcdefghijklmnopqrstuvwxyz", ""))) == "abcdevwxyz"
    tasks = [Task("t", [Example("a" * 600, "yes")], [Example("b", "yes")])]
    encoder, longest = fit(tiny_model("llama"), byte_tokenizer(), tasks, 10_000)
    assert (encoder.max_tokens, longest) == (512 - 5, 5)
    assert len(encoder.row(tasks[0].train[0])["input_ids"]) == 512
    with pytest.raises(UserError, match="do not fit"):
        fit(tiny_model("llama", max_position_embeddings=12), byte_tokenizer(), tasks, 64)
    with pytest.raises(UserError, match="another model's"):
        fit(tiny_model("llama", vocab_size=50), byte_tokenizer(), tasks, 64)


def test_labels_that_differ_in_punctuation_alone_are_refused():
    rows = [Example("x", "1"), Example("y", "-1")]
    with pytest.raises(UserError, match="Task t: .* labels '1' and '-1' are the same"):
        fit(tiny_model("llama"), byte_tokenizer(), [Task("t", rows, rows, ("1", "-1"))], 64)
    fit(tiny_model("llama"), byte_tokenizer(), [Task("t", rows, rows, ("Yes", "yes", "no"))], 64)


def test_a_checkpoints_own_generation_settings_do_not_decide_an_answer():
    model = tiny_model("llama").eval()
    examples = [Example("x" * (3 * i), "?") for i in range(1, 6)]

    def written():
        ids = torch.tensor([ENCODER.prompt(examples[0])])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
        return ENCODER.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    plain = written()
    model.generation_config.repetition_penalty = 1e6
    model.generation_config.no_repeat_ngram_size = 1
    assert written() != plain
    known = [Example(examples[0].prompt, plain)]
    assert correct(model, ENCODER, known, new_tokens=8, batch_size=1) == 1


def test_an_article_is_an_answer():
    assert normalise(" A.\n") == "a"
    assert normalise("Science  or Technology") == normalise("science or technology")
    assert normalise("") != normalise("A")


def test_answers_are_counted_whoever_shares_their_batch():
    model, examples = tiny_model("llama").eval(), [Example("x" * (3 * i), "?") for i in range(1, 6)]
    keys = {"new_tokens": 3, "batch_size": 2}
    assert correct(model, ENCODER, examples, **keys) == 0
    written = []
    for example in examples:
        ids = torch.tensor([ENCODER.prompt(example)])
        out = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
        written.append(ENCODER.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    known = [Example(e.prompt, text) for e, text in zip(examples, written, strict=True)]
    assert correct(model, ENCODER, known, **keys) == 5
    assert correct(model, ENCODER, [*known[:2], *examples[2:]], **keys) == 2


def test_passes_hold_each_row_once():
    data = Passes([{"input_ids": [i]} for i in range(7)], 14, seed=3)
    found = [data[i]["input_ids"][0] for i in range(14)]
    assert sorted(found[:7]) == sorted(found[7:]) == list(range(7))
    assert found[:7] != found[7:]
    assert [data[i]["input_ids"][0] for i in (9, 2)] == [found[9], found[2]]
    assert [Passes(data.rows, 7, seed=4)[i]["input_ids"][0] for i in range(7)] != found[:7]


@pytest.mark.parametrize("order", ["in turn", "sorted"])
def test_a_task_shares_its_rows_with_itself_in_whatever_order_its_classes_come(order):
    rows = [[Example(text * 10, "yes"), Example(other * 10, "no")] * 40 for text, other in (("aa", "99"), ("Zz", "~ "))]
    if order == "sorted":
        rows = [sorted(own, key=lambda row: row.answer) for own in rows]
    tasks = [Task(name, own, own) for name, own in zip(("one", "two"), rows, strict=True)]
    found = task_overlap(tiny_model("llama"), ENCODER, tasks, samples=80)["mean"]
    assert min(found[0][0], found[1][1]) > 0.8
    assert max(found[0][1], found[1][0]) < 0.7


def test_some_rows_are_drawn_once_each_and_by_the_seed():
    rows = list(range(50))
    assert sorted(drawn(rows, 100, 3)) == rows
    assert len(set(drawn(rows, 10, 3))) == 10
    assert drawn(rows, 10, 3) == drawn(rows, 20, 3)[:10] != drawn(rows, 10, 4)


# EWC.


def test_ewc_is_the_sum_of_its_tasks_penalties():
    model = tiny_model("llama").double()
    batches = [[ENCODER.batch([ENCODER.row(Example(f"{t}{i}", "yes"))]) for i in range(3)] for t in "ab"]
    elastic, terms = ElasticWeights(2.0), []
    for task in batches:
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(terms)))
        elastic.add(model, task)
        fisher = {}
        for batch in task:  # by hand: the square of one example's gradient
            model.zero_grad()
            (model(**batch).loss * (batch["labels"] != -100).sum()).backward()
            for name, p in model.named_parameters():
                fisher[name] = fisher.get(name, 0) + p.grad**2 / 3
        terms.append((fisher, {n: p.detach().clone() for n, p in model.named_parameters()}))

    def by_hand():
        return sum((f[n] * (p - w[n]) ** 2).sum() for f, w in terms for n, p in model.named_parameters())

    with torch.no_grad():
        found, expected = [], []
        for step in range(3):
            for p in model.parameters():
                p += 0.1 * step
            found.append(elastic.penalty(model))
            expected.append(by_hand())
    # lambda / 2 = 1; equal but for a constant.
    assert torch.allclose(found[2] - found[0], expected[2] - expected[0], rtol=1e-9)
    assert torch.allclose(found[1] - found[0], expected[1] - expected[0], rtol=1e-9)
    other = ElasticWeights(2.0)
    other.load(elastic.state(), torch.device("cpu"))
    assert torch.equal(other.penalty(model), elastic.penalty(model))


def test_ewc_holds_what_it_holds():
    model = nn.Linear(2, 1, bias=False).double()
    elastic = ElasticWeights(4.0)
    elastic.precision = {"weight": torch.tensor([[3.0, 0.0]]).double()}
    elastic.weighted = {"weight": 3 * torch.tensor([[1.0, 0.0]]).double()}
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 50.0]]))
    elastic.penalty(model).backward()
    assert model.weight.grad.tolist() == [[4 * 3 * (2 - 1), 0]]


# Adapters.


def options(**keys):
    return ContinualOptions(steps=1, **keys)


def nudged(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_incremental_adapters_are_merged_and_the_base_is_frozen_meanwhile(family):
    ids = torch.randint(3, 259, (2, 9))
    model, adaptation = tiny_model(family), Adaptation(options(tuning="inc-lora"))
    for task in range(2):
        wrapped = adaptation.begin(model, task)
        trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)
        assert not any("head" in name for name in trained)
        before = wrapped(ids).logits
        nudged(wrapped)
        after = wrapped(ids).logits
        assert not torch.allclose(before, after)
        model = adaptation.end(wrapped, last=False)
        assert torch.allclose(model(ids).logits, after, atol=1e-4)
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert all(p.requires_grad for p in model.parameters())


def test_one_adapter_stays_until_the_end():
    model, adaptation = tiny_model("llama"), Adaptation(options(tuning="lora", lora_targets=("q_proj",)))
    wrapped = adaptation.begin(model, 0)
    assert adaptation.begin(adaptation.end(wrapped, last=False), 1) is wrapped
    assert {n.split(".")[-4] for n, p in wrapped.named_parameters() if p.requires_grad} == {"q_proj"}
    assert adaptation.end(wrapped, last=True) is model


def test_o_lora_penalises_overlap_with_all_earlier_adapters():
    adaptation = Adaptation(options(tuning="o-lora", orthogonality=0.3))
    model, downs = tiny_model("llama"), []
    for task in range(3):
        wrapped = adaptation.begin(model, task)
        now = {n.split(".lora_A")[0]: p for n, p in wrapped.named_parameters() if "lora_A" in n}
        penalty = adaptation.penalty(wrapped)
        if task == 0:
            assert penalty is None
        else:
            expected = 0.3 * sum((old[name] @ a.T).abs().sum() for old in downs for name, a in now.items())
            assert torch.allclose(penalty, expected)
            penalty.backward()
            assert all(p.grad is not None for p in now.values())
        downs.append({name: a.detach().clone() for name, a in now.items()})
        model = adaptation.end(nudged(wrapped), last=task == 2)
    again = Adaptation(options(tuning="o-lora"))
    again.load(adaptation.state())
    assert again.earlier.keys() == adaptation.earlier.keys()
    assert next(iter(again.earlier.values())).shape == (24, 32)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tuning": "lorra"}, "no tuning 'lorra'"),
        ({"replay": 1.5}, "between 0 and 1"),
        ({"ewc": -1.0}, "ewc must be 0 or more"),
        ({"ewc": 1.0, "tuning": "o-lora"}, "use full or lora"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"max_tokens": 3}, "at least 8"),
        ({"new_tokens": 0}, "at least 1 token"),
        ({"batch_size": 0}, "greater than 0"),
        ({"epochs": 1.0}, "how long"),
    ],
)
def test_options_that_make_no_sense(keys, message):
    with pytest.raises(UserError, match=message):
        options(**keys).check()


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"LoRA cannot be put on this model.*nothing"):
        Adaptation(options(tuning="lora", lora_targets=("nothing",))).begin(tiny_model("llama"), 0)
