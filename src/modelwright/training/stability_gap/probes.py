"""What is measured while a model learns: choices in a format that it knows, and bits per byte of held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelwright.data.records import Records
from modelwright.errors import UserError
from modelwright.evaluation.continuations import split
from modelwright.models.scoring import bits_per_byte, context_length, token_log_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROMPTS, _CHOICES, _ANSWERS = ("prompt", "question"), ("choices", "options"), ("answer", "label")


@dataclass(frozen=True)
class Item:
    """A question with its choices.

    Attributes:
        prompt: What stands before the choice, as the base model knows such questions; nothing is added to it.
        choices: How it may go on, with a leading space where one is wanted.
        answer: Index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_items(path: str | Path) -> list[Item]:
    """Reads questions: rows with ``prompt`` (or ``question``), ``choices`` (or ``options``), ``answer`` (or ``label``).

    ``answer`` is the index of the right choice from 0, its letter (A, B …) or its text. Choices may be a mapping from
    letters, as MedQA has them.

    Raises:
        UserError: A field is missing, or the answer is none of the choices.
    """
    found = []
    for record in Records(str(path), text_field=_prompt_field(path), field_option=None):
        choices: Any = next((record.row[n] for n in _CHOICES if n in record.row), None)
        answer: Any = next((record.row[n] for n in _ANSWERS if n in record.row), None)
        keys: list[str] = [chr(65 + i) for i in range(26)]
        if isinstance(choices, dict):
            keys, choices = list(choices), list(choices.values())
        plain = isinstance(choices, list) and not any(isinstance(c, list | dict) for c in choices)
        if not plain or len(choices) < 2 or answer is None:
            raise UserError(f"{record.where} needs a list of two or more 'choices', and an 'answer'.")
        texts = [str(c) for c in choices]
        # True is no index: it would be the second choice, which may well be "no".
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
            right = answer
        elif str(answer) in texts:
            right = texts.index(str(answer))
        elif str(answer) in keys[: len(texts)]:
            right = keys.index(str(answer))
        else:
            raise UserError(f"{record.where}: the answer {answer!r} is none of the {len(texts)} choices.")
        # A choice goes on after a space unless the file says how.
        spaced = [c if c[:1].isspace() or record.text[-1:].isspace() else f" {c}" for c in texts]
        found.append(Item(record.text, tuple(spaced), right))
    return found


def _prompt_field(path: str | Path) -> str:
    for name in _PROMPTS[1:]:
        try:
            next(iter(Records(str(path), text_field=name)))
        except UserError:
            continue
        return name
    return _PROMPTS[0]  # whose message names what there is


class ChoiceAccuracy:
    """Share of questions whose right choice has the highest log-probability; choices are tokenised once.

    Args:
        items: The questions.
        tokenizer: The model's.
        normalise: Divide a choice's log-probability by its length in bytes, against a bias for short ones.
        batch_size: Choices at a time.

    Raises:
        UserError: There is no question.
    """

    def __init__(
        self,
        items: Sequence[Item],
        tokenizer: PreTrainedTokenizerBase,
        *,
        normalise: bool = False,
        batch_size: int = 32,
    ) -> None:
        if not items:
            raise UserError("A probe needs at least one question.")
        self.items, self.batch_size = list(items), batch_size
        self._rows = [split(tokenizer, item.prompt, choice) for item in items for choice in item.choices]
        self._divisors = [len(c.encode()) if normalise else 1 for item in items for c in item.choices]

    @torch.no_grad()
    def __call__(self, model: Any) -> float:
        """Returns the accuracy."""
        scores = []
        for start in range(0, len(self._rows), self.batch_size):
            scores += self._score(model, self._rows[start : start + self.batch_size])
        right = at = 0
        for item in self.items:
            own = [s / d for s, d in zip(scores[at:], self._divisors[at : at + len(item.choices)])]
            right += max(range(len(own)), key=own.__getitem__) == item.answer
            at += len(item.choices)
        return right / len(self.items)

    def _score(self, model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        longest, limit = max(len(p) + len(c) for p, c in rows), context_length(model)
        if limit is not None and longest > limit:
            raise UserError(f"A question of a probe has {longest} tokens with a choice, more than the model's {limit}.")
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, (prompt, choice) in enumerate(rows):
            ids[i, : len(prompt) + len(choice)] = torch.tensor(prompt + choice)
            mask[i, : len(prompt) + len(choice)] = 1
        device = next(model.parameters()).device
        # Padding stands on the right, where no token of a causal model sees it.
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        which = torch.cat([torch.full((len(c),), i) for i, (_, c) in enumerate(rows)])
        places = torch.cat([torch.arange(len(p), len(p) + len(c)) for p, c in rows])
        values = token_log_probabilities(logits, which, places - 1, ids[which, places])
        return [float(part.sum()) for part in values.split([len(c) for _, c in rows])]


@dataclass(frozen=True)
class BitsPerByte:
    """Bits that a model needs per byte of held-out documents.

    Attributes:
        texts: The documents.
        tokenizer: The model's.
        window: Longest input in tokens.
        batch_size: Windows at a time.
    """

    texts: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    window: int | None = None
    batch_size: int = 8

    def __call__(self, model: Any) -> float:
        """Returns the bits per byte."""
        return bits_per_byte(model, self.tokenizer, self.texts, window=self.window, batch_size=self.batch_size)
