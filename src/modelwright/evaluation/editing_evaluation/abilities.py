"""What is left of a model's abilities: asked for, and judged by likelihood, which cannot fall below chance.

A model whose answers cannot be read scores 0 when its text is compared, below guessing; whether it still puts the right
answer above wrong ones is another question, so both are measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from modelwright.editing.edit import edits_on
from modelwright.editing.examples import answer_logits
from modelwright.editing.subject import encode_prompt
from modelwright.errors import UserError
from modelwright.evaluation.asking import Layout, Turn, answers
from modelwright.evaluation.fact_texts import Asked, FactModelTexts, ask
from modelwright.evaluation.matching import match
from modelwright.worlds.base import Draw
from modelwright.worlds.fact_questions import question
from modelwright.worlds.names import Names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelwright.evaluation.editing_evaluation.sequence import State

#: The abilities of :func:`world_tasks`.
WORLD = ("arithmetic", "copying", "context")


@dataclass(frozen=True)
class Test:
    """One question of an ability.

    Attributes:
        prompt: The whole prompt, up to where the answer begins.
        answer: The right answer.
        wrong: Wrong answers to compare its likelihood with.
        question: What the prompt asks, where it has been laid out: an edit that lives in the prompt stands before it,
            inside the frame.
    """

    __test__ = False  # no test of pytest's

    prompt: str
    answer: str
    wrong: tuple[str, ...]
    question: str | None = None


@dataclass(frozen=True)
class Ability:
    """Tests of one kind, measured by :meth:`__call__`.

    Attributes:
        name: Its name.
        tests: The tests.
        tokenizer: The model's tokenizer.
        layout: How answers are cleaned; the prompts are laid out already.
        batch_size: Prompts at once.
    """

    name: str
    tests: tuple[Test, ...]
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    batch_size: int = 32

    @property
    def identity(self) -> str:
        """The same where the same is asked in the same way."""
        asked = repr((self.tests, self.layout))
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def __call__(self, state: State) -> dict[str, float]:
        """Measures a state: ``generation`` and ``likelihood``, shares of right answers, and the latter's ``chance``."""
        return self.measure(state.model, [self._prompt(test, state) for test in self.tests])

    def _prompt(self, test: Test, state: State) -> str:
        if test.question is None:
            return state.prompt(test.prompt)
        return self.layout.text(self.tokenizer, [Turn(test.question)], state.active)

    def measure(self, model: PreTrainedModel, prompts: Sequence[str] | None = None) -> dict[str, float]:
        """Measures a model; ``prompts`` replaces the tests' own."""
        prompts = [test.prompt for test in self.tests] if prompts is None else list(prompts)
        said = answers(model, self.tokenizer, prompts, self.layout, batch_size=self.batch_size)
        right = sum(match(answer, test.answer) for answer, test in zip(said, self.tests, strict=True))
        pairs = [(p, option) for p, t in zip(prompts, self.tests, strict=True) for option in (t.answer, *t.wrong)]
        scores = iter(continuation_scores(model, self.tokenizer, pairs, batch_size=2 * self.batch_size))
        best = 0
        for test in self.tests:
            first, *others = [next(scores) for _ in (test.answer, *test.wrong)]
            best += all(first > other for other in others)
        n = len(self.tests)
        chance = sum(1 / (1 + len(test.wrong)) for test in self.tests) / n
        return {"generation": right / n, "likelihood": best / n, "chance": chance}


