"""Whether an answer is right: exact rules first, and a judge only where they find no match."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from modelwright.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What kind of answer a question wants: words, Yes or No, or the letter of a choice.
Kind = Literal["text", "yes_no", "letter"]
#: ``word``: whole words, never an empty answer. ``paper``: one text is a substring of the other, whatever the kind.
Protocol = Literal["word", "paper"]
PROTOCOLS: tuple[str, ...] = ("word", "paper")
#: Says whether an answer and a label agree; asked only when they do not match by rule.
Judge = Callable[[str, str], bool]

_EMPTY = frozenset({"a", "an", "the", "of", "in", "and", "to", "is", "it", "at", "on", "for", "by"})
_WORD = re.compile(r"\w+")
_LETTER = re.compile(r"(?<![\w'])([A-D])(?![\w'])")


def words(text: str) -> list[str]:
    """Returns a text's words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def match(answer: str, label: str, kind: Kind = "text", protocol: Protocol = "word") -> bool:
    """Returns whether an answer agrees with a label by rule.

    ``word``: of the two, one holds the other as consecutive whole words, and the words that they share are not all
    articles and the like. Of Yes and No, what the answer says first counts; of letters, the first that stands alone.
    ``paper``: one is a substring of the other in lower case, as the benchmark's code has it: there an empty answer
    matches everything, ``no`` matches ``north``, and any answer with a d in it chooses D.
    """
    if protocol == "paper":
        low, other = answer.lower(), label.lower()
        return low in other or other in low
    if kind == "letter":
        found = _LETTER.search(answer)
        return found is not None and found[1] == label.strip().upper()
    mine, right = words(answer), words(label)
    if kind == "yes_no":
        said = next((word for word in mine if word in ("yes", "no")), None)
        return said is not None and [said] == right
    short, long = (mine, right) if len(mine) <= len(right) else (right, mine)
    # A label such as "The A" is made of such words only; then it must be matched whole.
    if not short or (set(short) <= _EMPTY and short != long):
        return False
    return any(long[at : at + len(short)] == short for at in range(len(long) - len(short) + 1))


def agrees(
    answer: str, label: str, kind: Kind = "text", protocol: Protocol = "word", judge: Judge | None = None
) -> bool:
    """Returns whether an answer agrees with a label, by rule or else by the judge.

    The judge decides about texts only: Yes, No and letters leave nothing to judge. Under ``paper`` it decides about
    all.
    """
    if match(answer, label, kind, protocol):
        return True
    if judge is None or (kind != "text" and protocol == "word"):
        return False
    return bool((protocol == "paper" or answer.strip()) and judge(answer, label))


def check_protocol(protocol: str) -> Protocol:
    """Returns the protocol.

    Raises:
        UserError: There is none of that name.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"There is no protocol '{protocol}': {did_you_mean(protocol, PROTOCOLS)}")
    return protocol  # type: ignore[return-value]


_TASK = "You are shown two short answers. Reply with the single digit 1 if they mean the same, or 0 if they do not."


class ModelJudge:
    """A language model that says whether two texts mean the same; any reply but 1 is a no.

    The published benchmark asks Llama-3.1-8B-Instruct; the wording here is ours.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer, with a chat template if it is a chat model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, answer: str, label: str) -> bool:
        """Returns whether they mean the same; each pair is asked about once."""
        from modelwright.decoding.generate import Sampling, chat_prompt, generate

        if (answer, label) not in self._known:
            text = f"First: {label}\nSecond: {answer}"
            chat = bool(self.tokenizer.chat_template)
            prompt = chat_prompt(self.tokenizer, text, _TASK) if chat else f"{_TASK}\n{text}\nReply:"
            sampling = Sampling(max_new_tokens=2)
            ((reply,),) = generate(self.model, self.tokenizer, [prompt], sampling, special_tokens=not chat)
            self._known[answer, label] = reply.text.strip().startswith("1")
        return self._known[answer, label]


def repeated_share(texts: Sequence[str], n: int = 1) -> float:
    """Returns the share of words that stood right before already, over all texts: near 1 when a model has collapsed.

    Args:
        texts: What a model wrote.
        n: A word counts as repeated if it is one of the ``n`` before it.
    """
    total = repeated = 0
    for text in texts:
        found = text.split()
        total += max(0, len(found) - 1)
        repeated += sum(word in found[max(0, i - n) : i] for i, word in enumerate(found))
    return repeated / total if total else 0.0
