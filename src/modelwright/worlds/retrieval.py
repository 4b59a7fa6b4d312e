"""Key-value retrieval in a long text (a needle in a haystack), at any length and depth.

For methods about long contexts, caches and retrieval heads. Sentences such as "The code of Dalimo is 482913." stand in
filler text; the question asks for one key. Prompts have exactly the length asked for, in characters, words, or tokens
of a tokenizer that is passed.

Without a tokenizer the same seed gives the same bytes on every machine and Python version; with one, also the same
tokenizer is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.errors import UserError, did_you_mean
from modelwright.worlds.base import Draw, Row, World, check_at_least
from modelwright.worlds.names import Names

# fmt: off
_ADJECTIVES = ("bright", "calm", "cold", "green", "long", "narrow", "old", "quiet", "round", "small", "tall", "warm")
_NOUNS = (
    "apple", "bird", "boat", "bridge", "cloud", "field", "forest", "hill", "house", "lake", "lamp", "leaf", "meadow",
    "mountain", "path", "rain", "river", "road", "sea", "stone", "street", "tower", "tree", "wind",
)
_VERBS = ("covers", "follows", "hides", "leaves", "meets", "passes", "reaches", "shelters", "touches", "watches")
# fmt: on
_ESSAY_SENTENCES = 50
#: Filler words from which the length of one is estimated.
_SAMPLE = 120
#: A gap of so many units is closed with padding rather than with another filler word.
_MAX_PADDING = 8
_UNITS = ("characters", "words", "tokens")
_FILLERS = ("noise", "essay")
INTRO = "Some codes are hidden in the text below. Remember them.\n\n"
NEEDLE = "The code of {key} is {value}."
QUESTION = "\n\nQuestion: What is the code of {key}?\nAnswer:"


@dataclass(frozen=True)
class RetrievalWorld(World):
    """Prompts with one right answer each.

    Rows: ``prompt``, ``answer`` (to be generated after a space; several values are joined by ", " in the text's order),
    ``answers`` (the list of them), ``key``, ``needle`` (the sentence at ``depth``), ``position`` (its offset in the
    prompt, in characters), ``depth`` (share of the filler's words before it), ``length`` (of the prompt, in the
    world's unit), ``distractors`` (the other [key, value] pairs in the text).

    Attributes:
        train: Prompts for training.
        heldout: Prompts with other keys and values.
    """

    train: list[Row]
    heldout: list[Row]


def retrieval(
    seed: int = 0,
    *,
    lengths: Sequence[int] = (1000,),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    train_per_cell: int = 20,
    heldout_per_cell: int = 10,
    unit: str = "characters",
    tokenizer: Any = None,
    keys: int = 4,
    values: int = 1,
    value_digits: int = 6,
    filler: str = "noise",
    intro: str = INTRO,
    needle: str = NEEDLE,
    question: str = QUESTION,
) -> RetrievalWorld:
    """Makes the world: for every length and depth the same number of prompts.

    Args:
        seed: Decides everything.
        lengths: Lengths of the prompts, in ``unit``; the answer is not counted.
        depths: Where the needle stands: 0 before the filler, 1 after it. The other sentences stand anywhere.
        train_per_cell: Training prompts for each length and depth.
        heldout_per_cell: Held-out prompts for each length and depth.
        unit: ``characters``, ``words`` (split at blank space) or ``tokens``.
        tokenizer: For ``tokens``: a Hugging Face tokenizer; counted is ``tokenizer(prompt)["input_ids"]``, special
            tokens included.
        keys: Keys in each prompt; all but one are distractors.
        values: Values of each key. With several, each has its own sentence and the question is for all of them; the
            sentence of one stands at ``depth``, those of the others anywhere.
        value_digits: Digits of a value.
        filler: ``noise`` (sentences that never repeat for long) or ``essay`` (one text of 300 words, repeated).
        intro: Beginning of every prompt.
        needle: The sentence, with ``{key}`` and ``{value}``.
        question: End of every prompt, with ``{key}``.

    Raises:
        UserError: A parameter is out of range, or a length is too short for what must be in the prompt.
    """
    parameters = locals().copy()
    parameters["tokenizer"] = None if tokenizer is None else type(tokenizer).__name__
    parameters |= {"lengths": list(lengths), "depths": list(depths)}
    check_at_least(1, keys=keys, values=values, value_digits=value_digits, lengths=min(lengths, default=0))
    check_at_least(0, train_per_cell=train_per_cell, heldout_per_cell=heldout_per_cell)
    for name, value, known in (("unit", unit, _UNITS), ("filler", filler, _FILLERS)):
        if value not in known:
            raise UserError(f"There is no {name} '{value}': {did_you_mean(value, known)}")
    for name, text, marks in (("needle", needle, ("{key}", "{value}")), ("question", question, ("{key}",))):
        for mark in marks:
            if mark not in text:
                raise UserError(f"The {name} has no {mark} in it: write it where that belongs.")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths is {list(depths)}: give shares between 0 and 1.")
    if value_digits > 15:
        raise UserError(f"value_digits is {value_digits}: give at most 15.")
    if keys * values > 9 * 10 ** (value_digits - 1):
        raise UserError(f"{keys * values} values do not have {value_digits} digits each: make value_digits larger.")
    if (tokenizer is None) == (unit == "tokens"):
        raise UserError("unit 'tokens' and a tokenizer belong together: give both or neither.")
    measure: Callable[[str], int] = {
        "characters": len, "words": lambda text: len(text.split()), "tokens": lambda t: len(tokenizer(t)["input_ids"]),
    }[unit]  # fmt: skip
    cells = [(length, depth) for length in lengths for depth in depths]
    # Words of the filler and the frame are no keys, so a key is only where its sentence and the question are.
    names = Names(Draw(seed, "keys"), avoid=" ".join((*_ADJECTIVES, *_NOUNS, *_VERBS, intro, needle, question)))
    splits: list[list[Row]] = []
    for split, per_cell in (("train", train_per_cell), ("heldout", heldout_per_cell)):
        rows = []
        for cell, (length, depth) in enumerate(cells):
            for i in range(per_cell):
                draw = Draw(seed, f"{split}/{cell}/{i}")
                codes = _codes(draw, names, keys, values, value_digits)
                haystack = _Haystack(draw, codes, depth, filler, intro, needle, question)
                rows.append(haystack.row(length, measure, unit))
        splits.append(Draw(seed, split).shuffled(rows))
    return RetrievalWorld(parameters, *splits)


def _codes(draw: Draw, names: Names, keys: int, values: int, digits: int) -> list[tuple[str, list[str]]]:
    """Returns new keys with values that differ within the prompt."""
    low = 10 ** (digits - 1)
    numbers = [str(low + n) for n in draw.sample(range(9 * low), keys * values)]
    return [(names.word(), numbers[i * values : (i + 1) * values]) for i in range(keys)]


class _Haystack:
    """One prompt, which can be built with any number of filler words."""

    def __init__(
        self,
        draw: Draw,
        codes: list[tuple[str, list[str]]],
        depth: float,
        filler: str,
        intro: str,
        needle: str,
        question: str,
    ) -> None:
        (self.key, self.values), *others = codes
        self.distractors = [[key, value] for key, values in others for value in values]
        self.depth = depth
        self.intro, self.question = intro, question.replace("{key}", self.key)
        # The first is the one whose depth is asked for; each has the share of the filler that stands before it.
        pairs = [[self.key, value] for value in self.values] + self.distractors
        self.needles = [needle.replace("{key}", key).replace("{value}", value) for key, value in pairs]
        self.shares = [depth, *(draw.uniform() for _ in pairs[1:])]
        self.draw, self.cycle = draw, _ESSAY_SENTENCES if filler == "essay" else 0
        self.sentences: list[list[str]] = []

    def sentence(self, index: int) -> list[str]:
        """Returns the words of a filler sentence."""
        index = index % self.cycle if self.cycle else index
        while len(self.sentences) <= index:
            first, second = self.draw.sample(_NOUNS, 2)
            adjective, verb = self.draw.choice(_ADJECTIVES), self.draw.choice(_VERBS)
            self.sentences.append(["The", adjective, first, verb, "the", f"{second}."])
        return self.sentences[index]

    def build(self, words: int, padding: str = "") -> tuple[str, int, list[int]]:
        """Returns the prompt with that many filler words, the needle's offset, and the needles in the text's order."""
        places = [round(share * words) for share in self.shares]
        order = sorted(range(len(places)), key=lambda i: places[i])
        bounds = [0, *(places[i] for i in order), words]
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
        longest = sizes.index(max(sizes))
        parts: list[str] = []
        next_sentence = 0
        for i, size in enumerate(sizes):
            segment: list[str] = []
            while len(segment) < size:
                segment += self.sentence(next_sentence)
                next_sentence += 1
            # A sentence that a needle cuts short ends there, so every sentence begins with a capital.
            text = " ".join(segment[:size]).rstrip(".") + (padding if i == longest else "")
            parts.append(f"{text.lstrip()}." if text else "")
            parts.append(self.needles[order[i]] if i < len(order) else "")
        before = 2 * order.index(0) + 1
        start = self.intro + " ".join(part for part in parts[:before] if part)
        position = len(start) + (start != self.intro)
        return self.intro + " ".join(part for part in parts if part) + self.question, position, order

    def row(self, length: int, measure: Callable[[str], int], unit: str) -> Row:
        """Returns the row of the prompt that measures exactly ``length``."""
        words, padding = self.fit(length, lambda words, padding: measure(self.build(words, padding)[0]), unit)
        prompt, position, order = self.build(words, padding)
        answers = [self.values[i] for i in order if i < len(self.values)]
        return {
            "prompt": prompt,
            "answer": ", ".join(answers),
            "answers": answers,
            "key": self.key,
            "needle": self.needles[0],
            "position": position,
            "depth": self.depth,
            "length": length,
            "distractors": self.distractors,
        }

    @staticmethod
    def fit(length: int, measure: Callable[[int, str], int], unit: str) -> tuple[int, str]:
        """Finds the number of filler words, and what to add to the last of them, that give exactly the length."""
        low, at_low, high = 0, measure(0, ""), length + 1
        if at_low > length:
            raise UserError(
                f"A prompt of {length} {unit} is too short: its needles and question alone take {at_low}. Give a "
                "greater length, fewer keys or values, or a shorter intro."
            )
        rate = (measure(_SAMPLE, "") - at_low) / _SAMPLE
        last, at_last = low, at_low
        while length - at_low > _MAX_PADDING and high - low > 1:
            # From the last guess by the length of a word, but never out of the bracket.
            last = min(max(last + int((length - at_last) / rate), low + 1), high - 1)
            at_last = measure(last, "")
            if at_last <= length:
                low, at_low = last, at_last
            else:
                high = last
        for words in range(low, max(low - 20, -1), -1):
            gap = length - measure(words, "")
            for padding in ("", " a" * gap, " a" * (gap // 2) + "." * (gap % 2), " so" * gap, " and" * gap, "." * gap):
                if measure(words, padding) == length:
                    return words, padding
        raise UserError(f"No prompt of exactly {length} {unit} was found with this tokenizer: try another length.")
