"""Texts to words and their frequencies, split as the exported tokenizer will split them.

Characters that came into Unicode after one of the two libraries' tables may be letters to one only; the tokenizer then
segments such a word by its own rule, and still loses nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

Alphabet = Literal["byte", "character"]
#: Stands before each word of a character alphabet, as a symbol of its own.
WORD_MARK = "▁"
#: How byte-level tokenizers split a text (GPT-2's pattern): a word takes the blank before it along.
_BYTE_LEVEL = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_NO_SPACE = r"[^\p{White_Space}]+"


def count_words(texts: Iterable[str], alphabet: Alphabet, special: Iterable[str] = ()) -> tuple[Counter[str], int]:
    """Counts the words of texts, read once as a stream.

    Args:
        texts: Texts.
        alphabet: How words are split and spelled.
        special: Special tokens: where a text has one, as some corpora do, it parts the words and is none itself.

    Returns:
        Words, spelled in symbols of one character each, to their frequencies; and the characters of all texts.
    """
    import regex  # comes with transformers

    find = regex.compile(_BYTE_LEVEL if alphabet == "byte" else _NO_SPACE).findall
    apart = "|".join(regex.escape(token) for token in sorted(special, key=len, reverse=True) if token)
    split = regex.compile(apart).split if apart else lambda text: (text,)
    counts: Counter[str] = Counter()
    characters = 0
    for text in texts:
        for part in split(text):
            counts.update(find(part))
        characters += len(text)
    if alphabet == "character":
        return Counter({WORD_MARK + word: n for word, n in counts.items()}), characters
    spelled = str.maketrans(dict(enumerate(_byte_letters())))
    return Counter({w.encode().decode("latin-1").translate(spelled): n for w, n in counts.items()}), characters


def _byte_letters() -> list[str]:
    """Returns the printable letter that stands for each byte in byte-level tokenizers (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in shown}
    others = (byte for byte in range(256) if byte not in letters)
    letters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [letters[byte] for byte in range(256)]


def splitting(alphabet: Alphabet) -> tuple[Any, Any]:
    """Returns the ``tokenizers`` pre-tokenizer and decoder that belong to an alphabet."""
    from tokenizers import decoders, pre_tokenizers

    if alphabet == "byte":
        return pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marked = pre_tokenizers.Metaspace(replacement=WORD_MARK, prepend_scheme="always", split=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marked])
    return split, decoders.Metaspace(replacement=WORD_MARK, prepend_scheme="always")


def byte_alphabet() -> list[str]:
    """Returns the letters of all 256 bytes, sorted."""
    return sorted(_byte_letters())
