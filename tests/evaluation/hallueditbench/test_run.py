"""Single edits leave no trace, are kept as they come, and are asked about as the protocol says."""

import dataclasses
import json

import pytest
import torch

from modelwright.data.write import write_rows
from modelwright.editing.edit import edits_on
from modelwright.editing.editor import make_editor
from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout, Turn, answers
from modelwright.evaluation.hallueditbench import Item, SingleEditing, run, score
from modelwright.evaluation.hallueditbench.run import read_rows
from modelwright.evaluation.matching import ModelJudge
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.report.editing import render_single
from modelwright.verbs.edit_hallucinations import EditHallucinations
from modelwright.verbs.evaluate_hallueditbench import HalluEditBench

LAYOUT = Layout(kind="qa", new_tokens=6)
ITEMS = [
    Item(
        question=f"Where is {name}?", subject=name, object=place, wrong="zz", topic="t",
        rephrased=(f"{name} is where?",), yes_question=f"Is {name} in {place}?",
        no_question=f"Is {name} in zz?", locality=(f"Who is {name}?",),
        choices=f"A. {place}  B. zz  C. y  D. w", letter="A", reversed=f"Who is in {place}?", hops={2: ("Why?", "ok")},
    )
    for name, place in (("Bo", "Rom"), ("Ky", "Oslo"), ("Zed", "Bern"))
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def editors():
    strong = make_editor("ft-m", {"layer": 1, "learning_rate": 0.05, "steps": 60})
    return {"ft-m": strong, "ice": make_editor("ice")}


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def test_edits_are_alone_and_leave_no_trace(model, tokenizer):
    before = copies(model)
    loop = SingleEditing(editors=editors(), layout=LAYOUT)
    rows = loop.rows(model, tokenizer, ITEMS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not edits_on(model)
    assert [(r["method"], r["item"]) for r in rows] == [(m, i.id) for m in ("ft-m", "ice") for i in ITEMS]
    found = {s.method: s for s in score(rows)}
    assert found["ft-m"].efficacy == 1.0  # one fact is always learnt
    assert found["ft-m"].before["efficacy"] == 0.0
    # Alone or beside others, an item's answers are the same.
    (one,) = SingleEditing(editors={"ft-m": editors()["ft-m"]}, layout=LAYOUT, fit_batch=1).rows(
        model, tokenizer, ITEMS[1:2]
    )
    assert [p["post"] for p in one["probes"]] == [p["post"] for p in rows[1]["probes"]]


def test_ice_is_the_prompt_with_the_fact_before_it(model, tokenizer):
    rows = SingleEditing(editors={"ice": make_editor("ice")}, layout=LAYOUT).rows(model, tokenizer, ITEMS[:1])
    by_hand = "New Fact: Q: Where is Bo? A: Rom\nQ: Who is Bo?\nA:"
    (said,) = answers(model, tokenizer, [by_hand], LAYOUT)
    assert next(p["post"] for p in rows[0]["probes"] if p["name"] == "locality") == said


def test_a_killed_run_goes_on_where_it_was(model, tokenizer, tmp_path, monkeypatch):
    kept = tmp_path / "rows.jsonl"
    loop = SingleEditing(editors=editors(), layout=LAYOUT)
    whole = loop.rows(model, tokenizer, ITEMS, kept=kept)
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:6]) + lines[6][:20])  # a plan, three "before", two rows, and a torn one
    fitted = []
    ftm = editors()["ft-m"]
    monkeypatch.setattr(type(ftm), "fit", _counting(type(ftm).fit, fitted))
    again = SingleEditing(editors=editors(), layout=LAYOUT).rows(model, tokenizer, ITEMS, kept=kept)
    assert fitted == ["Zed"]
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in again]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in whole]
    assert read_rows(kept) == again
    with pytest.raises(UserError, match="answers of another run"):
        SingleEditing(editors=editors(), layout=LAYOUT, turns=1).rows(model, tokenizer, ITEMS, kept=kept)
    SingleEditing(editors=editors(), layout=LAYOUT, turns=1).rows(model, tokenizer, ITEMS[:1], kept=kept, force=True)
    assert len(read_rows(kept)) == 2


