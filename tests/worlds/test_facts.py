import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.worlds.facts import RELATIONS, facts

BY_NAME = {relation.name: relation for relation in RELATIONS}


@pytest.fixture(scope="module")
def world():
    return facts(0, max_hops=3)


def read_statement(text):
    """Finds the fact in a sentence from its wording alone, without the row's fields."""
    found = set()
    for relation in RELATIONS:
        for statement in relation.statements:
            pattern = re.escape(statement).replace(r"\{s\}", "(?P<s>.+)").replace(r"\{o\}", "(?P<o>.+)")
            if match := re.fullmatch(pattern, text):
                found.add((match["s"], relation.name, match["o"]))
    return found


@pytest.fixture(scope="module")
def memory(world):
    """What someone knows who has only read the corpus: (subject, relation) -> object."""
    known = {}
    entities = {fact["subject"] for fact in world.facts} | {fact["object"] for fact in world.facts}
    for row in world.corpus:
        (fact,) = [f for f in read_statement(row["text"]) if f[0] in entities and f[2] in entities]
        assert known.setdefault(fact[:2], fact[2]) == fact[2], "the corpus contradicts itself"
    return known


def test_fingerprints_never_change():
    assert facts(0).fingerprint() == "88762b25ada1ab02df3832dc60305905c3919e8ab4f81327004485c800f9379c"
    odd = facts(1, popularity_skew=1.0, max_hops=4, aliases=False, heldout_templates=2)
    assert odd.fingerprint() == "1624d7046dec16fe584c77ef43a3f5f71cf18168a4c779d06f351edaa9a9875c"
    assert (
        facts(2, repeat_counts=(1, 2, 4)).fingerprint()
        == "e1b56ce78ae5ce862f344912c4d25ff232e5cc8687c91e91358c97c79bdf82b0"
    )


def test_the_corpus_says_every_fact_and_nothing_else(world, memory):
    assert memory == {(f["subject"], f["relation"]): f["object"] for f in world.facts}
    assert len(memory) == len(world.facts) == 100 * 5 + 20 * 2 + 25 + 8


def test_every_answer_is_in_the_corpus(world, memory):
    names = {"questions_train", "questions_heldout_template", "questions_heldout_fact"}
    for name in names:
        rows = world.splits()[name]
        assert rows
        for row in rows:
            number = int(row["template"].split(".q")[1])
            assert row["question"] == BY_NAME[row["relation"]].questions[number].format(s=row["subject"])
            assert memory[row["subject"], row["relation"]] == row["answer"] == row["object"]
            assert row["answer"] not in row["question"]


def test_aliases_lead_to_the_same_answers(world, memory):
    assert len(world.questions_alias) == 400
    for row in world.questions_alias:
        assert memory[row["subject"], "alias"] == row["alias"]
        assert row["alias"] in row["question"]
        assert row["subject"] not in row["question"]
        assert memory[row["subject"], row["relation"]] == row["answer"]


def ask(question, memory):
    """Answers a nested question by putting what memory says in place of its innermost phrase, until it is simple."""
    while True:
        for (subject, relation), answer in memory.items():
            if question in (q.format(s=subject) for q in BY_NAME[relation].questions):
                return answer
        for (subject, relation), answer in memory.items():
            if (phrase := BY_NAME[relation].phrase.format(s=subject)) in question:
                question = question.replace(phrase, answer)
                break
        else:
            raise AssertionError(question)


