"""Putting questions to a model: by its chat template, or as lines of question and answer, under an edit or without."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelwright.progress import Progress

#: What a chat model is told; the answers are compared with short labels.
SHORT = "Answer with a short phrase or one word only, without repeating the question and without an explanation."
#: What it is told before a question with choices.
LETTER = "Answer with the letter of the right choice only: A, B, C or D."


class Prompting(Protocol):
    """What an edit may do to a question; see :class:`modelwright.editing.edit.Edit`."""

    def prompt(self, question: str) -> str:
        """Returns what to ask instead."""


@dataclass(frozen=True)
class Turn:
    """A question, with the answer that was given to it, if it is over."""

    question: str
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How questions are laid out.

    Attributes:
        kind: ``chat`` (the tokenizer's template, with a system message), ``qa`` (``Q: …`` and ``A:`` on lines, for
            models that are not tuned to chat) or ``raw`` (the question alone).
        new_tokens: Tokens of an answer at most.
    """

    kind: Literal["chat", "qa", "raw"]
    new_tokens: int = 16

    def text(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Turn],
        edits: Sequence[Prompting] = (),
        system: str | None = SHORT,
    ) -> str:
        """Returns the prompt of a conversation whose last question is open.

        An edit that lives in the prompt stands before the first question: inside the user's message of a chat.
        """

        def edited(text: str) -> str:
            for edit in edits:
                text = edit.prompt(text)
            return text

        if self.kind == "chat":
            messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
            for number, turn in enumerate(turns):
                messages.append({"role": "user", "content": turn.question if number else edited(turn.question)})
                if turn.answer is not None:
                    messages.append({"role": "assistant", "content": turn.answer})
            return _chat(tokenizer, messages)
        if self.kind == "qa":
            parts = [f"Q: {t.question}\nA:" + (f" {t.answer}\n" if t.answer is not None else "") for t in turns]
        else:
            parts = [t.question + (f" {t.answer} " if t.answer is not None else "") for t in turns]
        return edited("".join(parts))

    def edit_prompt(self, question: str) -> str:
        """Returns what an editor should fit the answer to: the question as it will be asked, without a chat's frame.

        The published runs fit to the bare question too and ask through the template.
        """
        return f"Q: {question}\nA:" if self.kind == "qa" else question


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    lay = functools.partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        return str(lay(messages))
    except Exception:
        # Templates raise errors of their own; what many refuse is a system message (Gemma).
        if messages[0]["role"] != "system":
            raise
        first = {"role": "user", "content": f"{messages[0]['content']} {messages[1]['content']}"}
        return str(lay([first, *messages[2:]]))


def layout_for(tokenizer: PreTrainedTokenizerBase, kind: str = "auto", new_tokens: int = 16) -> Layout:
    """Returns a layout by name; ``auto`` is the chat template where there is one, else ``qa``.

    Raises:
        UserError: There is no such layout, or no chat template.
    """
    if kind == "auto":
        kind = "chat" if tokenizer.chat_template else "qa"
    if kind not in ("chat", "qa", "raw"):
        raise UserError(f"There is no layout '{kind}': choose auto, chat, qa or raw.")
    if kind == "chat" and not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template: choose the layout qa or raw.")
    if new_tokens < 1:
        raise UserError(f"Answers need at least 1 token, not {new_tokens}.")
    return Layout(kind=kind, new_tokens=new_tokens)  # type: ignore[arg-type]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    layout: Layout,
    *,
    batch_size: int = 16,
    new_tokens: int | None = None,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> list[str]:
    """Returns the model's greedy answers to prompts of one layout, cleaned, in their order.

    Prompts of like length share a batch; that does not change the answers beyond rounding.

    Raises:
        UserError: ``batch_size`` is below 1; see also :func:`modelwright.decoding.generate.generate`.
    """
    from modelwright.decoding.generate import Sampling, generate

    if batch_size < 1:
        raise UserError(f"The batch size must be at least 1, not {batch_size}.")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    run: Any = None if use_cache else functools.partial(model.generate, use_cache=False)
    found = generate(
        model, tokenizer, [prompts[i] for i in order], Sampling(max_new_tokens=new_tokens or layout.new_tokens),
        batch_size=batch_size, special_tokens=layout.kind != "chat", generate_with=run,
    )  # fmt: skip
    texts = [""] * len(prompts)
    for i, (completion,) in zip(order, found, strict=True):
        texts[i] = clean(completion.text, layout)
        if progress is not None:
            progress.advance()
    return texts


def clean(text: str, layout: Layout) -> str:
    """Returns an answer without what follows it: one line, no full stop at its end."""
    if layout.kind == "qa":
        text = text.strip().split("\n")[0]
    return " ".join(text.split()).rstrip(".")