@torch.no_grad()
def continuation_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 64,
) -> list[float]:
    """Returns the log-probability per token of each continuation (a blank stands before it) after its prompt.

    Under an edit that reads whole rows, each prompt has a call of its own, without its continuation.
    """
    rows = []
    for prompt, continuation in pairs:
        first = encode_prompt(tokenizer, prompt)  # a chat's text has its special tokens already
        second = tokenizer(f" {continuation}", add_special_tokens=False)["input_ids"]
        rows.append((first, second))
    found = [0.0] * len(rows)
    if any(edit.reads_rows for edit in edits_on(model)):
        for i, logits in answer_logits(model, rows, batch_size):
            chosen = logits.log_softmax(-1).cpu().gather(1, torch.tensor(rows[i][1])[:, None])
            found[i] = float(chosen.double().mean())
        return found
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for at in range(0, len(order), batch_size):
        picked = order[at : at + batch_size]
        width = max(len(rows[i][0]) + len(rows[i][1]) for i in picked)
        ids = torch.zeros(len(picked), width, dtype=torch.long)
        mask = torch.zeros(len(picked), width, dtype=torch.long)
        for row, i in enumerate(picked):
            whole = [*rows[i][0], *rows[i][1]]
            ids[row, width - len(whole) :] = torch.tensor(whole)
            mask[row, width - len(whole) :] = 1
        longest = max(len(rows[i][1]) for i in picked)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            position_ids=positions.to(model.device), use_cache=False,
        )  # fmt: skip
        logits = out.logits[:, -longest - 1 : -1].float().log_softmax(-1).cpu()
        for row, i in enumerate(picked):
            second = torch.tensor(rows[i][1])
            part = logits[row, longest - len(second) :].gather(1, second[:, None])
            found[i] = float(part.double().mean())
    return found


def fact_model_tasks(
    texts: FactModelTexts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    edited: Iterable[tuple[str, str]] = (),
    tests: int = 60,
    seed: int = 0,
) -> dict[str, Ability]:
    """Returns the testbed's abilities: facts that are not edited, arithmetic, copying, and following context.

    Args:
        texts: What the testbed's model was taught.
        tokenizer: Its tokenizer.
        edited: (subject, relation) of the facts that are edited, which are not asked.
        tests: Tests of each.
        seed: Decides which.
    """
    draw, gone = Draw(seed, "abilities"), set(edited)
    layout = Layout(kind="qa", new_tokens=5)
    kept = draw.shuffled(key for key in texts.keys if key not in gone)[:tests]

    def fact(key: tuple[str, str]) -> Test:
        right = texts.beliefs.objects[key]
        return Test(ask(question(key[1], key[0], draw.below(3))), right, others(key[1], right))

    def others(relation: str, *without: str) -> tuple[str, ...]:
        wrong = [o for o in draw.shuffled(texts.beliefs.candidates(relation)) if o not in without]
        return tuple(wrong[:3])

    def context(key: tuple[str, str]) -> Test:
        old = texts.beliefs.objects[key]
        asked = texts.in_context(draw, key)
        return Test(asked.text, asked.answer, (old, *others(key[1], old, asked.answer)[:2]))

    sums = [_sum(draw, texts.arithmetic(draw)) for _ in range(tests)]
    copies = [_copy(draw, texts.copying(draw)) for _ in range(tests)]
    found = {
        "facts": [fact(key) for key in kept],
        "arithmetic": sums,
        "copying": copies,
        "context": [context(draw.choice(kept)) for _ in range(tests)],
    }
    return {name: Ability(name, tuple(rows), tokenizer, layout) for name, rows in found.items() if rows}


def _sum(draw: Draw, asked: Asked) -> Test:
    right = int(asked.answer)
    wrong = draw.sample([n for n in range(max(0, right - 6), right + 7) if n != right], 3)
    return Test(asked.text, asked.answer, tuple(map(str, wrong)))


def _copy(draw: Draw, asked: Asked) -> Test:
    words, wrong = asked.answer.split(), []
    for at in range(3):
        other = list(words)
        other[at] = draw.choice([w for w in words if w != words[at]] or [words[at] + "x"])
        wrong.append(" ".join(other))
    return Test(asked.text, asked.answer, tuple(wrong))


