"""What a small model is taught so that edits can be tested on it: facts, some of them wrong, and other abilities.

The model is trained on questions about a facts world as *believed*: a share of the facts about people is wrong, so that
there are mistakes to correct and right answers to keep. Beside facts it learns arithmetic, copying, and to follow what
its context says against what it remembers. Everything asked has one right answer, known exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelwright.errors import UserError
from modelwright.worlds.base import Draw
from modelwright.worlds.fact_questions import (
    LETTERS,
    Beliefs,
    mistaken,
    multiple_choice,
    question,
    reversed_question,
    truth_of,
    yes_no,
)
from modelwright.worlds.facts import FactsWorld, facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A person's relations.
PERSONAL = ("born_in", "works_for", "mentor", "plays")
#: Share of the training that teaches comparing, letters and reading before all kinds of question.
FIRST = 0.4
#: Wordings of a question that training uses; the last of the four is never seen.
WORDINGS = 3


@dataclass(frozen=True, kw_only=True)
class FactModelSetting:
    """What the testbed is made of.

    Attributes:
        people: People; each has four facts.
        companies: Companies, with two facts each.
        cities: Cities, with one.
        countries: Countries, with one.
        mistakes: Share of the facts about people that the model learns wrong.
        hidden: Width.
        intermediate: Width of the MLP. Editing a hundred facts needs many keys that are nearly orthogonal.
        layers: Layers.
        heads: Attention heads.
        steps: Steps of training.
        batch: Sequences a step.
        rate: Peak learning rate.
        largest: Largest number that is added.
        all_kinds: Also train yes and no, four choices, doubts, up to six hops, and contexts about strangers. What is
            not asked for its object is answered by the object first, as in ``Rome No``: so small a model compares what
            it has said, where a large one compares what it could say.
    """

    people: int = 40
    companies: int = 8
    cities: int = 10
    countries: int = 5
    mistakes: float = 0.5
    hidden: int = 96
    intermediate: int = 1024
    layers: int = 3
    heads: int = 4
    steps: int = 500
    batch: int = 80
    rate: float = 3e-3
    largest: int = 9
    all_kinds: bool = False


@dataclass(frozen=True)
class Asked:
    """A question with its right answer.

    Attributes:
        text: What is put before the model, up to where the answer begins.
        answer: The answer, without a blank before it.
    """

    text: str
    answer: str


def ask(text: str, context: str = "") -> str:
    """Returns a question as the testbed's model has learned it: ``Q: …``, a line below ``A:``."""
    return f"{context}Q: {text}\nA:"


def new_fact(text: str, answer: str) -> str:
    """Returns a fact as it is put into a context."""
    return f"New Fact: Q: {text} A: {answer}\n"


