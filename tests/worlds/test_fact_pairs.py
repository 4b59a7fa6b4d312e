import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.worlds.fact_pairs import fact_pairs
from modelwright.worlds.facts import RELATIONS, facts

SIZES = {"people": 60, "companies": 12, "cities": 15, "countries": 5}


@pytest.fixture(scope="module")
def world():
    return fact_pairs(0, **SIZES, reference_size=100, near_share=0.5)


@pytest.fixture(scope="module")
def truth():
    known = facts(0, **SIZES, repeats=1).facts
    return {(f["subject"], f["relation"]): f["object"] for f in known}


@pytest.fixture(scope="module")
def read(truth):
    """Returns a function that finds the fact in a statement, or what a question asks for, from the words alone."""
    names = {name for (subject, _), o in truth.items() for name in (subject, o)}

    def wordings(kind):
        for relation in RELATIONS:
            for i, text in enumerate(getattr(relation, kind)):
                pattern = re.escape(text).replace(r"\{s\}", "(?P<s>.+)").replace(r"\{o\}", "(?P<o>.+)")
                yield relation.name, f"{relation.name}.{kind[0]}{i}", re.compile(pattern)

    patterns = {kind: list(wordings(kind)) for kind in ("statements", "questions")}

    def look(kind, text):
        found = {
            (match["s"], relation, match.groupdict().get("o"), template)
            for relation, template, pattern in patterns[kind]
            if (match := pattern.fullmatch(text)) and set(match.groups()) <= names
        }
        (one,) = found
        return one

    return look


def test_fingerprints_never_change():
    assert fact_pairs(0).fingerprint() == "5633eb974887063a5f4cb6780f1f000275f5f815fe233cb3e63d2ac324325f55"
    odd = fact_pairs(1, **SIZES, reference_size=20, near_share=0.5, aliases=False, heldout_templates=2)
    assert odd.fingerprint() == "457750b1dd1381da67ba57ffd5fb7fd92bf9dc9fb2f8d2cfa51d0f902725ee4b"


def test_clean_rows_answer_and_others_do_not(world, truth, read):
    for rows in world.splits().values():
        for row in rows:
            subject, relation, _, question_template = read("questions", row["query"])
            assert (subject, relation) == (row["subject"], row["relation"])
            assert row["object"] == truth[subject, relation]
            assert row["question_template"] == question_template
            stated, related, said, template = read("statements", row["positive"])
            assert truth[stated, related] == said
            assert row["statement_template"] == template
            wrong = {(False, True): "subject", (True, False): "relation", (False, False): "fact"}.get(
                (stated == subject, related == relation)
            )
            assert row["wrong"] == wrong
            assert row["clean"] == (wrong is None) == (row["kind"] == "clean")


def test_negatives_share_subject_or_relation_but_never_answer(world, truth, read):
    for rows in world.splits().values():
        for row in rows:
            (s1, r1, o1, _), (s2, r2, o2, _) = (read("statements", row[f"negative_{i}"]) for i in (1, 2))
            assert (truth[s1, r1], truth[s2, r2]) == (o1, o2)
            assert (s1 != row["subject"], r1) == (True, row["relation"])
            # Of a city or a country one fact is known, so there the relation stays and the subject differs.
            assert (s2 == row["subject"]) != (r2 == row["relation"])
            assert (s2 == row["subject"]) or row["relation"] in ("located_in", "speaks") or rows is not world.heldout


def test_shares(world):
    counts = world.counts["train"]
    n = len(world.train)
    assert n == 2 * len(world.heldout_wordings)
    assert counts["mismatched"] == round(0.4 * n)
    wrong = [row["wrong"] for row in world.train if not row["clean"]]
    near = sum(kind in ("subject", "relation") for kind in wrong)
    # Half are near by wish; of the others, few are by chance.
    assert round(0.5 * len(wrong)) <= near <= 0.65 * len(wrong)
    assert min(wrong.count("subject"), wrong.count("relation")) > 0.2 * near
    assert world.truth["clean_share"] == counts["clean"] / n
    assert world.counts["reference"] == {"rows": 100, "clean": 100}


def test_what_is_held_out_stays_out(world, read):
    heldout = {(row["subject"], row["relation"]) for row in world.heldout}
    assert len(heldout) == len(world.heldout)
    assert [list(fact) for fact in heldout] != []
    assert {tuple(fact) for fact in world.truth["heldout_facts"]} == heldout
    for row in (*world.train, *world.reference, *world.heldout_wordings):
        said = [read("statements", row[name])[:2] for name in ("positive", "negative_1", "negative_2")]
        assert not heldout & {(row["subject"], row["relation"]), *said}
    new = {row["question_template"] for row in world.heldout_wordings}
    new |= {row["statement_template"] for row in world.heldout_wordings}
    seen = {
        row[f"{x}_template"]
        for r in (world.train, world.reference, world.heldout)
        for row in r
        for x in ("question", "statement")
    }
    assert not new & seen
    assert len({(row["subject"], row["relation"]) for row in world.heldout_wordings}) == len(world.heldout_wordings)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6), people=st.integers(3, 9), companies=st.integers(2, 4), cities=st.integers(2, 4),
    countries=st.integers(2, 3), heldout=st.floats(0, 0.7), near=st.floats(0, 1),
)  # fmt: skip
def test_small_worlds_come_to_an_end(seed, people, companies, cities, countries, heldout, near):
    world = fact_pairs(
        seed, people=people, companies=companies, cities=cities, countries=countries, heldout_facts=heldout,
        near_share=near, reference_size=1, mismatched_share=1.0,
    )  # fmt: skip
    assert not any(row["clean"] for row in world.train)


def test_too_few_facts():
    with pytest.raises(UserError, match="reference_size is 1000, but there are"):
        fact_pairs(0, **SIZES, reference_size=1000)
    with pytest.raises(UserError, match="leaves no facts to train on"):
        fact_pairs(0, **SIZES, heldout_facts=1.0)
