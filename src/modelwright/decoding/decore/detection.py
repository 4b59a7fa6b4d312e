"""Finding the heads that copy from the context: the needle probe of arXiv 2404.15574 (step 0 of DeCoRe).

A needle is hidden in a haystack and asked for. While the model writes the answer, a head has copied a token if its
strongest attention, at the step that produced the token, lay on that very token within the needle.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modelwright.attention.implementation import is_changed
from modelwright.decoding.contrast import as_float
from modelwright.decoding.decore.heads import HeadScores
from modelwright.decoding.loop import Prompt, Stream
from modelwright.errors import UserError
from modelwright.models.heads import Head, fingerprint, head_layers
from modelwright.models.scoring import context_length
from modelwright.models.tokenizers import prefix_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Form = Literal["set", "steps"]
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_MARK = "NEEDLE-PROBE-TEXT"
#: What stands around the haystack, if no chat template does.
BEFORE = "Read the text and answer the question with the words of the text.\n\n"
AFTER = "\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Needle:
    """A sentence to hide and the question for it.

    Attributes:
        text: The sentence.
        question: The question.
        answer: The part of the sentence that is to be copied; by default all of it.
    """

    text: str
    question: str
    answer: str = ""


@dataclass(frozen=True)
class Probe:
    """A prompt with a needle.

    Attributes:
        ids: Tokens.
        start: Where the tokens to be copied begin.
        end: Where they end.
        answer: Their text.
        cell: Length, depth, and numbers of needle and haystack.
    """

    ids: list[int]
    start: int
    end: int
    answer: str
    cell: tuple[int, float, int, int]


@dataclass(frozen=True)
class Sample:
    """What came of one probe.

    Attributes:
        cell: See :class:`Probe`.
        recall: Share of the needle's words in the answer.
        scores: Score of each layer's heads, ``(layers, heads)``.
        completion: What the model wrote.
    """

    cell: tuple[int, float, int, int]
    recall: float
    scores: list[list[float]]
    completion: str


class RetrievalHeadScorer:
    """Scores the heads of a model by how much of a needle each copies.

    Attention weights are only asked for while the answer is written, one row a step; the prompt is read by the model's
    own attention. So long prompts need no more memory than in use.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        new_tokens: Tokens of an answer at most; it also ends at a new line.
        form: ``set`` is the paper's: the share of the needle's different tokens that the head copied. ``steps`` is the
            official code's: copying steps divided by the needle's tokens, here at most 1.
        least_recall: Samples whose answer has less of the needle's words (ROUGE-1 recall) are left out.
        chat: Ask by the tokenizer's chat template.
        before: What stands before the haystack.
        after: What stands behind it, with ``{question}``; its last line is left out with ``chat``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        new_tokens: int = 50,
        form: Form = "set",
        least_recall: float = 0.5,
        chat: bool = False,
        before: str = BEFORE,
        after: str = AFTER,
    ) -> None:
        if form not in ("set", "steps"):
            raise UserError(f"There is no form '{form}' of the score: it is set or steps.")
        if new_tokens < 1 or not 0 <= least_recall <= 1:
            raise UserError("new_tokens must be at least 1, and least_recall a share between 0 and 1.")
        self.model, self.tokenizer = model, tokenizer
        self.new_tokens, self.form, self.least_recall, self.chat = new_tokens, form, least_recall, chat
        self.layers = head_layers(model)
        self.before, self.after = self._frame(before, after)

    def score(
        self,
        haystacks: Sequence[str],
        needles: Sequence[Needle],
        lengths: Sequence[int],
        depths: int | Sequence[float] = 10,
    ) -> HeadScores:
        """Runs all probes and returns the scores of those whose answer was right.

        Args:
            haystacks: Texts; needle i goes into text i, and round again.
            needles: What is hidden.
            lengths: Tokens of prompts.
            depths: Where needles stand, 0 to 1; a number is so many depths, evenly spaced.

        Raises:
            UserError: No answer was right, or a needle does not fit.
        """
        probes = self.probes(haystacks, needles, lengths, depths)
        return self.collect([self.run(probe) for probe in probes], {"lengths": list(lengths)})

    def probes(
        self,
        haystacks: Sequence[str],
        needles: Sequence[Needle],
        lengths: Sequence[int],
        depths: int | Sequence[float] = 10,
    ) -> list[Probe]:
        """Returns the prompts of all lengths, depths and needles; see :meth:`score`."""
        if not haystacks or not needles or not lengths:
            raise UserError("Give at least one haystack, one needle and one length.")
        longest = context_length(self.model)
        if longest is not None and max(lengths) + self.new_tokens > longest:
            raise UserError(
                f"A prompt of {max(lengths)} tokens and an answer of {self.new_tokens} are beyond the {longest} "
                f"positions of the model: use shorter prompts."
            )
        places = [i / max(1, depths - 1) for i in range(depths)] if isinstance(depths, int) else list(depths)
        if not places or not all(0 <= place <= 1 for place in places):
            raise UserError("Depths must lie between 0 and 1, and there must be one.")
        texts = [self._sentences(text) for text in haystacks]
        return [
            self._probe(texts[n % len(texts)], needle, (length, place, n, n % len(texts)))
            for length in lengths
            for place in places
            for n, needle in enumerate(needles)
        ]

    @torch.no_grad()
    def run(self, probe: Probe) -> Sample:
        """Asks one probe, greedily, and scores every head.

        Raises:
            UserError: The model gives no attention weights.
        """
        from transformers import DynamicCache

        ids = torch.tensor([probe.ids], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        stream = Stream(self.model, Prompt(ids, cache=cache, room=ids.shape[1] + self.new_tokens))
        if ids.shape[1] > 1:
            stream.read(ids[:, :-1])
        ends = _ends(self.model, self.tokenizer)
        written: list[int] = []
        looked: list[Tensor] = []
        with eager(self.model):
            token = ids[:, -1:]
            while len(written) < self.new_tokens:
                out = stream.read(token, attentions=True)
                token = as_float(out.logits[:, -1]).argmax(-1, keepdim=True)
                if int(token) in ends:
                    break
                written.append(int(token))
                looked.append(strongest(out.attentions, len(self.layers), stream.seen))
                if "\n" in self.tokenizer.decode(written[-1:]):
                    break
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        scores = copy_scores(
            torch.stack(looked) if looked else torch.zeros(0, len(self.layers), self._heads(), dtype=torch.long),
            written, probe.ids, probe.start, probe.end, self.form,
        )  # fmt: skip
        return Sample(probe.cell, unigram_recall(probe.answer, text), scores.tolist(), text)

    def collect(self, samples: Sequence[Sample], settings: Mapping[str, Any] | None = None) -> HeadScores:
        """Returns the scores of the samples whose answer was right.

        Raises:
            UserError: There are none.
        """
        kept = [s for s in samples if s.recall > self.least_recall or not self.least_recall]
        if not kept:
            example = f" Such as: {samples[0].completion[:80]!r}." if samples else ""
            raise UserError(
                f"None of {len(samples)} answers had more than {self.least_recall:.0%} of the needle's words, so there "
                f"is nothing to rank heads by: use shorter haystacks, or the chat template of a chat model.{example}"
            )
        scores: dict[Head, list[float]] = {
            (index, head): [sample.scores[place][head] for sample in kept]
            for place, index in enumerate(self.layers)
            for head in range(self._heads())
        }
        own = {"form": self.form, "new_tokens": self.new_tokens, "least_recall": self.least_recall, "chat": self.chat}
        own |= {"asked": len(samples), "kept": len(kept)}
        return HeadScores(scores, fingerprint(self.model), {**(settings or {}), **own})

    def _heads(self) -> int:
        return next(iter(self.layers.values())).heads

    def _frame(self, before: str, after: str) -> tuple[str, str]:
        """Returns what stands before the haystack, and after it with ``{question}`` in it."""
        if not self.chat:
            return before, after
        from modelwright.decoding.generate import chat_prompt

        laid = chat_prompt(self.tokenizer, before + _MARK + after.rpartition("\n")[0])
        first, _, last = laid.partition(_MARK)
        return first, last

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        # A tokenizer that puts a space before every text must not be given another.
        if text[0] == " " and self._spaces():
            text = text[1:]
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _spaces(self) -> bool:
        one = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return bool(self.tokenizer.decode(one + one).strip() == "a a")

    def _sentences(self, text: str) -> list[list[int]]:
        found = [ids for part in _SENTENCE.split(text) if part.strip() and (ids := self._ids(" " + part.strip()))]
        if not found:
            raise UserError("A haystack has no text in it: give files with sentences.")
        return found

    def _probe(self, sentences: list[list[int]], needle: Needle, cell: tuple[int, float, int, int]) -> Probe:
        answer = needle.answer or needle.text
        at = needle.text.find(answer)
        if at < 0:
            raise UserError(f"The needle {needle.text!r} does not have its answer {answer!r} in it.")
        head = self._ids(" " + needle.text[:at].strip()) if needle.text[:at].strip() else []
        body, tail = self._ids(" " + answer), self._ids(needle.text[at + len(answer) :])
        before, after = self._around(needle)
        length, depth = cell[0], cell[1]
        room = length - len(before) - len(head) - len(body) - len(tail) - len(after)
        if room < 0:
            raise UserError(f"The needle {needle.text!r} and its question do not fit a prompt of {length} tokens.")
        filler: list[list[int]] = []
        size = number = 0
        while size + len(sentences[number % len(sentences)]) <= room:
            filler.append(sentences[number % len(sentences)])
            size += len(filler[-1])
            number += 1
        ends = [0, *accumulate(map(len, filler))]
        place = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * size))
        ids = [*before, *chain.from_iterable(filler[:place]), *head]
        start = len(ids)
        ids += [*body, *tail, *chain.from_iterable(filler[place:]), *after]
        return Probe(ids, start, start + len(body), answer, cell)

    def least_length(self, needle: Needle) -> int:
        """Returns about how many tokens a prompt needs for a needle and its question alone."""
        before, after = self._around(needle)
        return len(before) + len(after) + len(self._ids(" " + needle.text)) + 4

    def _around(self, needle: Needle) -> tuple[list[int], list[int]]:
        begin = prefix_ids(self.tokenizer)[:1] if self._begins() and not self.chat else []
        return begin + self._ids(self.before), self._ids(self.after.replace("{question}", needle.question))

    def _begins(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]


