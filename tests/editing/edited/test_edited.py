"""Saved edits on a model while it generates: the same as when they are put on by hand, and gone afterwards."""

import json

import pytest
import torch

from editing.small_facts import TOKENIZER, requests, statistics, trained
from modelwright.decoding.generate import Sampling, generate
from modelwright.decoding.parts import read_parts
from modelwright.editing import make_editor
from modelwright.editing.edit import edits_on
from modelwright.editing.edited.options import EditedOptions
from modelwright.errors import UserError
from modelwright.models.loading import save_model
from modelwright.progress import Silent
from modelwright.verbs.generate import Generate

ASKED = requests()
OPTIONS = {
    "memit": {"layers": [0, 1], "fact_token": "last", "statistics": statistics, "ridge": 0.01, "weight": 1.0},
    "grace": {"layer": 1, "radius": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited")
    save_model(trained(), TOKENIZER, folder / "model")
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": r.text}) + "\n" for r in ASKED))
    for name in ("memit", "grace", "ice"):
        options = {k: v() if callable(v) else v for k, v in OPTIONS.get(name, {}).items()}
        make_editor(name, options).fit(trained(), TOKENIZER, ASKED).save(folder / name)
    return folder


def first_words(model, prompts, **options):
    found = generate(model, TOKENIZER, prompts, Sampling(max_new_tokens=1), batch_size=3, **options)
    return [completions[0].text.strip() for completions in found]


def verb(folder, output, *with_, **options):
    Generate(
        model=str(folder / "model"), prompts=[str(folder / "asked.jsonl")], output=output, with_=list(with_),
        max_new_tokens=1, batch_size=3, **options,
    ).run(Silent())  # fmt: skip
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("name", ["memit", "grace"])
def test_a_folder_is_a_method(folder, tmp_path, name):
    model = trained()
    before = {n: p.clone() for n, p in model.named_parameters()}
    prompts = [r.text for r in ASKED]
    plain = first_words(model, prompts)
    with read_parts([folder / name]).on(model, TOKENIZER) as applied:
        assert [edit.method for edit in edits_on(model)] == [name]
        inside = first_words(applied.model, prompts, generate_with=applied.generate)
    assert sum(word == r.target for word, r in zip(inside, ASKED)) >= 7
    assert first_words(model, prompts) == plain
    assert edits_on(model) == []
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    rows = verb(folder, tmp_path / "out.jsonl", str(folder / name), compare=True)
    assert [row["completion"].strip() for row in rows] == inside
    assert [row["plain"].strip() for row in rows] == plain


def test_facts_that_live_in_the_prompt_are_put_there(folder, tmp_path):
    ice = make_editor("ice").fit(trained(), TOKENIZER, ASKED)
    by_hand = first_words(trained(), [ice.prompt(r.text) for r in ASKED])
    rows = verb(folder, tmp_path / "out.jsonl", str(folder / "ice"))
    assert [row["completion"].strip() for row in rows] == by_hand
    assert [row["prompt"] for row in rows] == [r.text for r in ASKED]
    # Tasks lay their prompts out themselves.
    with (
        pytest.raises(UserError, match="'edited' puts text before each prompt"),
        read_parts([folder / "ice"]).on(trained(), TOKENIZER),
    ):
        pass


def test_several_folders_are_one_method_and_options_name_them_too(folder):
    both = read_parts([str(folder / "memit"), {"string": {"window": 4}}, str(folder / "ice")])
    assert both.name == "string under edited"
    assert both.contexts[0].options.edit == [str(folder / "memit"), str(folder / "ice")]
    assert both.prompt("x") == make_editor("ice").fit(trained(), TOKENIZER, ASKED).prompt("x")
    named = read_parts([f"edited: {{edit: [{folder / 'memit'}]}}"])
    assert named.identity() == read_parts([folder / "memit"]).identity() != both.identity()


def test_faults(folder, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="needs the option 'edit'"):
        read_parts(["edited"])
    with pytest.raises(UserError, match="at least one"):
        read_parts([{"edited": {"edit": []}}])
    with pytest.raises(UserError, match="holds no edit"):
        read_parts([{"edited": {"edit": [str(tmp_path / "other")]}}]).on(trained(), TOKENIZER).__enter__()
    save_model(trained("gpt2"), TOKENIZER, tmp_path / "model")
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Ada lives in"}\n')
    with pytest.raises(UserError, match="fitted on a model with fingerprint"):
        Generate(
            model=str(tmp_path / "model"), prompts=[str(tmp_path / "asked.jsonl")], output=tmp_path / "o.jsonl",
            with_=[str(folder / "memit")],
        ).run(Silent())  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["asked.jsonl", "model", "other"]
    with pytest.raises(UserError, match="given twice"):
        read_parts([folder / "memit", {"edited": {"edit": [str(folder / "ice")]}}])


def test_facts_that_a_later_edit_took_in_are_told_once(tmp_path):
    model = trained()
    first = make_editor("ice", {}).fit(model, TOKENIZER, ASKED[:1])
    with first.applied(model):
        second = make_editor("ice", {}).fit(model, TOKENIZER, ASKED[1:2])
    alone = make_editor("ice", {}).fit(model, TOKENIZER, ASKED[2:3])
    for name, edit in {"first": first, "second": second, "alone": alone}.items():
        edit.save(tmp_path / name)
    options = EditedOptions(edit=[str(tmp_path / name) for name in ("first", "second", "alone")])
    assert options.prompt("Why?") == alone.prompt(second.prompt("Why?"))
