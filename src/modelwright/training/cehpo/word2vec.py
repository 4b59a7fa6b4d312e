"""The worked example: hyperparameters of word2vec (skip-gram with negative sampling), which ``gensim`` trains.

Gensim draws negatives in proportion to count^0.75, keeps a word of frequency f with probability
min(1, sqrt(t / f) + t / f), and shrinks each window to a uniform 1 … w: what the paper assumes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError, require
from modelwright.training.cehpo.space import Choice, Space, log_normal

if TYPE_CHECKING:
    from gensim.models import Word2Vec

#: What is searched by default; the names are gensim's.
SPACE: Space = {
    "window": Choice((2, 3, 5, 8, 12)),
    "vector_size": Choice((25, 50, 100, 200, 300)),
    "negative": Choice((2, 5, 10, 20)),
    "min_count": Choice((1, 2, 5, 10)),
    "sample": Choice((0.0, 1e-2, 1e-3, 1e-4, 1e-5)),
    "epochs": Choice((1, 3, 5, 10, 20)),
    "alpha": log_normal(0.003, 0.3),
}


@dataclass
class Word2VecObjective:
    """Trains word2vec on texts with a setting and scores the vectors; an objective for :func:`cross_entropy_search`.

    The score is the share of analogy questions answered (a word that has no vector counts as a wrong answer, so that
    dropping rare words does not pay), or Spearman's correlation with judgements of similarity. With one thread, as
    here, a setting and a seed give the same vectors each time.

    Attributes:
        sentences: Texts as lists of words.
        analogies: File in the format of ``questions-words.txt``: ``: section`` lines, and lines of four words.
        similarity: File of word, word, judgement, separated by tabs.
        seed: Of the initial vectors and of sampling.
        ignore_case: Whether a question's ``Athens`` is the sentences' ``athens``.
    """

    sentences: Sequence[Sequence[str]] = field(repr=False)
    analogies: Path | None = None
    similarity: Path | None = None
    seed: int = 0
    ignore_case: bool = False

    def __post_init__(self) -> None:
        require("gensim", "word2vec", "training word2vec")
        if (self.analogies is None) == (self.similarity is None):
            raise UserError(
                "Say what scores the vectors: give either a file of analogies (--analogies) or one of similarities "
                "(--similarity)."
            )
        path = Path(self.analogies or self.similarity)  # type: ignore[arg-type]
        if not path.is_file():
            raise UserError(f"{path} does not exist.")
        if not self.sentences:
            raise UserError("There is no text to train word2vec on.")
        _check_questions(path, 4 if self.analogies else 3)

    def __call__(self, setting: dict[str, Any]) -> float:
        """Returns the score, from 0 to 1 for analogies and from -1 to 1 for similarities."""
        return self.score(self.train(setting))

    def train(self, setting: dict[str, Any]) -> Word2Vec:
        """Trains on the sentences; ``setting`` holds arguments of gensim's ``Word2Vec``."""
        from gensim.models import Word2Vec

        return Word2Vec(self.sentences, sg=1, hs=0, workers=1, seed=self.seed, **setting)

    def score(self, model: Word2Vec) -> float:
        """Returns the score of a trained model."""
        words = len(model.wv)
        log = logging.getLogger("gensim.models.keyedvectors")
        before, log.level = log.level, logging.ERROR
        try:
            if self.analogies is not None:
                return float(
                    model.wv.evaluate_word_analogies(
                        str(self.analogies), restrict_vocab=words, case_insensitive=self.ignore_case, dummy4unknown=True
                    )[0]
                )
            found = model.wv.evaluate_word_pairs(
                str(self.similarity), restrict_vocab=words, case_insensitive=self.ignore_case, dummy4unknown=True
            )
            return float(found[1].statistic)
        finally:
            log.level = before


def read_sentences(texts: Iterable[str], lower: bool = True) -> list[list[str]]:
    """Returns the words of each line of texts; a word is a run of letters, digits and underscores."""
    import re

    find = re.compile(r"\w+").findall
    lines = (line.lower() if lower else line for text in texts for line in text.splitlines())
    return [words for line in lines if (words := find(line))]


def _check_questions(path: Path, fields: int) -> None:
    """Gensim skips a line that it does not understand; a user wants to know."""
    questions = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: repair the file.") from error
    named = False
    for number, line in enumerate(lines, 1):
        named = named or line.startswith(": ")
        if not line.strip() or line.startswith((":", "#")):
            continue
        if fields == 4 and not named:
            raise UserError(f"{path}:{number}: a section, such as ': capitals', stands before the first question.")
        questions += 1
        parts = line.split("\t") if fields == 3 else line.split()
        if len(parts) != fields:
            what = "four words" if fields == 4 else "two words and a number, separated by tabs"
            raise UserError(f"{path}:{number}: a line has {what}, not {line!r}.")
        if fields == 3:
            try:
                float(parts[2])
            except ValueError as error:
                raise UserError(f"{path}:{number}: the third field is a number, not {parts[2]!r}.") from error
    if not questions:
        raise UserError(f"{path} holds no question.")