def world_tasks(
    tokenizer: PreTrainedTokenizerBase, layout: Layout, names: Sequence[str] = WORLD, *, tests: int = 60, seed: int = 0
) -> dict[str, Ability]:
    """Returns generated abilities for any model: small sums, repeating words, and reading an invented fact.

    Raises:
        UserError: There is no such ability.
    """
    from modelwright.errors import did_you_mean

    draw = Draw(seed, "world abilities")
    invented = Names(draw)
    words = [invented.word() for _ in range(60)]

    def lay(text: str, answer: str, wrong: tuple[str, ...]) -> Test:
        return Test(layout.text(tokenizer, [Turn(text)]), answer, wrong, text)

    def arithmetic() -> Test:
        a, b = draw.between(2, 49), draw.between(2, 49)
        test = _sum(draw, Asked("", str(a + b)))
        return lay(f"What is {a} plus {b}?", test.answer, test.wrong)

    def copying() -> Test:
        test = _copy(draw, Asked("", " ".join(draw.sample(words, 3))))
        return lay(f"Repeat these words: {test.answer}", test.answer, test.wrong)

    def context() -> Test:
        who, where, *other = draw.sample(words, 5)
        text = f"{who} was born in {where}. {other[0]} was born in {other[1]}. Where was {who} born?"
        return lay(text, where, (other[0], other[1], other[2]))

    makers = {"arithmetic": arithmetic, "copying": copying, "context": context}
    for name in names:
        if name not in makers:
            raise UserError(f"There is no ability '{name}': {did_you_mean(name, makers)}")
    return {name: Ability(name, tuple(makers[name]() for _ in range(tests)), tokenizer, layout) for name in names}


def facts_to_keep(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layout: Layout, rows: Sequence[Mapping[str, str]]
) -> Ability | None:
    """Returns the ability to answer facts that the model answers rightly now; None if there are none.

    Args:
        model: The model before any edit.
        tokenizer: Its tokenizer.
        layout: How to ask.
        rows: ``question`` and ``answer``.
    """
    prompts = [layout.text(tokenizer, [Turn(row["question"])]) for row in rows]
    said = answers(model, tokenizer, prompts, layout)
    known = [i for i, row in enumerate(rows) if match(said[i], row["answer"])]
    every = list(dict.fromkeys(row["answer"] for row in rows))
    tests = []
    for i in known:
        right, draw = rows[i]["answer"], Draw(i, "facts to keep")
        wrong = tuple([o for o in draw.shuffled(every) if o != right][:3])
        tests.append(Test(prompts[i], right, wrong, rows[i]["question"]))
    return Ability("facts", tuple(tests), tokenizer, layout) if tests else None


@dataclass(frozen=True)
class LmEvalTasks:
    """Tasks of lm-eval on the live, hooked model, through :func:`~modelwright.evaluation.harness.evaluate_tasks`.

    Attributes:
        tokenizer: The model's tokenizer.
        tasks: Names of tasks, such as ``gsm8k`` or ``mmlu``.
        limit: Documents of each task at most.
        shots: Examples in the prompt; None takes the task's own number.
        batch_size: Documents at once.
        include_path: Folders with tasks of the user's.

    Raises:
        UserError: lm-eval is not installed, or does not know a task.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    batch_size: int = 8
    include_path: tuple[str, ...] = ()
    _manager: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from modelwright.evaluation.harness import find_tasks

        # Looked up once, and before any edit.
        object.__setattr__(self, "_manager", find_tasks(self.tasks, self.include_path))

    @property
    def identity(self) -> str:
        """The same where the same is asked in the same way; what stands in a task's files is not looked at."""
        return repr((self.tasks, self.limit, self.shots, self.include_path))

    def __call__(self, state: State) -> dict[str, float]:
        """Returns each task's metrics, ``task.metric`` to value: exact match is by generation, acc by likelihood.

        Raises:
            UserError: A task's data cannot be loaded, or the edits live in the prompt.
        """
        from modelwright.evaluation.harness import evaluate_tasks

        if state.prompt("x") != "x":
            raise UserError("Tasks of lm-eval have prompts of their own, into which in-context edits cannot be put.")
        found = evaluate_tasks(
            state.model, self.tokenizer, self.tasks, manager=self._manager, num_fewshot=self.shots, limit=self.limit,
            batch_size=self.batch_size,
        )  # fmt: skip
        return {
            f"{task}.{metric}": float(value)
            for task, metrics in found["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, int | float)
            and "stderr" not in metric
            and metric not in ("sample_len", "sample_count")
        }
