"""lm-eval through methods: bit for bit lm-eval's own model where there is none."""

import json

import pytest
import torch

from modelwright.decoding.parts import Part, Parts, read_parts
from modelwright.errors import UserError
from modelwright.evaluation.harness import evaluate_tasks, find_tasks
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from modelwright.evaluation.harness_model import MethodLM

TOKENIZER = byte_tokenizer()
PAIRS = [("one and one is", " two"), ("", " alone"), ("a much longer text before it", " x"), ("a", "bcdefg\nh")]
TEXTS = ["a text", "another that is longer than the window " * 4, "x"]
PROMPTS = [
    ("some prompt", {"until": ["e"], "max_gen_toks": 12}),
    ("another, longer one", {"until": ["\n", "z"], "max_gen_toks": 12}),
    ("x", {"until": ["e"], "max_gen_toks": 12}),
]


def attentive():
    model = tiny_model("llama", seed=3)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj):
                projection.weight.mul_(12)
        model.lm_head.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def model():
    return attentive()


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def answers(lm):
    return (
        lm.loglikelihood(requests("loglikelihood", PAIRS)),
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS])),
        lm.generate_until(requests("generate_until", PROMPTS)),
    )


def make(cls, model, *methods, batch_size=1, **keys):
    if methods:
        keys["methods"] = read_parts(methods)
    return cls(pretrained=model, tokenizer=TOKENIZER, batch_size=batch_size, max_length=64, device="cpu", **keys)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_without_a_method_it_is_lm_evals_own_model_bit_for_bit(model, batch_size):
    theirs = answers(make(HFLM, model, batch_size=batch_size))
    assert answers(make(MethodLM, model, batch_size=batch_size)) == theirs
    drafted = answers(make(MethodLM, model, "multi-draft: {prompt_lookup: true}", batch_size=batch_size))
    assert drafted == theirs  # a method with the model's own law, here greedy


def test_under_a_context_it_is_lm_evals_own_model_under_it(model):
    from modelwright.attention.string import StringConfig, apply_string

    theirs = make(HFLM, model)
    plain = answers(theirs)
    with apply_string(model, StringConfig(shift=8, window=2)):
        inside = answers(theirs)
    ours = make(MethodLM, model, "string: {shift: 8, window: 2}")
    assert answers(ours) == inside != plain
    ours.close()
    assert answers(theirs) == plain


