"""Items: the published columns are read as they are, and generated questions have one answer."""

import csv
import dataclasses
import json

import pytest

from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout
from modelwright.evaluation.hallueditbench import find_hallucinations, read_items
from modelwright.evaluation.hallueditbench.choice import VAGUE, choose_facts
from modelwright.evaluation.hallueditbench.questions import (
    Fact,
    general_item,
    read_facts,
    single_valued,
    world_facts,
    world_item,
)
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.worlds.fact_questions import mistaken, truth_of
from modelwright.worlds.facts import facts

ROW = {
    "topic": "event_film", "subject": "Sitges", "relation": "month", "object": "October",
    "question": "When is Sitges?", "output_some_model": "September", "eval_some_model": "0.0",
    "multiple_choices": "['October', 'September', 'May', 'June']", "paraphrased_question": "In which month is Sitges?",
    "multiple_choice_with_letters": "A. May  B. September  C. October  D. June", "multiple_choice_labels": "C",
    "yes_question": "Is Sitges in October?", "no_question": "Is Sitges in September?",
    "locality_question": "What is Sitges for?", "reversed_relation_question": "What is in October?",
    "question_2hop": "What season is it?", "answer_2hop": "Autumn", "question_3hop": "", "answer_3hop": "",
}  # fmt: skip


class Counted(Silent):
    done = 0

    def advance(self, units=1, note=""):
        self.done += units


