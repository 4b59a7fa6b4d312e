"""A bank of question templates for the facts world: the questions that tell whether an edited fact was learnt.

Each kind asks for one fact from another side: in other words, for a yes, for a no, among four choices, backwards, and
as the first link of a chain. Everything is exact, so no judge is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from modelwright.errors import UserError, did_you_mean
from modelwright.worlds.base import Draw
from modelwright.worlds.facts import RELATIONS, FactsWorld, Relation

#: Questions whose answer is Yes exactly if ``{o}`` is the object.
YES_NO = {
    "born_in": "Was {s} born in {o}?",
    "works_for": "Does {s} work for {o}?",
    "mentor": "Is {o} the mentor of {s}?",
    "plays": "Does {s} play the {o}?",
    "based_in": "Is {s} based in {o}?",
    "makes": "Does {s} make {o}?",
    "located_in": "Does {s} lie in {o}?",
    "speaks": "Is {o} the language of {s}?",
    "alias": "Is {s} also known as {o}?",
}
#: Questions for the subject. Only where one subject has the object do they have one answer.
REVERSED = {
    "born_in": "Who was born in {o}?",
    "works_for": "Who works for {o}?",
    "mentor": "Who has {o} as mentor?",
    "plays": "Who plays the {o}?",
    "based_in": "Which company is based in {o}?",
    "makes": "Which company makes {o}?",
    "located_in": "Which city lies in {o}?",
    "speaks": "In which country do people speak {o}?",
    "alias": "Who is also known as {o}?",
}
LETTERS = "ABCD"
_BY_NAME = {relation.name: relation for relation in RELATIONS}


def relation_of(name: str) -> Relation:
    """Returns the relation of that name.

    Raises:
        UserError: The world has no such relation.
    """
    if name not in _BY_NAME:
        raise UserError(f"The facts world has no relation '{name}': {did_you_mean(name, _BY_NAME)}")
    return _BY_NAME[name]


def question(relation: str, subject: str, wording: int = 0) -> str:
    """Returns the question for the object, in one of the relation's wordings."""
    return relation_of(relation).questions[wording].format(s=subject)


def yes_no(relation: str, subject: str, object: str) -> str:
    """Returns the question whose answer is Yes exactly if ``object`` is right."""
    return YES_NO[relation_of(relation).name].format(s=subject, o=object)


def reversed_question(relation: str, object: str) -> str:
    """Returns the question for the subject."""
    return REVERSED[relation_of(relation).name].format(o=object)


def lettered(choices: Sequence[str]) -> str:
    """Returns four choices as the published benchmark writes them: ``A. this  B. that  C. …  D. …``."""
    return "  ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))


def multiple_choice(right: str, wrong: Iterable[str], draw: Draw) -> tuple[str, str]:
    """Returns four shuffled choices with letters, and the letter of the right one."""
    choices = draw.shuffled([right, *wrong])
    return lettered(choices), LETTERS[choices.index(right)]


@dataclass
class Beliefs:
    """What someone holds true in a facts world: each (subject, relation) with its object.

    Attributes:
        objects: (subject, relation) to object.
        wrong: Keys whose object is not the world's.
    """

    objects: dict[tuple[str, str], str]
    wrong: list[tuple[str, str]] = field(default_factory=list)

    def candidates(self, relation: str) -> list[str]:
        """Returns every object of a relation, in order of first appearance."""
        return list(dict.fromkeys(o for (_, name), o in self.objects.items() if name == relation))

    def relations_of(self, subject: str) -> list[str]:
        """Returns the relations of a subject."""
        return self._index.get(subject, [])

    def chain(self, subject: str, relation: str, object: str, hops: int, draw: Draw) -> tuple[str, str] | None:
        """Returns a question of ``hops`` facts that starts with a given fact, and its answer; None if there is none.

        Args:
            subject: Subject of the first fact.
            relation: Its relation.
            object: Its object, which need not be what is believed.
            hops: Facts in the chain, at least 2.
            draw: Chooses the way.
        """
        ways: list[list[tuple[str, str, str]]] = [[(subject, relation, object)]]
        for _ in range(hops - 1):
            ways = [
                [*way, (way[-1][2], name, self.objects[way[-1][2], name])]
                for way in ways
                for name in self.relations_of(way[-1][2])
                # A chain that comes back to the edited fact would have another answer after the edit.
                if name != "alias" and (way[-1][2], name) != (subject, relation)
            ]
        if not ways:
            return None
        way = draw.choice(ways)
        middle = subject
        for _, name, _ in way[:-1]:
            middle = relation_of(name).phrase.format(s=middle)
        return question(way[-1][1], middle), way[-1][2]

    @functools.cached_property
    def _index(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for subject, name in self.objects:
            found.setdefault(subject, []).append(name)
        return found


def truth_of(world: FactsWorld) -> Beliefs:
    """Returns the world's own facts as beliefs."""
    return Beliefs({(fact["subject"], fact["relation"]): fact["object"] for fact in world.facts})


def mistaken(world: FactsWorld, share: float, seed: int, relations: Iterable[str] | None = None) -> Beliefs:
    """Returns beliefs in which a share of the facts is wrong: those facts have exchanged their objects.

    So every object stays as frequent as it was, and a relation that is one to one stays so.

    Args:
        world: The facts.
        share: Share of the facts of each relation that is wrong.
        seed: Decides which.
        relations: Relations in which there are mistakes; all that start at a person by default.
    """
    beliefs = truth_of(world)
    names = [r.name for r in RELATIONS if r.subject == "person"] if relations is None else list(relations)
    for name in names:
        keys = Draw(seed, f"mistakes of {name}").shuffled(k for k in beliefs.objects if k[1] == name)
        chosen = keys[: round(len(keys) * share)]
        given = _exchanged([beliefs.objects[key] for key in chosen], [key[0] for key in chosen])
        for key, value in zip(chosen, given):
            if value != beliefs.objects[key]:
                beliefs.objects[key] = value
                beliefs.wrong.append(key)
    return beliefs


def _exchanged(objects: Sequence[str], subjects: Sequence[str]) -> list[str]:
    """Passes objects round so that, as far as possible, nobody has the same as before, nor oneself."""
    order = sorted(range(len(objects)), key=lambda i: objects[i])

    def passed(shift: int) -> list[str]:
        given = list(objects)
        for place, i in enumerate(order):
            given[i] = objects[order[(place + shift) % len(order)]]
        return given

    def clashes(given: list[str]) -> int:
        return sum(new in (old, subject) for new, old, subject in zip(given, objects, subjects))

    return min(map(passed, range(len(order))), key=clashes, default=[])