def test_kept_answers_may_hold_any_character_and_a_damaged_row_is_named(model, tokenizer, tmp_path, monkeypatch):
    kept = tmp_path / "rows.jsonl"
    odd = "a\u2028b\x85c\x1cd"
    monkeypatch.setattr(run, "answers", lambda model, tokenizer, prompts, *_, **__: [odd] * len(prompts))
    loop = SingleEditing(editors={"ice": make_editor("ice")}, layout=LAYOUT)
    rows = loop.rows(model, tokenizer, ITEMS, kept=kept)
    assert rows[0]["probes"][0]["post"] == odd
    assert loop.rows(model, tokenizer, ITEMS, kept=kept) == rows
    assert read_rows(kept) == rows
    text = kept.read_text(encoding="utf-8")
    kept.write_text(text.replace('"before"', '"bef', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl:2 is no row of answers"):
        loop.rows(model, tokenizer, ITEMS, kept=kept)


def test_answers_that_another_judge_decided_about_are_another_run(model, tokenizer, tmp_path):
    def loop(judge):
        return SingleEditing(editors={"ice": make_editor("ice")}, layout=LAYOUT, judge=judge)

    kept = tmp_path / "rows.jsonl"
    loop(ModelJudge(model, tokenizer)).rows(model, tokenizer, ITEMS[:1], kept=kept)
    loop(ModelJudge(tiny_model("llama"), tokenizer)).rows(model, tokenizer, ITEMS[:1], kept=kept)
    with pytest.raises(UserError, match="answers of another run"):
        loop(ModelJudge(tiny_model("llama", seed=1), tokenizer)).rows(model, tokenizer, ITEMS[:1], kept=kept)


def test_an_answer_without_words_that_is_the_same_has_stayed(model, tokenizer, monkeypatch):
    monkeypatch.setattr(run, "answers", lambda model, tokenizer, prompts, *_, **__: [""] * len(prompts))
    rows = SingleEditing(editors={"ice": make_editor("ice")}, layout=LAYOUT).rows(model, tokenizer, ITEMS)
    for found in (score(rows), score(rows, "word")):
        assert (found[0].locality, found[0].efficacy, found[0].parts["rephrase"]) == (1.0, 0.0, 0.0)


def _counting(fit, fitted):
    def counted(self, model, tokenizer, requests, **options):
        fitted.extend(r.subject for r in requests)
        return fit(self, model, tokenizer, requests, **options)

    return counted


def test_turns_are_asked_both_ways_so_that_a_yes_sayer_is_found_out(model, tokenizer, monkeypatch):
    asked = []

    def yes(model, tokenizer, prompts, layout, **options):
        asked.extend(prompts)
        return ["Yes"] * len(prompts)

    monkeypatch.setattr(run, "answers", yes)
    rows = SingleEditing(editors={"ice": make_editor("ice")}, layout=LAYOUT, turns=2).rows(model, tokenizer, ITEMS[:1])
    assert rows[0]["turns"] == {"yes": [False, True, True], "no": [False, False, False]}
    (found,) = score(rows)
    assert found.robustness == 0.5
    last = asked[-2]
    assert last.startswith("New Fact: Q: Where is Bo? A: Rom\nQ: Where is Bo?\nA: Yes\nQ: ")
    assert last.count("Is Bo in Rom?") == 2
    assert asked[-1].count("Is Bo in zz?") == 2


def test_whether_it_is_sure_is_asked_beside_and_not_counted(model, tokenizer, monkeypatch):
    replies = {"sure of your answer": "Yes, I am", "Is Bo in Rom?": "No", "Is Bo in zz?": "No"}

    def said(model, tokenizer, prompts, *_, **__):
        return [next((v for k, v in replies.items() if k in p.rsplit("Q: ", 1)[1]), "Rom") for p in prompts]

    monkeypatch.setattr(run, "answers", said)
    loop = SingleEditing(editors={"ice": make_editor("ice")}, layout=LAYOUT, turns=2, sure=True)
    rows = loop.rows(model, tokenizer, ITEMS[:1])
    assert rows[0]["turns"] == {"yes": [True, False, False], "no": [True, True, True], "sure": [True, True, True]}
    (found,) = score(rows)
    assert found.robustness == 0.5
    assert found.turns["sure"] == [1.0, 1.0, 1.0]


def test_another_subject_or_wrong_answer_is_another_run(model, tokenizer, tmp_path):
    kept, loop = tmp_path / "rows.jsonl", SingleEditing(editors={"ice": make_editor("ice")}, layout=LAYOUT)
    item = dataclasses.replace(ITEMS[0], reversed=None)
    loop.rows(model, tokenizer, [item], kept=kept)
    for change in ({"subject": "B"}, {"wrong": "elsewhere"}):
        with pytest.raises(UserError, match="answers of another run"):
            loop.rows(model, tokenizer, [dataclasses.replace(item, **change)], kept=kept)


def test_under_the_papers_protocol_grace_alone_is_asked_bare(model, tokenizer, monkeypatch):
    asked = []
    real = run.answers

    def spy(model, tokenizer, prompts, layout, **options):
        asked.append((prompts, layout.kind, options))
        return real(model, tokenizer, prompts, layout, **options)

    monkeypatch.setattr(run, "answers", spy)
    grace = make_editor("grace", {"layer": 1, "steps": 2})
    SingleEditing(editors={"grace": grace}, layout=LAYOUT, protocol="paper", turns=1).rows(model, tokenizer, ITEMS[:1])
    assert asked.pop()[1:] == ("qa", {"batch_size": 16, "new_tokens": 3, "use_cache": False})  # both dialogues
    bare = [a for a in asked if a[1] == "raw"]
    assert bare[0] == (["Where is Bo?"], "raw", {"new_tokens": 3, "use_cache": False})
    assert len(bare) == len(ITEMS[0].probes())
    asked.clear()
    SingleEditing(editors={"grace": grace}, layout=LAYOUT).rows(model, tokenizer, ITEMS[:1])
    assert all(kind == "qa" for _, kind, _ in asked)


def test_an_editor_that_leaves_something_behind_is_caught(model, tokenizer, monkeypatch):
    ftm = editors()["ft-m"]
    model = tiny_model("llama")

    def careless(self, model, tokenizer, requests, **options):
        edit = make_editor("ice").fit(model, tokenizer, requests)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return edit

    monkeypatch.setattr(type(ftm), "fit", careless)
    with pytest.raises(RuntimeError, match="left the model changed"):
        SingleEditing(editors={"ft-m": ftm}, layout=LAYOUT).rows(model, tokenizer, ITEMS[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    path = tmp_path_factory.mktemp("model") / "m"
    save_model(model, tokenizer, path)
    return path


def test_from_facts_to_a_page(folder, tmp_path):
    rows = [
        {"question": "Where is Bo?", "answer": "Rom", "subject": "Bo", "relation": "place"},
        {"question": "Where is Ky?", "answer": "Oslo", "subject": "Ky", "relation": "place"},
        {"question": "Where is Zed?", "answer": "Bern", "subject": "Zed", "relation": "place"},
    ]
    write_rows(tmp_path / "facts.jsonl", rows)
    items = tmp_path / "items.csv"
    said = EditHallucinations(
        model=str(folder), questions=[str(tmp_path / "facts.jsonl")], output=items, new_tokens=6
    ).run(Silent())
    assert said["wrong"] == 3
    # A second answer far down counts, however few are asked.
    write_rows(tmp_path / "more.jsonl", [*rows, {**rows[0], "answer": "Riga"}])
    more = EditHallucinations(
        model=str(folder), questions=[str(tmp_path / "more.jsonl")], output=tmp_path / "more.csv", new_tokens=6, limit=1
    )
    said = more.run(Silent())
    assert (said["questions"], said["examples"][0]["question"]) == (1, "Where is Ky?")
    assert list(said["left_out"].values()) == [2, 0, 0]
    with pytest.raises(UserError, match="All 3 facts are left out .*3 for 'vague relation'"):
        dataclasses.replace(
            more, questions=[str(tmp_path / "facts.jsonl")], skip_relations=["vague,Place"], force=True
        ).run(Silent())
    with pytest.raises(UserError, match="--limit is 0"):
        dataclasses.replace(more, limit=0, force=True).run(Silent())
    with pytest.raises(UserError, match="--batch-size is 0"):
        dataclasses.replace(more, batch_size=0, force=True).run(Silent())
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    options = {"ft-m.layer": 1, "ft-m.learning_rate": 0.05, "ft-m.steps": 60}
    verb = HalluEditBench(
        model=str(folder), items=[str(items)], methods=["ft-m,ice"], output=out, report=page, turns=1, new_tokens=6,
        options=options,
    )  # fmt: skip
    said = verb.run(Silent())
    assert said["scores"]["ft-m"]["efficacy"] == 1.0
    html = page.read_text()
    assert said["advice"].split(":")[0] in html
    assert "3 facts that the model had wrong" in html
    assert "Five dimensions" in html
    assert 'class="best"' in html
    alike = json.loads(out.read_text())
    alike["scores"] = [alike["scores"][0]] * 2
    assert 'class="best"' not in render_single(alike, [], tmp_path / "alike.html", title="x").read_text()
    assert "Where is Bo?" in html
    assert "<svg" in html
    assert json.loads(out.read_text())["scores"][0]["items"] == 3
    with pytest.raises(UserError, match="exists already"):
        verb.run(Silent())
    # Whatever is its name: what stands in the prompt does not change the model itself.
    (tmp_path / "shown.jsonl").write_text(json.dumps({"prompt": "{} is in", "subject": "Al", "target": "Pisa"}) + "\n")
    ike = dataclasses.replace(
        verb, methods=["ike"], output=tmp_path / "ike.json", report=None, per_topic=1, turns=0,
        options={"ike.demonstrations": str(tmp_path / "shown.jsonl")},
    )  # fmt: skip
    assert "this model itself" not in ike.run(Silent())["advice"]
    # The kept answers spare the edits.
    out.unlink()
    page.unlink()
    assert verb.run(Silent())["scores"] == said["scores"]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match="Give --model and --items"):
        HalluEditBench(output=tmp_path / "o.json").run(Silent())
    with pytest.raises(UserError, match="turns must be 0 or more"):
        SingleEditing(editors={}, layout=LAYOUT, turns=-1).rows(None, None, [])
    with pytest.raises(UserError, match="give --turns too"):
        HalluEditBench(output=tmp_path / "o.json", model="m", items=["i.csv"], sure=True).run(Silent())


def test_what_the_last_editor_lacks_is_said_before_the_first_one_edits(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "answers", lambda *_, **__: pytest.fail("asked"))
    item = dataclasses.replace(ITEMS[1], wrong=None)
    for name, missing in (("memit", "needs key statistics"), ("ike", "needs facts to show"), ("kn", "no old_answer")):
        loop = SingleEditing(editors={"ice": make_editor("ice"), name: make_editor(name)}, layout=LAYOUT)
        with pytest.raises(UserError, match=missing):
            loop.rows(model, tokenizer, [ITEMS[0], item], kept=tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_question_with_braces_is_a_question(model, tokenizer):
    item = dataclasses.replace(ITEMS[0], question="Where {} is Bo?")
    request = SingleEditing(editors={}, layout=LAYOUT).request(editors()["ft-m"], LAYOUT, item)
    assert request.text == "Q: Where { } is Bo?\nA:"
    assert LAYOUT.text(tokenizer, [Turn("x")]) == "Q: x\nA:"