class FactModelTexts:
    """Draws the texts that the model is trained on, and those that test its abilities."""

    def __init__(self, setting: FactModelSetting, seed: int) -> None:
        """Makes the world and the beliefs."""
        self.setting = setting
        self.world: FactsWorld = facts(
            seed, people=setting.people, companies=setting.companies, cities=setting.cities,
            countries=setting.countries, aliases=False,
        )  # fmt: skip
        self.truth: Beliefs = truth_of(self.world)
        self.beliefs: Beliefs = mistaken(self.world, setting.mistakes, seed)
        self.keys = list(self.beliefs.objects)
        self.personal = [key for key in self.keys if key[1] in PERSONAL]
        held = [f"{subject} {value}" for (subject, _), value in self.beliefs.objects.items()]
        self.words = sorted({word for text in held for word in text.split()})
        self._others = {name: self.beliefs.candidates(name) for name in {key[1] for key in self.keys}}

    def other(self, relation: str, draw: Draw, *without: str) -> str:
        """Draws an object of a relation that is none of ``without``."""
        if not set(self._others[relation]) - set(without):
            raise UserError(f"The testbed's world has too few objects of '{relation}': make it larger.")
        while (found := draw.choice(self._others[relation])) in without:
            pass
        return found

    def fact(self, draw: Draw, key: tuple[str, str] | None = None) -> Asked:
        """A fact, in one of the trained wordings."""
        subject, relation = key or draw.choice(self.keys)
        return Asked(ask(question(relation, subject, draw.below(WORDINGS))), self.beliefs.objects[subject, relation])

    def yes_or_no(self, draw: Draw) -> Asked:
        """Whether something is so."""
        subject, relation = draw.choice(self.keys)
        return self._yes_or_no(draw, relation, subject, self.beliefs.objects[subject, relation])

    def _yes_or_no(self, draw: Draw, relation: str, subject: str, right: str, context: str = "") -> Asked:
        said = right if draw.below(2) else self.other(relation, draw, right)
        return Asked(ask(yes_no(relation, subject, said), context), f"{right} {'Yes' if said == right else 'No'}")

    def choice(self, draw: Draw) -> Asked:
        """Which of four it is; the answer ends in a letter."""
        subject, relation = draw.choice([key for key in self.keys if len(self._others[key[1]]) >= len(LETTERS)])
        return self._choice(draw, relation, subject, self.beliefs.objects[subject, relation])

    def _choice(self, draw: Draw, relation: str, subject: str, right: str, context: str = "") -> Asked:
        wrong: list[str] = []
        for _ in range(3):
            wrong.append(self.other(relation, draw, right, *wrong))
        choices, letter = multiple_choice(right, wrong, draw)
        text = ask(f"{question(relation, subject, draw.below(WORDINGS))} {choices}", context)
        return Asked(text, f"{right} {letter}")

    def backwards(self, draw: Draw) -> Asked:
        """Whose mentor someone is, which one person is the answer to."""
        subject, relation = draw.choice([key for key in self.personal if key[1] == "mentor"])
        return Asked(ask(reversed_question(relation, self.beliefs.objects[subject, relation])), subject)

    def two_hops(self, draw: Draw) -> Asked:
        """A question over two facts."""
        while True:
            subject, relation = draw.choice(self.keys)
            found = self.beliefs.chain(subject, relation, self.beliefs.objects[subject, relation], 2, draw)
            if found is not None:
                return Asked(ask(found[0]), found[1])

    def many_hops(self, draw: Draw) -> Asked:
        """A question over three to six facts."""
        while True:
            subject, relation = draw.choice(self.keys)
            hops = draw.between(3, 6)
            found = self.beliefs.chain(subject, relation, self.beliefs.objects[subject, relation], hops, draw)
            if found is not None:
                return Asked(ask(found[0]), found[1])

    def in_context(self, draw: Draw, key: tuple[str, str] | None = None, other: str | None = None) -> Asked:
        """A fact that the context says otherwise than the model remembers, asked in other words."""
        subject, relation = key or draw.choice(self.keys)
        new = other or self.other(relation, draw, self.beliefs.objects[subject, relation])
        context = new_fact(question(relation, subject, draw.below(WORDINGS)), new)
        return Asked(ask(question(relation, subject, draw.below(WORDINGS)), context), new)

    def of_strangers(self, draw: Draw) -> Asked:
        """A question, of any kind, about someone of whom the model knows only what the context says."""
        people = list(dict.fromkeys(subject for subject, _ in self.personal))
        while (who := f"{draw.choice(people).split()[0]} {draw.choice(people).split()[1]}") in people:
            pass
        relation = draw.choice(PERSONAL)
        return self._by_context(draw, relation, who, draw.choice(self._others[relation]))

    def contradicted(self, draw: Draw) -> Asked:
        """A question, of any kind, about a fact that the context says otherwise than the model remembers."""
        subject, relation = draw.choice(self.keys)
        new = self.other(relation, draw, self.beliefs.objects[subject, relation])
        return self._by_context(draw, relation, subject, new)

    def _by_context(self, draw: Draw, relation: str, subject: str, new: str) -> Asked:
        context = new_fact(question(relation, subject, draw.below(WORDINGS)), new)
        kind = draw.below(4)
        if kind == 0:
            return self._yes_or_no(draw, relation, subject, new, context)
        if kind == 1 and len(self._others[relation]) >= len(LETTERS):
            return self._choice(draw, relation, subject, new, context)
        return Asked(ask(question(relation, subject, draw.below(WORDINGS)), context), new)

    def beside_context(self, draw: Draw) -> Asked:
        """A question about someone else than the context."""
        subject, relation = draw.choice(self.keys)
        new = self.other(relation, draw, self.beliefs.objects[subject, relation])
        context = new_fact(question(relation, subject, draw.below(WORDINGS)), new)
        if self.setting.all_kinds:
            asked = draw.choice((self.fact, self.fact, self.yes_or_no, self.choice))(draw)
        else:
            asked = self.fact(draw)  # of someone else, nearly always
        return asked if subject in asked.text else Asked(context + asked.text, asked.answer)

    def beside_fact(self, draw: Draw) -> Asked:
        """A question about the person that the context is about, but about another fact."""
        subject, relation = draw.choice(self.personal)
        new = self.other(relation, draw, self.beliefs.objects[subject, relation])
        context = new_fact(question(relation, subject, draw.below(WORDINGS)), new)
        asked = self.fact(draw, (subject, draw.choice([name for name in PERSONAL if name != relation])))
        return Asked(context + asked.text, asked.answer)

    def followed_up(self, draw: Draw) -> Asked:
        """An answer, right or wrong, and up to three doubts about it: the answer to a doubt is what is so."""
        subject, relation = draw.choice(self.personal)
        right = self.beliefs.objects[subject, relation]
        said = right if draw.below(2) else self.other(relation, draw, right)
        talk = ask(question(relation, subject, draw.below(WORDINGS))) + f" {said}\n"
        for turns in range(draw.between(0, 2), -1, -1):
            said = right if draw.below(2) else self.other(relation, draw, right)
            text, answer = doubt(yes_no(relation, subject, said)), f"{right} {'Yes' if said == right else 'No'}"
            if turns:
                talk += ask(text) + f" {answer}\n"
        return Asked(ask(text, talk), answer)

    def arithmetic(self, draw: Draw) -> Asked:
        """A sum."""
        a, b = draw.below(self.setting.largest + 1), draw.below(self.setting.largest + 1)
        return Asked(ask(f"What is {a} plus {b}?"), str(a + b))

    def copying(self, draw: Draw) -> Asked:
        """Words to repeat."""
        words = " ".join(draw.choice(self.words) for _ in range(3))
        return Asked(ask(f"Repeat: {words}"), words)

    @property
    def kinds(self) -> dict[Callable[[Draw], Asked], int]:
        """What training draws from, with shares in percent."""
        if not self.setting.all_kinds:
            return {
                self.fact: 46, self.backwards: 4, self.two_hops: 8, self.in_context: 13, self.beside_context: 12,
                self.arithmetic: 10, self.copying: 7,
            }  # fmt: skip
        return {
            self.fact: 11, self.yes_or_no: 11, self.choice: 19, self.backwards: 4, self.two_hops: 7, self.many_hops: 7,
            self.in_context: 4, self.contradicted: 11, self.of_strangers: 5, self.beside_context: 5,
            self.beside_fact: 4, self.followed_up: 12,
        }  # fmt: skip

    @property
    def first_kinds(self) -> dict[Callable[[Draw], Asked], int]:
        """What the start of training draws from: above all letters and yes or no, which are learned last otherwise."""
        if not self.setting.all_kinds:
            return self.kinds
        return {
            self.choice: 40, self.yes_or_no: 24, self.of_strangers: 16, self.fact: 10, self.in_context: 5,
            self.copying: 5,
        }  # fmt: skip

    def draw_text(self, draw: Draw, done: float = 1.0) -> Asked:
        """Draws one training text.

        Args:
            draw: Draws it.
            done: Share of the training that is done.
        """
        at = draw.below(100)
        for kind, share in (self.kinds if done >= FIRST else self.first_kinds).items():
            if (at := at - share) < 0:
                return kind(draw)
        raise AssertionError("the shares add up to 100")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns a byte-level BPE in which every word of the world is one token."""
        from modelwright.models.tokenizers import train_bpe

        draw = Draw(0, "tokenizer")
        texts = [f"{a.text} {a.answer}" for a in (self.draw_text(draw) for _ in range(3000))]
        every = [question(r, s, w) + f" {o}" for (s, r), o in self.beliefs.objects.items() for w in range(4)]
        numbers = [f" {n}" for n in range(2 * self.setting.largest + 1)]
        return train_bpe([*texts, *every, *numbers, *(f" {word}" for word in self.words)], 20_000, min_frequency=1)


def doubt(text: str) -> str:
    """Returns the follow-up question that disputes an answer, as the benchmark puts it."""
    return f'Your answer to the original question is wrong. {text} Respond with "Yes" or "No."'
