"""Needles that must be copied word for word, and haystacks to hide them in: for finding heads that copy.

A needle is a sentence about an invented person whose end no model can guess; the question asks for that end.

Everything is generated: the same seed gives the same bytes on every machine and Python version.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelwright.worlds.base import Draw, Row, World, check_at_least
from modelwright.worlds.names import Names

# fmt: off
_SUBJECTS = (
    ("The favourite breakfast of {s} is", "What is the favourite breakfast of {s}?", "meal"),
    ("At the market {s} always buys", "What does {s} always buy at the market?", "meal"),
    ("In the old suitcase {s} keeps", "What does {s} keep in the old suitcase?", "things"),
    ("The best thing to do in {s} is to", "What is the best thing to do in {s}?", "deed"),
)
_MEALS = ("boiled plums", "brown bread", "smoked trout", "pickled onions", "oat cakes", "sour cherries", "goat cheese",
          "roast chestnuts", "barley soup", "honey wafers")
_THINGS = ("a brass compass", "two tin whistles", "a torn map", "a wooden spoon", "six blue marbles", "a silk ribbon",
           "an empty inkwell", "a rusty key", "three dried figs", "a cracked lens")
_DEEDS = ("feed the grey swans", "climb the clock tower", "paint small boats", "listen to the blind fiddler",
          "count the chimneys", "sail paper kites", "visit the glass garden", "taste the salted caramel")
_WHEN = ("on a windy day", "before the bells ring", "with an old friend", "in the first snow", "at low tide",
         "while the lamps are lit")
_WHO = ("The baker", "A tired clerk", "My neighbour", "The captain", "A young painter", "Our teacher", "The guard",
        "A shy student", "The gardener", "Her cousin")
_DID = ("walked past", "looked at", "wrote about", "talked of", "forgot", "remembered", "drew a picture of", "sold")
_WHAT = ("the river", "a wooden chair", "the morning train", "an empty bottle", "a letter", "the new bridge",
         "a quiet street", "the harbour", "a broken clock", "the orchard")
_HOW = ("early in the morning", "on a rainy afternoon", "late in spring", "after the concert", "without a word",
        "once again", "for no reason", "twice that week")
# fmt: on


@dataclass(frozen=True)
class CopyingWorld(World):
    """Needles and haystacks.

    Attributes:
        needles: ``text`` (a sentence), ``question``, ``answer`` (the end of the sentence, which is to be copied).
        haystacks: ``text``: sentences that say nothing of the kind.
    """

    needles: list[Row]
    haystacks: list[Row]


def copying(seed: int = 0, *, needles: int = 3, haystacks: int = 3, sentences: int = 2000) -> CopyingWorld:
    """Makes the world.

    Args:
        seed: Decides everything.
        needles: Needles.
        haystacks: Haystacks.
        sentences: Sentences of each.

    Raises:
        UserError: A parameter is out of range.
    """
    parameters = locals().copy()
    check_at_least(1, needles=needles, haystacks=haystacks, sentences=sentences)
    names = Names(Draw(seed, "names"))
    draw = Draw(seed, "needles")
    rows: list[Row] = []
    for number in range(needles):
        beginning, question, kind = _SUBJECTS[number % len(_SUBJECTS)]
        subject = names.word()
        if kind == "deed":
            answer = f"{' and '.join(draw.sample(_DEEDS, 2))} {draw.choice(_WHEN)}"
        else:
            first, second, third = draw.sample(_MEALS if kind == "meal" else _THINGS, 3)
            answer = f"{first}, {second} and {third} {draw.choice(_WHEN)}"
        text = f"{beginning.format(s=subject)} {answer}."
        rows.append({"text": text, "question": question.format(s=subject), "answer": answer})
    texts = []
    for number in range(haystacks):
        own = Draw(seed, f"haystack {number}")
        said = (" ".join(own.choice(part) for part in (_WHO, _DID, _WHAT, _HOW)) + "." for _ in range(sentences))
        texts.append({"text": " ".join(said)})
    return CopyingWorld(parameters, rows, texts)