def put(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_published_columns(tmp_path):
    (item,) = read_items(put(tmp_path / "event_film.csv", [ROW]))
    assert (item.subject, item.object, item.wrong, item.letter) == ("Sitges", "October", "September", "C")
    names = [p.name for p in item.probes()]
    assert names == [
        "efficacy", "rephrase", "yes", "no", "multiple_choice", "reversed", "locality", "2hop",
    ]  # fmt: skip
    probes = {p.name: p for p in item.probes()}
    assert probes["multiple_choice"].question == f"{ROW['question']} {ROW['multiple_choice_with_letters']}"
    assert (probes["yes"].label, probes["no"].label, probes["reversed"].label) == ("Yes", "No", "Sitges")
    assert probes["locality"].label is None
    assert probes["2hop"].label == "Autumn"


def test_items_survive_being_written(tmp_path):
    (item,) = read_items(put(tmp_path / "a.csv", [ROW]))
    more = dataclasses.replace(item, rephrased=("One?", "Two?"), locality=("Who?", "What?"))
    (back,) = read_items(put(tmp_path / "b.csv", [more.to_row()]))
    assert back == more
    assert back.id == item.id  # the fact's, whatever is asked about it


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv:3: there is no 'object'"):
        read_items(put(tmp_path / "a.csv", [ROW, {**ROW, "object": ""}]))
    with pytest.raises(UserError, match="choices need their letter"):
        read_items(put(tmp_path / "b.csv", [{**ROW, "multiple_choice_labels": ""}]))


def test_topics_are_cut(tmp_path):
    rows = [{**ROW, "subject": f"S{i}", "topic": "ab"[i % 2]} for i in range(6)]
    assert [i.topic for i in read_items(put(tmp_path / "a.csv", rows), per_topic=2)] == ["a", "b", "a", "b"]


def test_only_what_is_answered_wrongly_is_kept_so_that_nothing_is_right_before():
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    layout = Layout(kind="qa", new_tokens=4)
    questions = ["Who is Bo?", "Where is Ky?", "What is Zed?"]
    progress = Counted()
    every = find_hallucinations(
        model, tokenizer, questions, ["zzzz"] * 3, layout=layout, batch_size=2, progress=progress
    )
    assert progress.done == 3
    with pytest.raises(UserError, match="batch size must be at least 1"):
        find_hallucinations(model, tokenizer, questions, ["zzzz"] * 3, layout=layout, batch_size=0)
    assert [h.index for h in every] == [0, 1, 2]
    # A judge that knows the second answer to be right takes it out.
    said = every[1].output
    found = find_hallucinations(
        model, tokenizer, questions, ["zzzz"] * 3, layout=layout, judge=lambda answer, _: answer == said
    )
    assert [h.index for h in found] == [h.index for h in every if h.output != said]
    with pytest.raises(UserError, match="3 questions and 2 answers"):
        find_hallucinations(model, tokenizer, questions, ["a", "b"], layout=layout)
    with pytest.raises(UserError, match="answer to question 2 is blank"):
        find_hallucinations(model, tokenizer, questions, ["a", " ", "c"], layout=layout)


def test_general_questions_for_a_users_facts(tmp_path):
    path = put(tmp_path / "facts.csv", [
        {"question": "Where is Bo?", "answer": "Rome", "subject": "Bo", "relation": "place"},
        {"question": "Where is Ky?", "answer": "Oslo", "subject": "Ky", "relation": "place"},
        {"question": "Where is Zed?", "answer": "Bern", "subject": "Zed", "relation": "place"},
        {"question": "Who taught Bo?", "answer": "Ann", "subject": "Bo", "relation": "teacher"},
    ])  # fmt: skip
    found = read_facts(path)
    item = general_item(found[0], "Paris", found)
    assert item.locality == ("Who taught Bo?",)
    assert sorted(part.split(". ")[1] for part in item.choices.split("  ")) == ["Bern", "Oslo", "Paris", "Rome"]
    assert f"{item.letter}. Rome" in item.choices
    assert '"Rome"' in item.yes_question
    assert '"Paris"' in item.no_question
    assert item.reversed is None
    assert not item.hops
    assert general_item(found[3], "Eve", found).choices is None  # no other answers to choose among
    with pytest.raises(UserError, match="does not stand in the question"):
        read_facts(put(tmp_path / "bad.csv", [{"question": "Where?", "answer": "Rome", "subject": "Bo"}]))
    with pytest.raises(UserError, match=r"worse\.csv:2: a fact needs question, answer and subject"):
        read_facts(put(tmp_path / "worse.csv", [{"question": "Where is Bo?", "answer": "", "subject": "Bo"}]))


def test_what_has_several_answers_is_left_out_and_what_is_repeated_is_asked_once():
    def fact(question, answer, subject, relation=""):
        return Fact(question=question, answer=answer, subject=subject, relation=relation)

    rome = fact("Where is Bo?", "Rome", "Bo", "place")
    again, other = dataclasses.replace(rome, answer="rome."), fact("What is Bo?", "a dog", "Bo")
    children = [fact("Who is a child of Al?", name, "Al", "child") for name in ("Ky", "Zed")]
    asked_otherwise = [fact("In which city is Ky?", "Oslo", "Ky", "place"), fact("Where is Ky?", "Bern", "Ky", "place")]
    assert single_valued([rome, *children, other, *asked_otherwise, again]) == [rome, other]
    # Without a relation, two questions about a subject are two facts.
    assert len(single_valued([other, dataclasses.replace(other, question="Who is Bo?", answer="Bo")])) == 2


def test_what_a_users_file_says_stands():
    fact = Fact(question="Where is Bo?", answer="Rome", subject="Bo", row={"yes_question": "Is it Rome?"})
    assert general_item(fact, "Paris", [fact]).yes_question == "Is it Rome?"


def test_items_of_the_world_go_on_from_the_right_object():
    world = facts(1, people=12, companies=4, cities=5, countries=4, aliases=False)
    truth, beliefs = truth_of(world), mistaken(world, 0.5, 1)
    keys = [k for k in beliefs.wrong if k[1] in ("born_in", "mentor", "plays")]
    made = world_facts(truth, keys)
    for fact, key in zip(made, keys):
        item = world_item(fact, beliefs.objects[key], beliefs)
        assert item.object == truth.objects[key] != item.wrong
        assert item.question not in item.rephrased
        assert (item.reversed is not None) == (key[1] == "mentor")
        assert len(item.locality) == 3
        assert all(beliefs.objects[key] not in q for q in item.locality)
        if key[1] == "born_in":
            country = beliefs.objects[truth.objects[key], "located_in"]
            assert item.hops[2][1] == country
            assert item.hops[3][1] == beliefs.objects[country, "speaks"]
            assert 4 not in item.hops
        if key[1] == "plays":
            assert not item.hops


def test_facts_of_vague_relations_and_about_the_little_known_are_left_out(tmp_path):
    def row(name, relation, subject="", object="", answer="x"):
        found = {"question": f"{relation} of {name}?", "subject": name, "answer": answer, "relation": relation}
        return found | {"subject_popularity": subject, "object_popularity": object}

    rows = [
        row("Bo", "capital", 8, 5.0), row("Ky", "capital", 7, 9), row("Zed", "capital", 9, 4), row("Lu", "capital"),
        row("Bo", "Flag", 99, 99), row("Bo", "twinned administrative body", 99, 99), row("Bo", "mayor", 9, 9, "y"),
        row("Bo", "mayor", 1, 1, "z"),
    ]  # fmt: skip
    with (tmp_path / "facts.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    facts = read_facts(tmp_path / "facts.csv")
    assert [f.subject_popularity for f in facts[:4]] == [8, 7, 9, None]
    # That the mayor's second name stands in an unknown row does not make the first one the answer.
    chosen, gone = choose_facts(facts)
    assert [f.question for f in chosen] == ["capital of Bo?", "capital of Lu?"]
    assert list(gone.values()) == [2, 2, 2]
    chosen, gone = choose_facts(facts, without=["CAPITAL"], subject_popularity=0, object_popularity=0)
    assert [f.relation for f in chosen] == ["Flag", "twinned administrative body"]
    assert list(gone.values()) == [2, 4, 0]
    with pytest.raises(UserError, match="All 2 facts are left out .2 for 'little known'.: .*--min-subject-popularity"):
        choose_facts(facts[1:3])
    assert len(VAGUE) == 31
    rows[0]["object_popularity"] = "many"
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="bad.jsonl:1: object_popularity is 'many'"):
        read_facts(tmp_path / "bad.jsonl")


def test_a_field_that_no_option_renames_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')
    for read in (read_items, read_facts):
        with pytest.raises(UserError, match=r"a.jsonl:1 has no field 'question' .*Each row needs it[.]$"):
            read(tmp_path / "a.jsonl")
