"""IKE: examples are of three kinds, the nearest are taken, and the last stands next to the new fact."""

import json

import pytest
import torch

from editing.small_facts import TOKENIZER, requests, trained, word_tokenizer
from modelwright.editing import EditRequest, load_edit, make_editor
from modelwright.editing.ice import IKE
from modelwright.editing.ice import editor as module
from modelwright.editing.ice.editor import KINDS, examples_of, quotas
from modelwright.editing.sentences import sentence_vectors, text_limit
from modelwright.editing.serac import SeracParts
from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout
from modelwright.evaluation.editing_evaluation import SequentialEditing
from modelwright.evaluation.editors import describe, writes_prompt
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.edit import EditModel
from modelwright.verbs.generate import Generate

FACTS = requests()


@pytest.fixture
def shown(tmp_path):
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(r.to_dict()) + "\n" for r in FACTS[1:]))
    return str(tmp_path / "shown.jsonl")


def test_a_fact_is_copied_updates_its_paraphrases_and_leaves_others():
    assert examples_of(FACTS[0], FACTS[1:]) == [
        ("copy", "New Fact: Ada lives in Oslo\nPrompt: Ada lives in Oslo\n\n"),
        ("update", "New Fact: Ada lives in Oslo\nPrompt: The home of Ada is Oslo\n\n"),
        ("retain", "New Fact: Ada lives in Oslo\nPrompt: Bob lives in Oslo\n\n"),
    ]
    same = EditRequest("{} was born in", "Ada", "Kiev", old_answer="Rome")
    unknown = EditRequest("{} lives in", "Bob", "Kiev")
    assert examples_of(FACTS[0], [same, unknown, FACTS[2]])[-1][1].endswith("Prompt: Cid lives in Kiev\n\n")
    assert len(examples_of(FACTS[0], [same, unknown])) == 2


