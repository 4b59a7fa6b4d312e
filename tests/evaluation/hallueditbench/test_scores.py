"""The five dimensions worked out by hand, and the published answers read as they were written."""

import csv
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from evaluation.hallueditbench.published_files import write
from modelwright.editing.edit import Edit
from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout
from modelwright.evaluation.hallueditbench import read_items, run
from modelwright.evaluation.hallueditbench.published import published_models, published_rows
from modelwright.evaluation.hallueditbench.scores import Scores, advice, balance, score
from modelwright.progress import Silent
from modelwright.verbs.evaluate_hallueditbench import HalluEditBench


@pytest.fixture
def results(tmp_path):
    return write(tmp_path / "results")


def test_published_answers_give_their_table(results):
    assert published_models(results) == ["some_model"]
    scores = {s.method: s for s in score(published_rows(results, "some_model"))}
    rome, ft = scores["ROME"], scores["FT-L"]
    assert rome.items == 4
    assert rome.efficacy == 1.0
    assert ft.efficacy == 0.5
    assert rome.parts["rephrase"] == 0.75
    assert rome.parts["yes"] == 0.75
    assert rome.parts["no"] == 0.25
    assert rome.parts["multiple_choice"] == 0.5
    assert rome.parts["reversed"] == 0.0
    assert rome.generalisation == pytest.approx((0.75 + 0.75 + 0.25 + 0.5 + 0.0) / 5)
    assert rome.locality == 0.5
    assert [rome.parts[f"{n}hop"] for n in range(2, 7)] == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert rome.portability == pytest.approx(0.6)
    assert rome.turns == {"yes": [1.0, 0.5, 0.0]}
    assert rome.robustness == 0.0
    assert rome.seconds == 2.0
    assert rome.before["efficacy"] == 0.0
    assert "locality" not in rome.before


def test_matching_anew_undoes_what_substrings_let_through(results):
    word = {s.method: s for s in score(published_rows(results, "some_model"), "word")}["ROME"]
    paper = {s.method: s for s in score(published_rows(results, "some_model"), "paper")}["ROME"]
    # "x" is no October, in either way; the published verdict of the hops is what their answers say.
    assert paper.efficacy == word.efficacy == 0.0
    assert [paper.parts[f"{n}hop"] for n in range(2, 7)] == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert paper.locality == 0.5
    # "A red door" holds a d, and "North" begins with no.
    assert paper.parts["multiple_choice"] == paper.parts["no"] == 1.0
    assert word.parts["multiple_choice"] == word.parts["no"] == 0.0
    assert word.parts["yes"] == word.parts["rephrase"] == 1.0
    assert word.locality == 0.5


def test_the_command_scores_published_answers(results, tmp_path):
    out = tmp_path / "table.json"
    said = HalluEditBench(published=results, output=out, protocol="paper").run(Silent())
    assert said["scores"]["some_model, ROME"] == {"efficacy": 1.0, "rephrase": 0.75, "locality": 0.5}
    (rome,) = [s for s in json.loads(out.read_text())["published"]["some_model"] if s["method"] == "ROME"]
    dimensions = ("efficacy", "generalisation", "portability", "locality", "robustness")
    # Generalisation is the mean of 3/4, 3/4, 1/4, 2/4 and 0; portability of 1 and four times 1/2.
    assert [rome[name] for name in dimensions] == pytest.approx([1.0, 0.45, 0.6, 0.5, 0.0])


class Written(Edit):
    """An edit after which the model answers from a list: the answers are the file's, so the numbers are by hand."""

    kind = "written"

    def _put_on(self, model, stack):
        model.said = self.details["after"]

    def _take_off(self, model, stack):
        model.said = model.before

    def _state(self):
        return {}, {}

    @classmethod
    def _from_state(cls, common, state, tensors):
        return cls(**common)


