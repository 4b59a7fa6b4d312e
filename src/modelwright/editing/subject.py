"""Where a fact stands in a tokenised prompt: the last token of its subject, or of the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelwright.errors import UserError
from modelwright.models.scoring import context_length
from modelwright.models.tokenizers import leading_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Where the fact is looked up: at the subject's last token (ROME, MEMIT), or at the prompt's.
FactToken = Literal["subject_last", "last"]


@dataclass(frozen=True, slots=True)
class Located:
    """A prompt in tokens.

    Attributes:
        ids: All tokens of the prompt, with the special ones that the tokenizer puts before a text.
        position: Index of the fact's token in ``ids``.
    """

    ids: list[int]
    position: int


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns a prompt's tokens: with what the tokenizer puts before a text, without what it puts behind.

    A text from a chat template begins with the special token already, and gets no second one.
    """
    return _leading(tokenizer, text) + _plain(tokenizer, text)


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of a prompt, and of the target that follows it.

    A space is put between the two unless one is there, at the prompt's end or the target's beginning. The two are
    tokenised as one text, as training data are; a tokenizer that marks words by itself (SentencePiece) therefore gets
    no second mark. Where a token would span the border, the two are tokenised apart, because the model will be asked
    with the prompt alone.

    Raises:
        UserError: The target has no tokens.
    """
    if not target.strip():
        raise UserError("The target is empty: say what the model should answer.")
    between = "" if prompt[-1:].isspace() or target[:1].isspace() else " "
    head = encode_prompt(tokenizer, prompt)
    both = encode_prompt(tokenizer, prompt + between + target)
    if both[: len(head)] == head and len(both) > len(head):
        return head, both[len(head) :]
    if len(tail := _plain(tokenizer, between + target)) == 0:
        raise UserError(f"The target {target!r} has no tokens in this tokenizer.")
    return head, tail


def check_tokens(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Refuses tokens that a model does not know, and more of them than it reads.

    Args:
        model: A causal language model.
        rows: Token ids, row by row.

    Raises:
        UserError: One of these.
    """
    longest, vocabulary = context_length(model), model.get_input_embeddings().weight.shape[0]
    width, top = max(map(len, rows), default=0), max((max(row) for row in rows if row), default=0)
    if longest is not None and width > longest:
        raise UserError(f"A prompt in its context has {width} tokens, but the model reads {longest}: shorten it.")
    if top >= vocabulary:
        raise UserError(
            f"The tokenizer gives token {top}, but the model knows only {vocabulary}: it is another model's."
        )


def locate(
    tokenizer: PreTrainedTokenizerBase, text: str, subject: str, fact_token: FactToken = "subject_last"
) -> Located:
    """Finds the token at which a fact is looked up.

    For ``subject_last`` that is the token which holds the last character of the subject's last occurrence; it may hold
    more (a suffix that was merged with it), or be the last of several that share that character (bytes).

    Args:
        tokenizer: Fast tokenizers are asked for character offsets; of others, growing prefixes are decoded.
        text: The prompt, after any chat template.
        subject: As it is spelled in the text.
        fact_token: Which token.

    Raises:
        UserError: The text does not hold the subject, or its tokens do not.
    """
    if fact_token not in ("subject_last", "last"):
        raise UserError(f"fact_token is {fact_token!r}: give 'subject_last' or 'last'.")
    start = text.rfind(subject) if subject else -1
    if start < 0:
        raise UserError(f"The subject {subject!r} does not stand in the prompt {text!r}.")
    leading = _leading(tokenizer, text)
    if fact_token == "last":
        ids = leading + _plain(tokenizer, text)
        return Located(ids, len(ids) - 1)
    if getattr(tokenizer, "is_fast", False):
        ids, position = _by_offsets(tokenizer, text, start + len(subject))
    else:
        ids, position = _by_decoding(tokenizer, text, subject)
    return Located(leading + ids, len(leading) + position)


def subject_span(tokenizer: PreTrainedTokenizerBase, text: str, subject: str) -> tuple[list[int], int, int]:
    """Returns a prompt's tokens, and the first and the last that hold a part of the subject's last occurrence.

    Raises:
        UserError: See :func:`locate`.
    """
    found = locate(tokenizer, text, subject)
    leading = _leading(tokenizer, text)
    start = text.rfind(subject)
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        first = next((i for i, (a, b) in enumerate(offsets) if a <= start < b), found.position - len(leading))
    else:
        before = _plain(tokenizer, text[:start])
        first = min(len(before), found.position - len(leading))
    return found.ids, len(leading) + first, found.position


def _leading(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    leading = leading_ids(tokenizer)
    begins = [t for t in (tokenizer.bos_token, tokenizer.cls_token) if t]
    return [] if any(text.startswith(token) for token in begins) else leading


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _by_offsets(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> tuple[list[int], int]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    holding = [i for i, (first, last) in enumerate(encoded["offset_mapping"]) if first < end <= last]
    # Byte-level tokenizers may give a character's offsets to several tokens: the last of them completes it.
    if holding:
        return list(encoded["input_ids"]), holding[-1]
    raise UserError(f"No token holds the end of the subject in {text!r}: its tokenizer drops those characters.")


def _by_decoding(tokenizer: PreTrainedTokenizerBase, text: str, subject: str) -> tuple[list[int], int]:
    ids = _plain(tokenizer, text)

    def decode(n: int) -> str:
        return tokenizer.decode(ids[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole = decode(len(ids))
    start = whole.rfind(subject)
    if start < 0:
        raise UserError(
            f"The subject {subject!r} cannot be found among the tokens of {text!r}: it is spelled otherwise."
        )
    wanted = whole[: start + len(subject)]
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decode(middle).startswith(wanted) else (middle, high)
    return ids, high - 1
