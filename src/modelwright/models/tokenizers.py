"""Byte-level tokenizers: every text has tokens, and they decode to exactly that text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

#: Padding, beginning and end of a text: the first three ids of tokenizers made here.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
#: The smallest vocabulary: the special tokens and the 256 bytes.
SMALLEST = len(SPECIAL_TOKENS) + 256
_LONG = 1 << 20


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 259 tokens, one a UTF-8 byte, that needs no training and adds no special tokens."""
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    return wrap(_byte_level(models.BPE(vocab=vocabulary, merges=[])))


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; the same texts give the same tokenizer, whatever the number of threads.

    Args:
        texts: Texts, read once as a stream.
        vocab_size: Tokens at most, with the 3 special ones and the 256 bytes; fewer if the texts have no more pairs.
        min_frequency: A pair must be seen this often to be merged.

    Raises:
        UserError: The vocabulary or the frequency is too small, or there is no text.
    """
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise UserError(f"A vocabulary of {vocab_size} is too small: {SMALLEST} hold the bytes and the special tokens.")
    if min_frequency < 0:
        raise UserError(f"min_frequency is {min_frequency}: give at least 0.")
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("There is no text to train a tokenizer on.")
    return wrap(tokenizer)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that stand before a document's first one, so that the first one too has a context.

    That is what the tokenizer itself puts there (Llama's and Gemma's do). Where it puts nothing it is the end token,
    because in packed training data the end of the document before stands there.

    Raises:
        UserError: The tokenizer has neither.
    """
    own = leading_ids(tokenizer)
    if own:
        return own
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return [token_id]
    raise UserError("The tokenizer has no end token and no beginning token, so documents cannot be told apart.")


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the special tokens that the tokenizer puts before every text by itself; often none."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return list(with_special[:start])
    return []


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Returns the tokens of texts, without special tokens.

    A text of more than a million characters is tokenised in parts that end with a line.
    """
    pieces = [_pieces(text) for text in texts]
    # verbose=False: a document longer than the model's window is normal here, and is cut later.
    rows = iter(
        tokenizer(
            [piece for parts in pieces for piece in parts],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        if texts
        else []
    )
    return [list(itertools.chain.from_iterable(itertools.islice(rows, len(parts)))) for parts in pieces]


def _pieces(text: str) -> list[str]:
    # A tokenizer needs some hundred bytes for each token of a text, so a very long one is cut, where a line ends.
    if len(text) <= _LONG:
        return [text]
    parts, start = [], 0
    while start < len(text):
        end = start + _LONG
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        parts.append(text[start:end])
        start = end
    return parts


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def wrap(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Returns the transformers tokenizer around a ``tokenizers`` one whose first entries are :data:`SPECIAL_TOKENS`."""
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