@dataclass
class Writes:
    """An editor whose edits answer as the list of their target says."""

    after: dict
    name = "written"

    def check(self, requests):
        pass

    def fit_each(self, model, tokenizer, requests):
        return [Written("written", None, [r], {"after": self.after[r.target]}) for r in requests]


#: What the answers of the test below score, by hand. Only substrings let through "Hentz", "Unknown", "Not C but D", an
#: empty answer and "nor".
BY_HAND = {
    "word": {
        "efficacy": 0.5, "parts": {"rephrase": 1.0, "yes": 0.5, "no": 0.5, "multiple_choice": 0.5, "reversed": 0.5},
        "generalisation": 0.6, "hops": [1.0, 0.5, 0.0, 0.0, 0.0], "portability": 0.3,
        "turns": {"yes": [0.5, 1.0, 1.0], "no": [0.5, 0.5, 0.5]},
    },
    "paper": {
        "efficacy": 1.0, "parts": {"rephrase": 1.0, "yes": 0.5, "no": 1.0, "multiple_choice": 1.0, "reversed": 1.0},
        "generalisation": 0.9, "hops": [1.0, 0.5, 0.5, 0.0, 0.0], "portability": 0.4,
        "turns": {"yes": [1.0, 1.0, 1.0], "no": [1.0, 0.5, 0.5]},
    },
}  # fmt: skip


@pytest.mark.parametrize("protocol", list(BY_HAND))
def test_a_published_csv_gives_the_table_worked_out_by_hand(protocol, tmp_path, monkeypatch):
    """Two items as the authors wrote them, and answers to each question: all five dimensions, by hand."""
    hand = BY_HAND[protocol]
    common = {"topic": "places_city", "relation": "capital", "output_some_model": "Paris", "eval_some_model": "0.0"}

    def item(place, city):
        row = {
            **common, "subject": place, "object": city, "question": f"What is the capital of {place}?",
            "multiple_choices": f"['{city}', 'Paris', 'Oslo', 'Rome']",
            "paraphrased_question": f"Which city leads {place}?",
            "multiple_choice_with_letters": f"A. Oslo  B. {city}  C. Paris  D. Rome", "multiple_choice_labels": "B",
            "yes_question": f"Is {city} the capital of {place}?", "no_question": f"Is Paris the capital of {place}?",
            "locality_question": f"Where is {place}?", "reversed_relation_question": f"{city} is whose capital?",
        }  # fmt: skip
        for n in range(2, 7):
            row |= {f"question_{n}hop": f"{n} hops from {place}?", f"answer_{n}hop": "north"}
        return row

    rows = [item("Freedonia", "Zenda"), item("Sylvania", "Hentzau")]
    with (tmp_path / "places_city.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    items = read_items(tmp_path / "places_city.csv")
    # By question: efficacy, rephrase, yes, no, choice, reversed, locality, 2 to 6 hops; then the doubts, Yes and No.
    good = ["Zenda.", "It is Zenda", "Yes", "No", "B", "Freedonia", "Mars", "north", "north", "nor", "south", "south"]
    bad = ["Hentz", "Hentzau", "No", "Unknown", "Not C but D", "", "Venus", "up north", *["south"] * 4, "Yes", "Yes"]
    good += ["Yes", "No"]
    before = ["Paris", "Paris", "No", "Yes", "C", "Paris", "Mars", *["south"] * 5]
    model = SimpleNamespace(said=before, before=before, named_parameters=lambda: iter(()))
    monkeypatch.setattr(run, "model_fingerprint", lambda *_, **__: "same")
    monkeypatch.setattr(Written, "apply_", lambda self, given: self._put_on(given, None))
    monkeypatch.setattr(Written, "revert_", lambda self, given: self._take_off(given, None))

    def answered(given, tokenizer, prompts, *_, **__):
        if any("Your answer to the original question is wrong" in p for p in prompts):
            return given.said[-2:]
        every = given.said[:12]
        return [every[i % 12] for i in range(len(prompts))]

    monkeypatch.setattr(run, "answers", answered)
    loop = run.SingleEditing(
        editors={"m": Writes({"Zenda": good, "Hentzau": bad})}, layout=Layout(kind="qa"), turns=2, protocol=protocol
    )
    rows = loop.rows(model, None, items)
    (found,) = score(rows)
    assert found.items == 2
    assert found.before["efficacy"] == 0.0
    assert found.efficacy == hand["efficacy"]
    assert {name: found.parts[name] for name in hand["parts"]} == hand["parts"]
    assert found.generalisation == pytest.approx(hand["generalisation"])
    assert [found.parts[f"{n}hop"] for n in range(2, 7)] == hand["hops"]
    assert found.portability == pytest.approx(hand["portability"])
    assert found.locality == 0.5
    assert found.turns == hand["turns"]
    assert found.robustness == 0.75
    # The kept answers, matched anew by the other rule, give the other table.
    for other, table in BY_HAND.items():
        (again,) = score(rows, other)
        assert (again.efficacy, again.generalisation) == (table["efficacy"], pytest.approx(table["generalisation"]))
        assert again.portability == pytest.approx(table["portability"])


def test_a_folder_that_is_no_copy_is_refused(tmp_path, results):
    with pytest.raises(UserError, match="holds no folder 'hallu_edit'"):
        published_models(tmp_path)
    with pytest.raises(UserError, match="did you mean 'some_model'"):
        list(published_rows(results, "some_modle"))
    file = next((results / "hallu_edit" / "some_model").glob("*.json"))
    rows = json.loads(file.read_text())
    del rows[1]["post"]["edit_acc"]
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=f"{file.name} is not as the benchmark writes it: .* at item 1"):
        list(published_rows(results, "some_model"))
    for damage in ("5", json.dumps([{**rows[0], "time": "soon"}])):
        file.write_text(damage)
        with pytest.raises(UserError, match=f"{file.name} is not as the benchmark writes it: .* at item 0"):
            list(published_rows(results, "some_model"))