def test_the_nearest_examples_stand_before_the_fact_the_nearest_last(shown):
    model = trained()
    edit = IKE(demonstrations=shown, number=5, quota=None).fit(model, TOKENIZER, FACTS[:1])
    texts = [text for i, r in enumerate(FACTS[1:]) for _, text in examples_of(r, FACTS[i + 2 :] + FACTS[1 : i + 1])]

    @torch.no_grad()
    def alone(text):
        hidden = model.model(**TOKENIZER(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return hidden / hidden.norm()

    own = alone("New Fact: Ada lives in Oslo\nPrompt: Ada lives in Oslo\n\n")
    scores = [float(alone(text) @ own) for text in texts]
    wanted = sorted(range(len(texts)), key=lambda i: -scores[i])[:5][::-1]
    assert edit.details["similarities"] == pytest.approx([scores[i] for i in wanted], abs=1e-5)
    assert edit.prompt("Who?") == "".join(texts[i] for i in wanted) + "New Fact: Ada lives in Oslo\nPrompt: Who?"
    assert not any("New Fact: Ada" in text for text in edit.demonstrations)


def test_of_each_kind_the_nearest_are_taken_by_the_papers_quota(shown):
    """16 are 2, 6 and 8; of the 7 facts there are 7 of each, so one more of the others fills up."""
    model = trained()
    everything = IKE(demonstrations=shown, number=99, quota=None).fit(model, TOKENIZER, FACTS[:1])
    ranked = list(zip(everything.details["kinds"], everything.demonstrations, strict=True))[::-1]
    assert len(ranked) == 21
    for number, counts in ((8, (1, 3, 4)), (16, (3, 6, 7)), (5, (1, 2, 2)), (3, (0, 1, 2)), (30, (7, 7, 7))):
        edit = IKE(demonstrations=shown, number=number).fit(model, TOKENIZER, FACTS[:1])
        kinds = edit.details["kinds"]
        left = [list(quotas([1, 3, 4], number).values())[i] for i in range(3)]
        wanted = [text for i, name in enumerate(KINDS) for text in [t for k, t in ranked if k == name][: left[i]]]
        wanted += [text for _, text in ranked if text not in wanted][: number - len(wanted)]
        assert set(edit.demonstrations) == set(wanted)
        assert [text for _, text in ranked[::-1] if text in wanted] == list(edit.demonstrations)  # the nearest last
        assert edit.details["similarities"] == sorted(edit.details["similarities"])
        if number != 16:
            assert tuple(kinds.count(name) for name in KINDS) == counts
    assert quotas([1, 3, 4], 16) == {"copy": 2, "update": 6, "retain": 8}
    assert quotas([0, 0, 1], 5) == {"copy": 0, "update": 0, "retain": 5}
    for number in range(1, 40):
        assert sum(quotas([1, 3, 4], number).values()) == number


def test_fits_one_after_the_other_stand_in_a_row_as_if_made_together(shown, tmp_path):
    model = trained()
    for editor in (IKE(demonstrations=[shown], number=4), make_editor("ice")):
        together = editor.fit(model, TOKENIZER, FACTS[:3])
        run = SequentialEditing(
            model=model, tokenizer=TOKENIZER, editor=editor, requests=FACTS[:3], checkpoints=[1, 3],
            neutral=["Therefore a tea . You and I ."], layout=Layout(kind="raw", new_tokens=2),
            folder=tmp_path / editor.name,
        )  # fmt: skip
        for state in run:
            assert len(state.edits) == 1
        assert state.prompt("Who?") == together.prompt("Who?")
        run.restore()
        loaded = load_edit(tmp_path / editor.name / "states" / "00003")
        assert loaded.prompt("Who?") == together.prompt("Who?")
        # A fact that is written anew takes the place of the old one.
        again = EditRequest(FACTS[0].prompt, FACTS[0].subject, "Kiev")
        with together.applied(model):
            anew = editor.fit(model, TOKENIZER, [again])
        assert anew.requests == (*FACTS[1:3], again)
        assert anew.holds(together)
        assert not editor.fit(model, TOKENIZER, FACTS[:1]).holds(together)


def test_several_facts_have_a_line_each_and_its_own_prompt_is_never_shown(shown):
    edit = IKE(demonstrations=[shown], number=100).fit(trained(), TOKENIZER, FACTS[:3])
    assert edit.prompt("Who?").endswith("\n\nNew Fact: Ada lives in Oslo\nNew Fact: Bob lives in Kiev\n"
                                        "New Fact: Cid lives in Lima\nPrompt: Who?")  # fmt: skip
    assert len(edit.demonstrations) == 3 * 5
    assert not any(text.startswith(("New Fact: Bob", "New Fact: Cid")) for text in edit.demonstrations)


def test_an_encoder_of_ones_own(shown, tmp_path):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=259, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()
    save_model(bert, byte_tokenizer(), tmp_path / "bert")
    edit = IKE(demonstrations=[shown], encoder=str(tmp_path / "bert"), number=3).fit(trained(), TOKENIZER, FACTS[:1])
    pair = ["New Fact: Ada lives in Oslo\nPrompt: Ada lives in Oslo\n\n", edit.demonstrations[-1]]
    one, other = sentence_vectors(bert, byte_tokenizer(), pair)
    assert edit.details["similarities"][-1] == pytest.approx(float(one @ other), abs=1e-5)
    with torch.no_grad():
        hidden = bert(**byte_tokenizer()(pair[1], return_tensors="pt")).last_hidden_state[0].mean(0)
    assert torch.allclose(other, hidden / hidden.norm(), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_models_own_states_need_no_padding_token_and_take_no_token_types(family):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model, texts = trained(family), ["Ada lives in Oslo", "Bob likes"]
    found = sentence_vectors(model, tokenizer, texts)
    with torch.no_grad():
        for text, vector in zip(texts, found):
            ids = torch.tensor([TOKENIZER(text)["input_ids"]])
            hidden = model.base_model(input_ids=ids).last_hidden_state[0].mean(0)
            assert torch.allclose(vector, hidden / hidden.norm(), atol=1e-5)


def test_a_text_too_long_for_roberta_is_cut_where_its_positions_end():
    """Its positions begin behind the padding id: of 20, two are lost."""
    from transformers import RobertaConfig, RobertaModel

    roberta = RobertaModel(RobertaConfig(
        vocab_size=259, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, pad_token_id=1,
    )).eval()  # fmt: skip
    words = byte_tokenizer()
    assert text_limit(roberta, words) == 18
    long, cut = sentence_vectors(roberta, words, ["abcdefgh" * 9, ("abcdefgh" * 9)[:18]])
    assert torch.allclose(long, cut, atol=1e-5)
    parts = SeracParts(tiny_model("gpt2"), roberta, words, size=24, classifier="cross").eval()
    long = EditRequest("{} is " + "very " * 9, "Ada", "Oslo")
    assert parts.scores(trained(), TOKENIZER, ["x" * 50], [long], torch.zeros(1, 0)).tolist() == [[0.5]]


def test_facts_are_read_and_embedded_once_for_all_fits(shown, monkeypatch):
    seen, real = [], module.sentence_vectors
    monkeypatch.setattr(module, "sentence_vectors", lambda m, t, texts: seen.append(len(texts)) or real(m, t, texts))
    editor = IKE(demonstrations=[shown], number=3)
    before = describe(editor)
    edits = editor.fit_each(trained(), TOKENIZER, FACTS[:1] * 2 + FACTS[2:3])
    # The new fact, and 7 times three examples; nothing; that Bob leaves Dot as is, since Cid is now the new fact.
    assert seen == [1, 21, 1]
    alone = IKE(demonstrations=[shown], number=3).fit(trained(), TOKENIZER, FACTS[2:3])
    assert edits[2].demonstrations == alone.demonstrations
    assert edits[2].details["similarities"] == pytest.approx(alone.details["similarities"], abs=1e-6)
    assert describe(editor) == before
    editor.fit(trained("gpt2"), TOKENIZER, FACTS[:1])  # another model
    assert seen[-2:] == [1, 21]


def test_what_is_said_in_other_words_of_the_new_prompt_is_not_shown(tmp_path):
    fact = EditRequest("The home of {} is", "Ada", "Lima", old_answer="Rome", paraphrases=(FACTS[0].prompt,))
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(r.to_dict()) + "\n" for r in [fact, FACTS[1]]))
    edit = IKE(demonstrations=[str(tmp_path / "shown.jsonl")]).fit(trained(), TOKENIZER, FACTS[:1])
    assert not any("Ada" in text for text in edit.demonstrations)


def test_by_the_commands(shown, tmp_path):
    save_model(trained(), TOKENIZER, tmp_path / "model")
    (tmp_path / "edit.jsonl").write_text(json.dumps(FACTS[0].to_dict()) + "\n")
    EditModel(
        model=str(tmp_path / "model"), method="ike", requests=[str(tmp_path / "edit.jsonl")], as_delta=True,
        output=tmp_path / "edit", set={"demonstrations": shown, "number": 2},
    ).run(Silent())  # fmt: skip
    loaded = load_edit(tmp_path / "edit")
    fresh = make_editor("ike", {"demonstrations": shown, "number": 2}).fit(trained(), TOKENIZER, FACTS[:1])
    assert loaded.prompt("Ada lives in") == fresh.prompt("Ada lives in")
    Generate(
        model=str(tmp_path / "model"), prompt=["Ada lives in"], output=tmp_path / "out.jsonl",
        with_=[str(tmp_path / "edit")], max_new_tokens=2,
    ).run(Silent())  # fmt: skip
    ids = TOKENIZER(fresh.prompt("Ada lives in"), return_tensors="pt")
    by_hand = trained().generate(**ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, -2:]
    assert json.loads((tmp_path / "out.jsonl").read_text())["completion"].split() == TOKENIZER.decode(by_hand).split()


def test_what_is_refused(shown):
    with pytest.raises(UserError, match="number is 0"):
        IKE(number=0)
    for quota in ([1, 3], [0, 0, 0], [1, -1, 4]):
        with pytest.raises(UserError, match="three shares"):
            IKE(quota=quota)
    assert make_editor("ike", {"quota": "none"}).quota is None
    assert make_editor("ike", {"quota": "1,1,1"}).quota == [1, 1, 1]
    with pytest.raises(UserError, match="demonstrations=FILE"):
        IKE().fit(trained(), TOKENIZER, FACTS[:1])
    with pytest.raises(UserError, match="about the prompts of the requests themselves"):
        IKE(demonstrations=[shown]).fit(trained(), TOKENIZER, FACTS)
    assert writes_prompt(IKE())


def test_bad_demonstrations_are_called_so_before_a_model_is_loaded(shown, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    other = FACTS[1].to_dict() | {"target": "Rome", "old_answer": "Oslo"}
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (FACTS[1].to_dict(), other)))
    for name, said in (
        ("empty", r"no demonstrations in .*empty.jsonl: give"),
        ("two", "The demonstrations .* contradict"),
    ):
        with pytest.raises(UserError, match=said):
            IKE(demonstrations=str(tmp_path / f"{name}.jsonl")).check(FACTS[:1])
    IKE(demonstrations=shown).check(FACTS[:1])
