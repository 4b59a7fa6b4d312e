"""How well a tokenizer's units describe a text, whatever the tokenizer."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modelwright.errors import UserError
from modelwright.tokenization.swe.likelihood import log_likelihood


@dataclass(frozen=True)
class Fit:
    """What a tokenizer makes of texts.

    Attributes:
        bits_per_character: -L / (characters ln 2): the cost of the text if every token is coded by its own frequency
            in it. By characters, because a likelihood by tokens rewards long tokens and short ones alike.
        characters_per_token: How far it compresses.
        tokens: Tokens of the texts.
        used: Entries of the vocabulary that occur.
    """

    bits_per_character: float
    characters_per_token: float
    tokens: int
    used: int


def fit(tokenizer: Any, texts: Iterable[str]) -> Fit:
    """Measures a tokenizer on texts.

    Args:
        tokenizer: A ``tokenizers.Tokenizer`` or a transformers tokenizer.
        texts: Texts, read once as a stream.

    Raises:
        UserError: There is no text.
    """
    plain = getattr(tokenizer, "backend_tokenizer", tokenizer)
    counts: Counter[int] = Counter()
    characters = 0
    rest = iter(texts)
    while some := list(itertools.islice(rest, 1000)):
        characters += sum(map(len, some))
        for encoding in plain.encode_batch_fast(some, add_special_tokens=False):
            counts.update(encoding.ids)
    tokens = sum(counts.values())
    if not tokens:
        raise UserError("There is no text to measure the tokenizer on.")
    bits = -log_likelihood(counts.values()) / (characters * math.log(2))
    return Fit(bits, characters / tokens, tokens, len(counts))