class Flat:
    """A law that is the model's at another temperature: no method of ours, so a reference is easy."""

    exact = False

    def next_token_log_probs(self, model, input_ids, attention_mask):
        return (model(input_ids=input_ids, attention_mask=attention_mask).logits.float() / 3).log_softmax(-1)

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        going = torch.ones(len(input_ids), dtype=torch.bool)
        given = inputs["attention_mask"]
        mask = torch.ones_like(input_ids) if given is None else given
        while going.any():
            scores = -model(input_ids=input_ids, attention_mask=mask).logits[:, -1]  # the least probable token
            token = scores.argmax(-1)
            input_ids = torch.cat([input_ids, token[:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(token)[:, None]], 1)
            going &= ~stopping_criteria(input_ids, None)
        return input_ids


class FlatOptions:
    def custom_generate(self, model, tokenizer):
        return Flat()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_method_with_a_law_of_its_own_scores_by_it(model, batch_size):
    parts = Parts(generator=Part("generators", "flat", FlatOptions()))
    likelihoods, rolling, texts = answers(make(MethodLM, model, batch_size=batch_size, methods=parts))

    @torch.no_grad()
    def score(before, after):
        ids = TOKENIZER(before)["input_ids"] or [TOKENIZER.bos_token_id]
        more = TOKENIZER(after)["input_ids"]
        whole = torch.tensor([ids + more])
        law = (model(whole).logits[0].double() / 3).log_softmax(-1)
        at = range(len(ids) - 1, whole.shape[1] - 1)
        return sum(float(law[i, whole[0, i + 1]]) for i in at), all(law[i].argmax() == whole[0, i + 1] for i in at)

    for (before, after), (value, greedy) in zip(PAIRS, likelihoods, strict=True):
        expected = score(before, after)
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    assert rolling[0] == pytest.approx(score("", TEXTS[0])[0], abs=1e-4)
    plain = answers(make(HFLM, model))
    assert all(abs(a - b) > 0.1 for a, b in zip(rolling, plain[1]))
    assert texts != plain[2]


def test_what_shares_a_batch_changes_no_score_of_a_law_that_looks_at_whole_texts(model):
    alone = [
        make(MethodLM, model, "activation-decoding: {relative_top: null}").loglikelihood(
            requests("loglikelihood", [pair])
        )[0]
        for pair in PAIRS
    ]
    lm = make(MethodLM, model, "activation-decoding: {relative_top: null}", batch_size=4)
    for (together, _), (single, _) in zip(lm.loglikelihood(requests("loglikelihood", PAIRS)), alone, strict=True):
        assert together == pytest.approx(single, abs=1e-4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": f"{i}+{i}=", "choices": [str(2 * i), str(i)], "gold": i % 2} for i in range(6)]
    (folder / "add.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "add.jsonl"}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
    (folder / "add.yaml").write_text(
        "task: my_choice\noutput_type: multiple_choice\n" + common
        + 'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n'
    )  # fmt: skip
    (folder / "write.yaml").write_text(
        "task: my_text\noutput_type: generate_until\n" + common
        + 'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match}]\n"
    )  # fmt: skip
    (folder / "lost.yaml").write_text(
        "task: my_lost\noutput_type: generate_until\n" + common.replace("add.jsonl", "gone.jsonl")
        + 'doc_to_target: "{{choices[0]}}"\nmetric_list: [{metric: exact_match}]\n'
    )  # fmt: skip
    return folder


def test_tasks_of_the_users_own(model, tasks):
    import lm_eval

    found = evaluate_tasks(model, TOKENIZER, ["my_choice", "my_text"], include_path=[tasks], batch_size=2, limit=4)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=2, device="cpu"), tasks=["my_choice", "my_text"],
        task_manager=find_tasks(["my_choice"], [tasks]), bootstrap_iters=0, limit=4,
    )  # fmt: skip
    assert found["results"]["my_choice"]["acc,none"] == theirs["results"]["my_choice"]["acc,none"]
    for ours, own in zip(found["samples"]["my_choice"], theirs["samples"]["my_choice"], strict=True):
        assert [list(map(float, r[0][:1])) for r in ours["resps"]] == [[r[0][0]] for r in own["resps"]]
    assert json.loads(json.dumps(found)) == found


def test_tasks_are_abilities_of_a_sequence_of_edits(model, tasks):
    """On the live model, with its edits on it, through our own adapter."""
    from modelwright.editing.editor import make_editor
    from modelwright.editing.requests import EditRequest
    from modelwright.evaluation.asking import Layout
    from modelwright.evaluation.editing_evaluation import SequentialEditing
    from modelwright.evaluation.editing_evaluation.abilities import LmEvalTasks

    ability = LmEvalTasks(TOKENIZER, ("my_choice", "my_text"), limit=4, batch_size=2, include_path=(str(tasks),))
    # The first four sums are answered 0, 2, 4, 6; the choice that is right has the number i % 2.
    asked = [EditRequest("{}=", f"{i}+{i}", str(2 * i)) for i in range(4)]

    def run(editor):
        return SequentialEditing(
            model=model, tokenizer=TOKENIZER, editor=editor, requests=asked, checkpoints=[0, 4], batch_size=4,
            neutral=["a text"], layout=Layout(kind="raw", new_tokens=2),
        ).run({"lm_eval": ability})  # fmt: skip

    options = {"layer": 1, "learning_rate": 0.05, "steps": 60, "stop_loss": 1e-3}
    before, after = (state["lm_eval"] for state in run(make_editor("ft-m", options)))
    assert before["my_text.exact_match,none"] == 0
    assert set(before) == {"my_choice.acc,none", "my_text.exact_match,none"}
    assert before == ability_of(model, ability)
    edit = make_editor("ft-m", options).fit(model, TOKENIZER, asked)
    with edit.applied(model):
        plain = evaluate_tasks(model, TOKENIZER, ["my_choice"], include_path=[tasks], limit=4, batch_size=2)
    assert after["my_choice.acc,none"] == plain["results"]["my_choice"]["acc,none"]
    assert after["my_choice.acc,none"] == 0.5  # what was written, 2 i, is the right choice of the even ones
    with pytest.raises(UserError, match="in-context edits cannot be put"):
        run(make_editor("ice"))
    with pytest.raises(UserError, match="no folder of task files"):
        LmEvalTasks(TOKENIZER, ("my_text",), include_path=("nowhere",))


def ability_of(model, ability):
    from modelwright.evaluation.editing_evaluation.sequence import State

    return ability(State(0, model, [], [], {}))


def test_the_verb(model, tasks, tmp_path):
    from modelwright.verbs.evaluate import Evaluate

    save_model(model, TOKENIZER, tmp_path / "model")
    keys = {"model": str(tmp_path / "model"), "tasks": ["my_text,my_choice"], "include_path": [str(tasks)]}
    found = Evaluate(**keys, output=tmp_path / "r.json", samples=tmp_path / "s.jsonl",
                     with_=["multi-draft: {prompt_lookup: true}"], limit=2).run(Silent())  # fmt: skip
    assert set(found["results"]) == {"my_text", "my_choice"}
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["method"] == "multi-draft"
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 4
    with pytest.raises(UserError, match="exists already"):
        Evaluate(**keys, output=tmp_path / "r.json").run(Silent())


def test_faults(model, tasks, monkeypatch):
    import sys

    with pytest.raises(UserError, match="no folder of task files"):
        find_tasks(["my_text"], ["nowhere"])
    with pytest.raises(UserError, match=r"my_lost.*cannot be loaded.*data set"):
        evaluate_tasks(model, TOKENIZER, ["my_lost"], include_path=[tasks])
    with pytest.raises(UserError, match="no tasks"):
        find_tasks([])

    class NeedsContext(FlatOptions):
        def custom_generate(self, model, tokenizer):
            found = Flat()
            found.needs_context = True
            return found

    parts = Parts(generator=Part("generators", "cad", NeedsContext()))
    with pytest.raises(UserError, match="without its context"):
        evaluate_tasks(model, TOKENIZER, ["my_text"], include_path=[tasks], parts=parts)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"modelwright\[lm-eval\]"):
        find_tasks(["my_text"], [tasks])


@pytest.mark.slow
def test_an_unknown_task_is_named_with_what_is_near():
    with pytest.raises(UserError, match="no task 'ifevl': did you mean"):
        find_tasks(["ifevl"])
