"""Which facts a model has wrong: the set that its edits are tested on, so that nothing is right before (paper, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout, Turn, answers, layout_for
from modelwright.evaluation.matching import Judge, Protocol, agrees

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelwright.progress import Progress


@dataclass(frozen=True)
class Hallucination:
    """A question that a model answers wrongly.

    Attributes:
        index: Its place among the questions.
        question: The question.
        answer: The right answer.
        output: What the model said.
    """

    index: int
    question: str
    answer: str
    output: str


def find_hallucinations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    answers_: Sequence[str],
    *,
    layout: Layout | None = None,
    protocol: Protocol = "word",
    judge: Judge | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Hallucination]:
    """Asks a model questions, greedily, and returns those that it answers wrongly, in their order.

    Asked again in the same way it answers them wrongly again, so efficacy before an edit is 0 by construction.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        questions: What to ask.
        answers_: The right answers.
        layout: How to ask; the chat template where there is one by default.
        protocol: Rule of matching.
        judge: Decides where the rule finds no match.
        batch_size: Questions at once.
        progress: Counts the questions that were answered.

    Raises:
        UserError: There are not as many answers as questions, or an answer is blank.
    """
    if len(questions) != len(answers_):
        raise UserError(f"There are {len(questions)} questions and {len(answers_)} answers: give one for each.")
    for number, answer in enumerate(answers_):
        if not answer.strip():
            raise UserError(f"The answer to question {number + 1} is blank, so it cannot be told what is wrong.")
    layout = layout or layout_for(tokenizer)
    prompts = [layout.text(tokenizer, [Turn(question)]) for question in questions]
    said = answers(model, tokenizer, prompts, layout, batch_size=batch_size, progress=progress)
    return [
        Hallucination(i, question, right, output)
        for i, (question, right, output) in enumerate(zip(questions, answers_, said, strict=True))
        if not agrees(output, right, "text", protocol, judge)
    ]
