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
        all_kinds: Also train yes and no, four choices and doubts, which a small model is slow to learn.
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
        right = self.beliefs.objects[subject, relation]
        if draw.below(2):
            return Asked(ask(yes_no(relation, subject, right)), "Yes")
        return Asked(ask(yes_no(relation, subject, self.other(relation, draw, right))), "No")

    def choice(self, draw: Draw) -> Asked:
        """Which of four it is; the answer is a letter."""
        subject, relation = draw.choice([key for key in self.keys if len(self._others[key[1]]) >= len(LETTERS)])
        return self._choice(draw, relation, subject, self.beliefs.objects[subject, relation])

    def _choice(self, draw: Draw, relation: str, subject: str, right: str, context: str = "") -> Asked:
        wrong: list[str] = []
        for _ in range(3):
            wrong.append(self.other(relation, draw, right, *wrong))
        choices, letter = multiple_choice(right, wrong, draw)
        return Asked(ask(f"{question(relation, subject, draw.below(WORDINGS))} {choices}", context), letter)

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

    def in_context(self, draw: Draw, key: tuple[str, str] | None = None, other: str | None = None) -> Asked:
        """A fact that the context says otherwise than the model remembers, asked in other words."""
        subject, relation = key or draw.choice(self.keys)
        new = other or self.other(relation, draw, self.beliefs.objects[subject, relation])
        context = new_fact(question(relation, subject, draw.below(WORDINGS)), new)
        return Asked(ask(question(relation, subject, draw.below(WORDINGS)), context), new)

    def beside_context(self, draw: Draw) -> Asked:
        """A question under a context that says something about it, or nothing: also yes, no and choices."""
        subject, relation = draw.choice(self.keys)
        old = self.beliefs.objects[subject, relation]
        new = self.other(relation, draw, old)
        context = new_fact(question(relation, subject, draw.below(WORDINGS)), new)
        kinds = 4 if len(self._others[relation]) >= len(LETTERS) else 3
        kind = draw.below(kinds) if self.setting.all_kinds else 0
        if kind == 0:
            asked = self.fact(draw)  # of someone else, nearly always
            return asked if subject in asked.text else Asked(context + asked.text, asked.answer)
        if kind == 1:
            return Asked(ask(yes_no(relation, subject, new), context), "Yes")
        if kind == 2:
            return Asked(ask(yes_no(relation, subject, self.other(relation, draw, new)), context), "No")
        return self._choice(draw, relation, subject, new, context)

    def followed_up(self, draw: Draw) -> Asked:
        """A fact, and a doubt about it: the answer to the doubt is what is so."""
        subject, relation = draw.choice(self.personal)
        right = self.beliefs.objects[subject, relation]
        first = ask(question(relation, subject, draw.below(WORDINGS))) + f" {right}\n"
        said = right if draw.below(2) else self.other(relation, draw, right)
        return Asked(ask(doubt(yes_no(relation, subject, said)), first), "Yes" if said == right else "No")

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
            self.fact: 34, self.yes_or_no: 12, self.choice: 8, self.backwards: 3, self.two_hops: 8, self.in_context: 9,
            self.beside_context: 10, self.followed_up: 4, self.arithmetic: 6, self.copying: 6,
        }  # fmt: skip

    def draw_text(self, draw: Draw) -> Asked:
        """Draws one training text."""
        at = draw.below(100)
        for kind, share in self.kinds.items():
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
