"""Questions and the statements that answer them, made of the facts' world: text pairs with known truth.

For text embeddings, contrastive training, and methods that choose pairs. A question and the statement of the same fact
belong together. The hard negatives are statements that share the relation or the subject, but not both. In the pool,
some questions stand beside the statement of another fact.

Everything is generated: the same seed gives the same bytes on every machine and Python version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelwright.errors import UserError
from modelwright.worlds.base import Draw, Row, World, check_at_least, check_share
from modelwright.worlds.facts import RELATIONS, facts

_BY_NAME = {relation.name: relation for relation in RELATIONS}
Key = tuple[str, str]


@dataclass(frozen=True)
class FactPairsWorld(World):
    """Pairs of a question and a statement. Every row has these fields.

    ``query`` (a question), ``positive`` (a statement that answers it, unless the row is mismatched), ``negative_1``
    (a statement of the same relation about another subject), ``negative_2`` (a statement about the same subject by
    another relation; where nothing else is known of it, another of the same relation), ``kind`` (clean or mismatched),
    ``clean``, ``wrong`` (None, or in what the statement's fact differs from the question's: ``subject``, ``relation``,
    or ``fact`` for both), ``subject``, ``relation``, ``object`` (of the question's fact), ``question_template``,
    ``statement_template``.

    In the held-out splits each fact stands once, so a question has one right statement.

    Attributes:
        train: The pool, shuffled: training facts in training wordings.
        reference: A small curated set: clean rows of training facts in training wordings.
        heldout: Facts that are in no other split, in training wordings.
        heldout_wordings: Training facts, question and statement in held-out wordings.
    """

    train: list[Row]
    reference: list[Row]
    heldout: list[Row]
    heldout_wordings: list[Row]

    @property
    def truth(self) -> dict[str, Any]:
        """``clean_share`` of the pool, and ``heldout_facts``: [subject, relation] of the held-out ones."""
        return {
            "clean_share": sum(row["clean"] for row in self.train) / len(self.train),
            "heldout_facts": [[row["subject"], row["relation"]] for row in self.heldout],
        }


def fact_pairs(
    seed: int = 0,
    *,
    people: int = 400,
    companies: int = 80,
    cities: int = 100,
    countries: int = 30,
    aliases: bool = True,
    pairs_per_fact: int = 2,
    reference_size: int = 400,
    mismatched_share: float = 0.4,
    near_share: float = 0.0,
    heldout_facts: float = 0.2,
    heldout_templates: int = 1,
) -> FactPairsWorld:
    """Makes the world on the facts of :func:`modelwright.worlds.facts.facts` with the same seed and sizes.

    Args:
        seed: Decides everything.
        people: Number of people, of whom five facts are known each.
        companies: Number of companies (two facts each).
        cities: Number of cities (one fact each).
        countries: Number of countries (one fact each).
        aliases: Give each person a second name (otherwise four facts for each person).
        pairs_per_fact: How many rows of the pool each training fact has, in wordings drawn at random.
        reference_size: Rows of the curated set, each of another fact; at most as many as there are training facts.
        mismatched_share: Share of the pool that stands beside the statement of another fact.
        near_share: Share of the mismatched rows whose statement is a hard negative: of the same relation or about the
            same subject.
        heldout_facts: Share of each relation's facts that only the split ``heldout`` has.
        heldout_templates: Number of wordings of each statement and question that are held out, 1 to 3.

    Raises:
        UserError: A parameter is out of range.
    """
    parameters = locals().copy()
    check_at_least(1, pairs_per_fact=pairs_per_fact)
    check_at_least(0, reference_size=reference_size)
    check_share(mismatched_share=mismatched_share, near_share=near_share)
    world = facts(
        seed, people=people, companies=companies, cities=cities, countries=countries, aliases=aliases, repeats=1,
        heldout_facts=heldout_facts, heldout_templates=heldout_templates,
    )  # fmt: skip
    train = [fact for fact in world.facts if not fact["heldout"]]
    if len(train) < 2:
        raise UserError(f"heldout_facts is {heldout_facts}, which leaves no facts to train on: give a smaller share.")
    if reference_size > len(train):
        raise UserError(f"reference_size is {reference_size}, but there are {len(train)} training facts: give fewer.")
    # What is trained on quotes training facts only, in its negatives and wrong statements too.
    maker, heldout_maker = (_Maker(seed, known, heldout_templates) for known in (train, world.facts))
    curated = Draw(seed, "curated").shuffled(train)[:reference_size]
    return FactPairsWorld(
        parameters,
        train=maker.pool(train, pairs_per_fact, mismatched_share, near_share),
        reference=[maker.row(fact, "reference") for fact in curated],
        heldout=[heldout_maker.row(fact, "heldout") for fact in world.facts if fact["heldout"]],
        heldout_wordings=[maker.row(fact, "heldout wordings", new_wordings=True) for fact in train],
    )


class _Maker:
    """Makes rows of facts as the facts' world lists them."""

    def __init__(self, seed: int, known: list[Row], heldout_templates: int) -> None:
        self.seed = seed
        self.heldout_templates = heldout_templates
        self.known = known
        self.by_relation: dict[str, list[Row]] = {}
        self.by_subject: dict[str, list[Row]] = {}
        for fact in known:
            self.by_relation.setdefault(fact["relation"], []).append(fact)
            self.by_subject.setdefault(fact["subject"], []).append(fact)

    def wording(self, n: int, draw: Draw, new: bool) -> int:
        """Returns the number of one of ``n`` wordings, of which the last ones are held out."""
        last = n - self.heldout_templates
        return draw.between(last, n - 1) if new else draw.below(last)

    def statement(self, fact: Row, draw: Draw, new: bool) -> tuple[str, str]:
        """Returns a statement and its template."""
        relation = _BY_NAME[fact["relation"]]
        number = self.wording(len(relation.statements), draw, new)
        return relation.statements[number].format(s=fact["subject"], o=fact["object"]), f"{relation.name}.s{number}"

    def row(self, fact: Row, stream: str, new_wordings: bool = False) -> Row:
        """Returns a clean row."""
        draw = Draw(self.seed, f"{stream}/{fact['subject']}/{fact['relation']}")
        relation = _BY_NAME[fact["relation"]]
        number = self.wording(len(relation.questions), draw, new_wordings)
        positive, template = self.statement(fact, draw, new_wordings)
        return {
            "query": relation.questions[number].format(s=fact["subject"]),
            "positive": positive,
            "negative_1": self.statement(self.neighbour(fact, "subject", draw), draw, new_wordings)[0],
            "negative_2": self.statement(self.neighbour(fact, "relation", draw), draw, new_wordings)[0],
            "kind": "clean",
            "clean": True,
            "wrong": None,
            "subject": fact["subject"],
            "relation": fact["relation"],
            "object": fact["object"],
            "question_template": f"{relation.name}.q{number}",
            "statement_template": template,
        }

    def neighbour(self, fact: Row, differs: str, draw: Draw) -> Row:
        """Returns a fact that differs in subject or in relation only; where there is none, in the other or in both."""
        same_subject, same_relation = self.by_subject[fact["subject"]], self.by_relation[fact["relation"]]
        nearest = [same_subject, same_relation] if differs == "relation" else [same_relation, same_subject]
        return self.other(next((facts for facts in nearest if len(facts) > 1), self.known), fact, draw)

    def other(self, among: list[Row], fact: Row, draw: Draw) -> Row:
        """Returns any but the given one of at least two facts."""
        while (other := draw.choice(among)) is fact:
            pass
        return other

    def pool(self, train: list[Row], repeats: int, mismatched_share: float, near_share: float) -> list[Row]:
        """Returns the pool's rows in random order."""
        facts_of_rows = [fact for fact in train for _ in range(repeats)]
        rows = [self.row(fact, f"train {i}") for i, fact in enumerate(facts_of_rows)]
        wrong = Draw(self.seed, "mismatched").shuffled(range(len(rows)))[: round(mismatched_share * len(rows))]
        near = round(near_share * len(wrong))
        for turn, i in enumerate(wrong):
            rows[i].update(self.mismatched(facts_of_rows[i], i, turn < near))
        return Draw(self.seed, "order").shuffled(rows)

    def mismatched(self, fact: Row, index: int, near: bool) -> Row:
        """Returns what changes when a row gets the statement of another fact."""
        draw = Draw(self.seed, f"mismatched {index}")
        if near:
            other = self.neighbour(fact, draw.choice(("subject", "relation")), draw)
        else:
            other = self.other(self.known, fact, draw)
        wrong = "subject" if other["relation"] == fact["relation"] else "relation"
        if other["subject"] != fact["subject"] and other["relation"] != fact["relation"]:
            wrong = "fact"
        positive, template = self.statement(other, draw, False)
        return {
            "positive": positive, "kind": "mismatched", "clean": False, "wrong": wrong, "statement_template": template,
        }  # fmt: skip
