"""Words on a grid, and sentences in which each stands among words of its row and of its column: analogies that hold.

The word of row r and column c is to that of row r and column d as the word of row s and column c is to that of s and d:
what "king" is to "queen" as "man" to "woman". How often a word occurs falls with its row, as in a text.

Everything is generated: the same seed gives the same bytes on every machine and Python version.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelwright.worlds.base import Draw, Row, World, check_at_least
from modelwright.worlds.names import Names


@dataclass(frozen=True)
class AnalogyWorld(World):
    """Sentences and questions.

    Attributes:
        sentences: ``text``.
        questions: ``a``, ``b``, ``c`` and the answer ``d``, for tuning.
        tests: The same, of other rows.
    """

    sentences: list[Row]
    questions: list[Row]
    tests: list[Row]

    @staticmethod
    def as_file(rows: list[Row]) -> str:
        """Returns questions in the format of ``questions-words.txt``."""
        return ": grid\n" + "".join(f"{row['a']} {row['b']} {row['c']} {row['d']}\n" for row in rows)


def analogies(
    seed: int = 0,
    *,
    rows: int = 24,
    columns: int = 3,
    sentences: int = 4000,
    context_words: int = 6,
    fillers: int = 300,
    length: int = 9,
    questions: int = 200,
) -> AnalogyWorld:
    """Makes the world.

    Args:
        seed: Decides everything.
        rows: Rows of the grid; half of them are asked in ``questions``, the others in ``tests``.
        columns: Columns.
        sentences: Sentences.
        context_words: Words that go with each row, and with each column.
        fillers: Words that go with nothing, drawn by Zipf's law.
        length: Words of a sentence.
        questions: Questions of each kind.

    Raises:
        UserError: A parameter is out of range.
    """
    parameters = locals().copy()
    check_at_least(4, rows=rows, length=length)
    check_at_least(2, columns=columns)
    check_at_least(1, sentences=sentences, context_words=context_words, fillers=fillers, questions=questions)
    names = Names(Draw(seed, "names"))
    grid = [[names.word().lower() for _ in range(columns)] for _ in range(rows)]
    of_row = [[names.word().lower() for _ in range(context_words)] for _ in range(rows)]
    of_column = [[names.word().lower() for _ in range(context_words)] for _ in range(columns)]
    others = [names.word().lower() for _ in range(fillers)]
    draw = Draw(seed, "sentences")
    texts: list[Row] = []
    for _ in range(sentences):
        r, c = _zipf(draw, rows), draw.below(columns)
        words = [grid[r][c], draw.choice(of_row[r]), draw.choice(of_row[r]), draw.choice(of_column[c])]
        words += [others[_zipf(draw, fillers)] for _ in range(length - len(words))]
        texts.append({"text": " ".join(draw.shuffled(words))})
    order = Draw(seed, "split").shuffled(range(rows))
    asked = {"questions": order[: rows // 2], "tests": order[rows // 2 :]}
    made: dict[str, list[Row]] = {}
    for name, its_rows in asked.items():
        own = Draw(seed, name)
        made[name] = []
        for _ in range(questions):
            r, s = own.sample(its_rows, 2)
            c, d = own.sample(range(columns), 2)
            made[name].append({"a": grid[r][c], "b": grid[r][d], "c": grid[s][c], "d": grid[s][d]})
    return AnalogyWorld(parameters, texts, made["questions"], made["tests"])


def _zipf(draw: Draw, n: int) -> int:
    """Returns an index below ``n``, drawn in proportion to 1 / (index + 1), up to rounding of the harmonic sum."""
    # By inversion of the continuous law with density 1 / x on [1, n + 1).
    return min(n - 1, int((n + 1) ** draw.uniform()) - 1)