def probe(name, right, label="x"):
    return {"name": name, "label": label, "kind": "text", "pre": "", "post": "", "pre_right": 0, "post_right": right}


def test_several_paraphrases_of_an_item_weigh_as_one():
    rows = [
        {"method": "m", "item": "1", "probes": [probe("rephrase", 1), probe("rephrase", 0)], "seconds": 1.0},
        {"method": "m", "item": "2", "probes": [probe("rephrase", 1)], "seconds": 3.0},
    ]
    (found,) = score(rows)
    assert found.parts["rephrase"] == 0.75
    assert found.generalisation == 0.75
    assert found.seconds == 2.0
    assert found.efficacy is None


def scores(method, efficacy, rephrase, locality, turns=None):
    parts = {"efficacy": efficacy, "rephrase": rephrase, "locality": locality}
    return Scores(method=method, items=9, parts=parts, turns=turns or {})


def test_robustness_counts_both_replies():
    found = scores("m", 1, 1, 1, {"yes": [1.0, 0.9], "no": [1.0, 0.1]})
    assert found.robustness == 0.5


def test_advice_prefers_balance_and_sets_ice_apart():
    grace, ft = scores("grace", 1.0, 0.0, 1.0), scores("ft-m", 0.9, 0.8, 0.7)
    lora, ice = scores("lora", 1.0, 1.0, 0.05), scores("ice", 0.95, 0.95, 0.9)
    assert balance(grace) == 0.0
    assert balance(ft) == pytest.approx(3 / (1 / 0.9 + 1 / 0.8 + 1 / 0.7))
    said = advice([grace, lora, ft, ice])
    assert said.startswith("To change this model itself use ft-m, the best balanced: efficacy 90%, generalisation 80%")
    assert "ice is better balanced" in said
    assert "Every method" in advice([grace])
    assert "fewer than half" in advice([scores("ft-m", 0.3, 0.3, 0.9)])
