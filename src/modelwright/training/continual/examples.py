"""Prompts and answers as tokens: batches to train on, and the accuracy of answers that are written."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from modelwright.decoding.generate import encode_prompt, left_pad
from modelwright.errors import UserError
from modelwright.models.scoring import context_length
from modelwright.models.tokenizers import encode
from modelwright.training.continual.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Returns a text in lower case, without ASCII punctuation and more than single spaces; "A" stays an answer."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@dataclass(frozen=True)
class Encoder:
    """Turns examples into tokens.

    Attributes:
        tokenizer: Needs an end token.
        max_tokens: Longest prompt; of a longer one, tokens in the middle are left out, so that the instruction at its
            beginning and what asks for the answer at its end stay.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    def __post_init__(self) -> None:
        """Raises :class:`UserError` if there is no end token."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end token (eos_token), so an answer cannot end: give it one.")

    @property
    def padding(self) -> int:
        """Token that fills rows up; masked, so that any will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def prompt(self, example: Example) -> list[int]:
        """Returns a prompt's tokens."""
        ids = encode_prompt(self.tokenizer, example.prompt)
        if len(ids) > self.max_tokens:
            head = self.max_tokens // 2
            ids = [*ids[:head], *ids[len(ids) - (self.max_tokens - head) :]]
        return ids

    def answer(self, text: str) -> list[int]:
        """Returns an answer's tokens, with the end token."""
        return [*encode(self.tokenizer, [f" {text}"])[0], int(self.tokenizer.eos_token_id)]

    def row(self, example: Example) -> dict[str, list[int]]:
        """Returns ``input_ids`` and ``labels`` (-100 at the prompt)."""
        prompt, answer = self.prompt(example), self.answer(example.answer)
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def batch(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Returns rows padded on the right: ``input_ids``, ``attention_mask``, ``labels``, each (B, T) int64."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        mask = (torch.arange(longest)[None] < lengths).long()
        return {
            "input_ids": padded("input_ids", self.padding),
            "attention_mask": mask,
            "labels": padded("labels", -100),
        }


def answer_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Returns the mean loss of the answers' tokens over the whole step, micro-batches and processes included."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    targets = labels[:, 1:].reshape(-1)
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())


def fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], max_tokens: int
) -> tuple[Encoder, int]:
    """Returns an encoder whose prompts and answers fit the model, and the tokens of the longest answer.

    Raises:
        UserError: Not even answers fit, the tokenizer is another model's, or two labels would count as one.
    """
    for task in tasks:
        _check_labels(task)
    encoder = Encoder(tokenizer, max_tokens)
    answers = [
        encoder.answer(answer) for answer in sorted({a for task in tasks for a in {*task.labels, *_answers(task)}})
    ]
    longest = max(map(len, answers))
    if (limit := context_length(model)) is not None:
        if limit - longest < 8:
            raise UserError(f"Answers of up to {longest} tokens do not fit the model, which takes at most {limit}.")
        encoder = Encoder(tokenizer, min(max_tokens, limit - longest))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = [encoder.prompt(row) for task in tasks for row in (task.train[0], task.test[0])]
    if (top := max(max(ids) for ids in [*answers, *first])) >= vocabulary:
        raise UserError(
            f"The tokenizer gives token {top}, but the model knows only {vocabulary}: it is another model's."
        )
    return encoder, longest


def _check_labels(task: Task) -> None:
    seen: dict[str, str] = {}
    for label in task.labels:
        other = seen.setdefault(normalise(label), label)
        if other.lower().split() != label.lower().split():
            raise UserError(
                f"Task {task.name}: answers are compared without punctuation, and its labels '{other}' and '{label}' "
                f"are the same then: name one of them otherwise, such as 'negative' for '-'."
            )


def _answers(task: Task) -> set[str]:
    return {example.answer for example in (*task.train, *task.test)}


@torch.no_grad()
def correct(
    model: PreTrainedModel, encoder: Encoder, examples: Sequence[Example], *, new_tokens: int, batch_size: int
) -> int:
    """Returns how many examples are answered rightly: written greedily, compared by normalised exact match.

    Args:
        model: In evaluation mode.
        encoder: Of its tokenizer.
        examples: Prompts and right answers.
        new_tokens: Tokens to write at most.
        batch_size: Prompts at once; prompts of like length share a batch.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        # Set, so that a checkpoint's generation_config.json does not decide: a penalty on repetition, as chat models
        # have it, would fall on the labels that the prompt lists.
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.padding,
    )
    prompts = sorted(((encoder.prompt(example), example.answer) for example in examples), key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, len(prompts), batch_size):
        group = prompts[start : start + batch_size]
        ids, mask = left_pad([prompt for prompt, _ in group], encoder.padding)
        device = next(model.parameters()).device
        written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
        texts = encoder.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(normalise(text) == normalise(answer) for text, (_, answer) in zip(texts, group, strict=True))
    return right