def test_multi_hop_answers_follow_from_the_text_of_the_question(world, memory):
    rows = [*world.multi_hop_train, *world.multi_hop_heldout]
    assert Counter(row["hops"] for row in rows).keys() == {2, 3}
    for row in rows[:: len(rows) // 60]:
        assert ask(row["question"], memory) == row["answer"]
    for row in rows:
        place = row["subject"]
        for subject, relation, obj in row["chain"]:
            assert subject == place
            place = memory[subject, relation]
            assert place == obj
        assert place == row["answer"]
        assert row["answer"] not in row["question"]
        assert len(row["chain"]) == row["hops"]


def test_all_chains_are_asked(world):
    # From each person: 7 chains of two facts (2 over the city, 2 over the company, 4 over the mentor, less aliases).
    two = [row for row in (*world.multi_hop_train, *world.multi_hop_heldout) if row["hops"] == 2]
    of_people = Counter(row["relation"] for row in two if " " in row["subject"])
    assert of_people == dict.fromkeys(
        ["born_in/located_in", "works_for/based_in", "works_for/makes", "mentor/born_in", "mentor/works_for",
         "mentor/mentor", "mentor/plays"], 100,
    )  # fmt: skip


def test_conflicts_contradict(world, memory):
    assert {row["relation"] for row in world.conflicts} == BY_NAME.keys() - {"alias"}
    for row in world.conflicts:
        said = {f for f in read_statement(row["context"]) if f[:2] == (row["subject"], row["relation"])}
        assert said == {(row["subject"], row["relation"], row["answer_in_context"])}
        assert memory[row["subject"], row["relation"]] == row["answer_in_memory"] != row["answer_in_context"]
        assert row["answer_in_memory"] not in row["context"]
        assert row["subject"] in row["question"]
        assert row["answer_in_context"] != row["subject"]


def test_wordings_and_facts_are_held_out(world):
    def wordings(name):
        return {row["template"] for row in world.splits()[name]}

    assert not wordings("corpus") & wordings("paraphrases")
    assert wordings("questions_train") == wordings("questions_heldout_fact")
    assert not wordings("questions_train") & wordings("questions_heldout_template")
    assert len(wordings("corpus") | wordings("paraphrases")) == 9 * 5
    heldout = {(f["subject"], f["relation"]) for f in world.facts if f["heldout"]}
    for relation in BY_NAME:
        n = sum(f["relation"] == relation for f in world.facts)
        assert sum(key[1] == relation for key in heldout) == round(n * 0.2)

    def asked(name):
        return {(row["subject"], row["relation"]) for row in world.splits()[name]}

    assert asked("questions_heldout_fact") == heldout
    assert not asked("questions_train") & heldout
    assert not asked("questions_heldout_template") & heldout
    assert not any((s, r) in heldout for row in world.multi_hop_train for s, r, _ in row["chain"])
    assert all(any((s, r) in heldout for s, r, _ in row["chain"]) for row in world.multi_hop_heldout)
    questions = [{row["question"] for row in rows} for name, rows in world.splits().items() if "question" in name]
    assert sum(map(len, questions)) == len(set().union(*questions))


def test_repeats_are_exact(world):
    counts = Counter((row["subject"], row["relation"]) for row in world.corpus)
    assert set(counts.values()) == {4}
    # Four statements of a fact are four wordings.
    assert len({row["text"] for row in world.corpus}) == len(world.corpus)
    chosen = facts(0, repeat_counts=(1, 3, 9))
    counts = Counter((row["subject"], row["relation"]) for row in chosen.corpus)
    assert all(counts[f["subject"], f["relation"]] == f["times"] for f in chosen.facts)
    assert Counter(counts.values()) == {1: 191, 3: 191, 9: 191}


def test_popularity_follows_zipf():
    world = facts(0, people=500, repeats=10, popularity_skew=1.0)
    by_subject = {f["subject"]: f["times"] for f in world.facts}
    times = sorted(by_subject.values(), reverse=True)
    assert times[0] / times[9] == pytest.approx(10, rel=0.02)
    assert times[-1] == 1
    assert sum(f["times"] for f in world.facts) == len(world.corpus)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**9), people=st.integers(3, 60), cities=st.integers(2, 20))
def test_names_are_unambiguous(seed, people, cities):
    world = facts(seed, people=people, companies=2, cities=cities, countries=2, repeats=1)
    names = {f["subject"] for f in world.facts} | {f["object"] for f in world.facts}
    assert not any(a in b for a in names for b in names if a != b)
    wordings = " ".join(text for r in RELATIONS for text in (r.phrase, *r.statements, *r.questions)).lower()
    words = {word.strip("?.,") for word in wordings.split()}
    assert not words & {word.lower() for name in names if name[0].isupper() for word in name.split()}
    assert len({f["subject"] for f in world.facts}) == people + 2 + cities + 2
    assert len({(f["subject"], f["relation"]) for f in world.facts}) == len(world.facts)


def test_truth_lists_relations_and_objects(world):
    assert world.truth["relations"]["born_in"] == ["person", "city"]
    assert len(world.truth["objects"]["person"]) == 100
    assert "alias" not in facts(0, aliases=False).truth["relations"]
