"""SERAC as a user has it, by the commands: trained, fitted, used while generating, in a sequence and under lm-eval."""

import itertools
import json

import pytest
import torch

from editing.small_facts import TOKENIZER, requests, trained
from modelwright.decoding.generate import Sampling, generate
from modelwright.decoding.parts import read_parts
from modelwright.editing import load_edit, make_editor
from modelwright.editing.checkpoint import says_target
from modelwright.editing.edit import edits_on
from modelwright.evaluation.asking import Layout
from modelwright.evaluation.editing_evaluation import SequentialEditing
from modelwright.models.loading import save_model
from modelwright.models.tiny import tiny_model
from modelwright.progress import Silent
from modelwright.verbs.edit import EditModel
from modelwright.verbs.edit_sequence import EditSequence
from modelwright.verbs.edit_train import EditTrain
from modelwright.verbs.generate import Generate

pytestmark = pytest.mark.slow

ASKED = requests()
WRITTEN = 4
PROMPTS = [text for r in ASKED for text in (r.text, *r.paraphrase_texts())]
RIGHT = [r.target if i < WRITTEN else r.old_answer for i, r in enumerate(ASKED) for _ in range(2)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serac")
    save_model(trained(), TOKENIZER, folder / "model")
    save_model(tiny_model("llama", seed=5, vocab_size=len(TOKENIZER)), TOKENIZER, folder / "small")
    write(folder / "facts.jsonl", [r.to_dict() for r in ASKED])
    write(folder / "asked.jsonl", [{"prompt": text} for text in PROMPTS])
    options = {"steps": 300, "accumulate": 2, "learning_rate": 3e-3, "edit_weight": 1.0, "others": 2}
    EditTrain(
        method="serac", model=str(folder / "model"), requests=[str(folder / "facts.jsonl")], output=folder / "serac",
        set={"small": str(folder / "small"), **options},
    ).run(Silent())  # fmt: skip
    result = EditModel(
        model=str(folder / "model"), method="serac", requests=[str(folder / "facts.jsonl")], limit=WRITTEN,
        output=folder / "edit", as_delta=True, set={"trained": str(folder / "serac")},
    ).run(Silent())  # fmt: skip
    assert (result["says_target_before"], result["says_target_after"]) == (0, WRITTEN)
    return folder


@pytest.mark.parametrize("options", [{}, {"cache": "saq: {group_size: 8, segment_length: 8}"}])
def test_generating_with_the_folder_a_cache_and_padded_batches(folder, tmp_path, options):
    Generate(
        model=str(folder / "model"), prompts=[str(folder / "asked.jsonl")], output=tmp_path / "out.jsonl",
        with_=[str(folder / "edit")], max_new_tokens=3, batch_size=5, compare=True, **options,
    ).run(Silent())  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["completion"].split()[0] for row in rows] == RIGHT
    if not options:
        model, edit, keys = trained(), load_edit(folder / "edit"), {"max_new_tokens": 3, "do_sample": False}
        for prompt, row in zip(PROMPTS, rows):
            ids = TOKENIZER(prompt, return_tensors="pt")
            with edit.applied(model):
                alone = model.generate(**ids, **keys, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
            assert row["completion"].split() == TOKENIZER.decode(alone, skip_special_tokens=True).split()
        assert all(row["completion"] == row["plain"] for row in rows[2 * WRITTEN :])


def test_whether_it_says_a_target_is_asked_without_showing_the_target(folder):
    """What an edit is kept as, and what a prompt with its answer is, are one text: that would always be in scope."""
    edit = load_edit(folder / "edit")
    edit.threshold = 0.999
    model = trained()
    assert edit.scope(model, [f"{ASKED[0].text} {ASKED[0].target}"])[1].tolist() == [0]
    assert edit.scope(model, [ASKED[0].text])[1].tolist() == [-1]
    with edit.applied(model):
        assert not any(says_target(model, TOKENIZER, ASKED[:WRITTEN], edit=edit))


def test_a_killed_sequence_goes_on_and_has_one_small_model(folder, tmp_path):
    def sequence(path):
        editor = make_editor("serac", {"trained": str(folder / "serac")})
        return SequentialEditing(
            model=trained(), tokenizer=TOKENIZER, editor=editor, requests=ASKED[:WRITTEN], checkpoints=[1, 3, 4],
            neutral=["Therefore a tea . You and I ."], layout=Layout(kind="raw", new_tokens=2), folder=path,
        )  # fmt: skip

    whole = sequence(tmp_path / "a").run()
    assert [state["retention"]["all"] for state in whole] == [1.0, 1.0, 1.0]
    cut = sequence(tmp_path / "b")
    for _ in itertools.islice(cut, 2):  # killed while the second state was being looked at
        pass
    cut.restore()
    again = sequence(tmp_path / "b")
    for state in again:
        assert state.edits[-1].requests == tuple(ASKED[: state.n])
    assert again.states == whole
    again.restore()
    assert not edits_on(trained())
    files = [path / "states" / f"{n:05d}" / "parts" for path in (tmp_path / "a", tmp_path / "b") for n in (1, 3, 4)]
    weights = [file / "small" / "model.safetensors" for file in [folder / "serac", *files]]
    assert len({file.stat().st_ino for file in weights}) == 1


def test_parts_that_are_elsewhere_are_copied_or_written(folder, tmp_path, monkeypatch):
    from modelwright.editing.serac import parts as module

    def refuse(*_):
        raise OSError("another disk")

    monkeypatch.setattr(module.os, "link", refuse)
    editor = make_editor("serac", {"trained": str(folder / "serac")})
    edit = editor.fit(trained(), TOKENIZER, ASKED[:1])
    edit.save(tmp_path / "copied")
    edit.parts.folder = tmp_path / "gone"
    edit.save(tmp_path / "written")
    module._in_memory.clear()
    for name in ("copied", "written"):
        loaded = load_edit(tmp_path / name)
        assert loaded.parts is not editor.parts
        assert loaded.parts.identity == editor.parts.identity
        module._in_memory.clear()


@pytest.mark.parametrize("threshold", [0.5, 0.999])
def test_under_lm_eval_neither_padding_nor_answers_are_read(folder, tmp_path, threshold):
    """At the higher threshold no prompt is in scope, but each with its new answer would be."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from modelwright.evaluation.harness_model import MethodLM

    model, edit = trained(), load_edit(folder / "edit")
    edit.threshold = threshold
    edit.save(tmp_path / "edit")
    right = RIGHT if threshold == 0.5 else [r.old_answer for r in ASKED for _ in range(2)]
    pairs = [(text, f" {answer} .") for text in PROMPTS for answer in ("Oslo", "Lima")]

    def asked(batch_size):
        parts = read_parts([str(tmp_path / "edit")])
        lm = MethodLM(
            pretrained=model, methods=parts, tokenizer=TOKENIZER, batch_size=batch_size, max_length=64, device="cpu"
        )
        scores = lm.loglikelihood(
            [Instance(request_type="loglikelihood", doc={}, arguments=a, idx=i) for i, a in enumerate(pairs)]
        )
        texts = lm.generate_until([
            Instance(
                request_type="generate_until", doc={}, arguments=(t, {"until": ["."], "max_gen_toks": 2}), idx=i
            )
            for i, t in enumerate(PROMPTS)
        ])  # fmt: skip
        lm.close()
        return scores, texts

    scores, texts = asked(1)
    padded, padded_texts = asked(6)
    assert [text.split()[0] for text in texts] == [text.split()[0] for text in padded_texts] == right
    assert torch.allclose(torch.tensor([s for s, _ in scores]), torch.tensor([s for s, _ in padded]), atol=1e-4)
    for (text, answer), (score, _) in zip(pairs, scores):
        ids, tail = TOKENIZER(text)["input_ids"], TOKENIZER(answer)["input_ids"]
        inside = int(edit.scope(model, [text])[1])
        with torch.no_grad():
            if inside < 0:
                logits = model(torch.tensor([ids + tail])).logits[0]
            else:
                logits = edit.parts.logits(TOKENIZER, [ASKED[inside]], [ids + tail], len(TOKENIZER), model.device)[0]
        log_p = logits[len(ids) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(log_p.gather(1, torch.tensor(tail)[:, None]).sum()), abs=1e-3)


def test_a_sequence_by_the_command_with_tasks_of_lm_eval(folder, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"text": r.text, "home": r.target, "was": r.old_answer} for r in ASKED[:WRITTEN]]
    write(tmp_path / "homes.jsonl", rows)
    (tmp_path / "homes.yaml").write_text(
        f"task: homes\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'homes.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: '{{[home, was]}}'\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    said = EditSequence(
        model=str(folder / "model"), requests=[str(folder / "facts.jsonl")], output=tmp_path / "out",
        methods=["serac"], checkpoints=[f"2,{WRITTEN}"], tasks=["homes"], include_path=[str(tmp_path)], limit=4,
        options={"serac.trained": str(folder / "serac")}, layout="raw", batch_size=4,
    ).run(Silent())  # fmt: skip
    states = json.loads((tmp_path / "out" / "sequence.json").read_text())["states"]["serac"]
    assert [state["lm_eval"]["homes.acc,none"] for state in states] == [0.0, 0.5, 1.0]
    assert [state["retention"]["all"] for state in states] == [None, 1.0, 1.0]
    assert said["output"] == str(tmp_path / "out")


def test_a_delta_of_mend_too(folder, tmp_path):
    EditTrain(
        method="mend", model=str(folder / "model"), requests=[str(folder / "facts.jsonl")], output=tmp_path / "mend",
        set={"rank": 4, "steps": 4, "accumulate": 2, "rate": 3.0, "init_sign": -1},
    ).run(Silent())  # fmt: skip
    EditModel(
        model=str(folder / "model"), method="mend", requests=[str(folder / "facts.jsonl")], limit=1,
        output=tmp_path / "edit", as_delta=True, set={"trained": str(tmp_path / "mend")},
    ).run(Silent())  # fmt: skip
    model, edit = trained(), load_edit(tmp_path / "edit")
    with edit.applied(model):
        found = list(generate(model, TOKENIZER, PROMPTS, Sampling(max_new_tokens=2), batch_size=3))
    by_hand = [one[0].text for one in found]
    Generate(
        model=str(folder / "model"), prompts=[str(folder / "asked.jsonl")], output=tmp_path / "out.jsonl",
        with_=[str(tmp_path / "edit")], max_new_tokens=2, batch_size=5, compare=True,
    ).run(Silent())  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == by_hand
    assert any(row["completion"] != row["plain"] for row in rows)


def test_the_cross_encoder_is_trained(folder, tmp_path):
    from transformers import BertConfig, BertModel

    from modelwright.models.tiny import seeded

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with seeded(0):
        bert = BertModel(BertConfig(vocab_size=len(TOKENIZER), **shape))
    save_model(bert, TOKENIZER, tmp_path / "bert")
    elsewhere = ["Therefore a tea .", "You and I .", "Because I likes tea ."]
    write(tmp_path / "elsewhere.jsonl", [{"text": text} for text in elsewhere])
    options = {"steps": 120, "accumulate": 2, "learning_rate": 1e-2, "edit_weight": 1.0, "others": 2}
    EditTrain(
        method="serac", model=str(folder / "model"), requests=[str(folder / "facts.jsonl")], output=tmp_path / "serac",
        locality=[str(tmp_path / "elsewhere.jsonl")],
        set={"small": str(folder / "small"), "encoder": str(tmp_path / "bert"), "classifier": "cross", **options},
    ).run(Silent())  # fmt: skip
    editor = make_editor("serac", {"trained": str(tmp_path / "serac")})
    scores, _ = editor.fit(trained(), TOKENIZER, ASKED).scope(trained(), [*PROMPTS, *elsewhere])
    assert float(scores[: len(PROMPTS)].min()) > 0.5 > float(scores[len(PROMPTS) :].max())
