"""Text that occurs twice: duplicates inside the pool, and overlap with held-out documents (contamination)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Returns the lower-case words; punctuation and white space go."""
    return _WORD.findall(text.lower())


def duplicate_hash(text: str) -> int:
    """Returns 64 bits that are equal for texts with the same words in the same order.

    Texts without any word (only punctuation) are compared as they are. Near duplicates with changed words differ: use
    SemDeDup or datatrove's MinHash for those.
    """
    normal = " ".join(words(text)) or text
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass
class HeldOut:
    """The word n-grams of held-out documents, to find documents that share one.

    A held-out document shorter than ``n`` words counts as one n-gram of its own length; below ``shortest`` words it
    is left out, because a few common words prove nothing.

    Attributes:
        n: Words in an n-gram. 13 is what GPT-3's authors and the evaluation harness use.
        shortest: Fewest words of a whole document that count.
        documents: How many held-out documents there are.
        ignored: How many of them were too short.
    """

    n: int = 13
    shortest: int = 5
    documents: int = 0
    ignored: int = 0
    _grams: dict[int, dict[str, int]] = field(default_factory=dict, repr=False)

    def add(self, texts: Iterable[str]) -> HeldOut:
        """Adds held-out documents, and returns itself."""
        for text in texts:
            tokens = words(text)
            size = min(self.n, len(tokens))
            if size < min(self.shortest, self.n):
                self.ignored += 1
            else:
                known = self._grams.setdefault(size, {})
                for gram in _ngrams(tokens, size):
                    known.setdefault(gram, self.documents)
            self.documents += 1
        return self

    def fingerprint(self) -> str:
        """Returns a hash (hex) of the n-grams."""
        digest = hashlib.sha256()
        for size, known in sorted(self._grams.items()):
            for gram in sorted(known):
                digest.update(f"{size} {gram}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def shared(self, text: str) -> dict[int, str]:
        """Returns the held-out documents (by position) that share an n-gram with a text, and the first one shared.

        An n-gram that several held-out documents hold counts for the first of them.
        """
        tokens = words(text)
        found: dict[int, str] = {}
        for size, known in self._grams.items():
            for gram in _ngrams(tokens, size):
                if gram in known:
                    found.setdefault(known[gram], gram)
        return found


def _ngrams(tokens: list[str], size: int) -> Iterable[str]:
    return (" ".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