def strongest(attentions: Sequence[Tensor | None] | None, layers: int, keys: int) -> Tensor:
    """Returns where each head looks most, ``(layers, heads)``: positions counted from the beginning.

    Args:
        attentions: Weights of each layer, ``(1, heads, rows, keys)``; of a sliding layer the last keys only.
        layers: Layers that have heads.
        keys: Tokens read so far.

    Raises:
        UserError: The model gave no weights.
    """
    found = [weights for weights in attentions or () if isinstance(weights, Tensor)]
    if len(found) != layers:
        raise UserError(
            "The model gives no attention weights, which scoring heads needs: its attention must be the 'eager' one of "
            "transformers while heads are scored."
        )
    return torch.stack([w[0, :, -1].argmax(-1).cpu() + (keys - w.shape[-1]) for w in found])


def copy_scores(
    looked: Tensor, written: Sequence[int], prompt: Sequence[int], start: int, end: int, form: Form = "set"
) -> Tensor:
    """Returns the score of each head on one sample, ``(layers, heads)`` float64.

    Args:
        looked: Position of each head's strongest attention at the steps that produced the tokens,
            ``(steps, layers, heads)`` int64.
        written: The tokens produced, one a step.
        prompt: Tokens of the prompt.
        start: First position of the needle in it.
        end: The position behind the needle.
        form: See :class:`RetrievalHeadScorer`.

    Raises:
        UserError: The needle is not in the prompt.
    """
    if not 0 <= start < end <= len(prompt):
        raise UserError(f"The needle is not in the prompt: positions {start} to {end} of {len(prompt)} tokens.")
    needle = torch.tensor(prompt[start:end])
    tokens = torch.tensor(list(written), dtype=torch.long)[:, None, None]
    inside = (looked >= start) & (looked < end)
    hit = inside & (needle[(looked - start).clamp(0, end - start - 1)] == tokens)
    if form == "steps":
        return (hit.double().sum(0) / (end - start)).clamp(max=1)
    kinds = needle.unique()
    copied = torch.stack([(hit & (tokens == kind)).any(0) for kind in kinds]) if len(written) else None
    if copied is None:
        return torch.zeros(looked.shape[1:], dtype=torch.float64)
    return copied.double().mean(0)


def unigram_recall(reference: str, text: str) -> float:
    """Returns the share of a reference's words that a text has (ROUGE-1 recall without stemming)."""
    wanted, found = (Counter(re.findall(r"[a-z0-9]+", part.lower())) for part in (reference, text))
    return sum((wanted & found).values()) / max(1, wanted.total())


@contextlib.contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Gives the model the attention that returns weights, inside the block.

    Raises:
        UserError: It has none, or another method has replaced its attention.
    """
    own = str(getattr(model.get_decoder().config, "_attn_implementation", None) or "eager")
    if is_changed(model):
        raise UserError("Another method has changed this model's attention: leave its context to score heads.")
    if own != "eager":
        try:
            model.set_attn_implementation("eager")
        except (ValueError, ImportError) as error:
            raise UserError(f"{type(model).__name__} has no eager attention, whose weights scoring needs.") from error
    try:
        yield
    finally:
        if own != "eager":
            model.set_attn_implementation(own)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    found = model.generation_config.eos_token_id
    ends = set(found if isinstance(found, list) else [] if found is None else [found])
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
