"""Where a model recalls a fact: causal tracing (ROME, arXiv 2202.05262, section 2).

The subject's embeddings are blurred by noise, so that the model forgets the answer; then what one place of the network
gave in the clean run is put back. The answer's probability that comes back is the place's indirect effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from modelwright.editing.hooks import changed_output, seen_output
from modelwright.editing.requests import EditRequest
from modelwright.editing.subject import check_tokens, encode_pair, subject_span
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["block", "mlp", "attention"]
#: Tokens of a prompt by their place, in order.
PLACES = ("subject", "subject_last", "after", "last")


@dataclass(frozen=True)
class Trace:
    """Mean indirect effects over facts.

    Attributes:
        effects: Kind to place to one number a layer: probability that comes back; None where no prompt has the place.
        clean: Mean probability of the answer.
        blurred: The same with blurred subjects.
        facts: Facts traced.
        skipped: Facts whose answer is not the model's own, and which say nothing therefore.
    """

    effects: dict[str, dict[str, list[float] | None]]
    clean: float
    blurred: float
    facts: int
    skipped: int

    def recommended(self) -> dict[str, Any]:
        """Returns the ``layer`` and ``fact_token`` whose MLPs bring back most, for ROME; and how much that is."""
        best: tuple[float, int, str] = (-1.0, 0, "subject_last")
        for place in ("subject_last", "last"):
            for layer, effect in enumerate(self.effects["mlp"][place] or []):
                # Nothing above the last layer reads what it gives at the subject.
                last = layer == len(self.effects["mlp"][place] or []) - 1
                if effect > best[0] and not (last and place == "subject_last"):
                    best = (effect, layer, place)
        return {"layer": best[1], "fact_token": best[2], "effect": best[0]}


@torch.no_grad()
def causal_trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    kinds: Sequence[Kind] = ("block", "mlp", "attention"),
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Trace:
    """Traces facts that the model knows.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        requests: Prompts with their subjects. The answer is ``old_answer`` (its first token), or what the model says
            where that is not given; the target plays no part.
        kinds: What is put back: the output of a block, of MLPs or of attentions.
        noise: Standard deviation of the noise, as a multiple of that of the subjects' embeddings.
        samples: Draws of the noise a fact.
        window: Layers around a layer whose MLPs or attentions are put back together; a fifth of all by default, as the
            paper's 10 of 48.
        seed: Seed of the noise.
        batch_size: Rows at once.
        progress: Told of each fact.

    Raises:
        UserError: No fact is known to the model, or a kind is unknown to it.
    """
    parts = roles(model)
    depth = len(parts.layers)
    window = max(1, round(depth * 10 / 48)) if window is None else window
    if samples < 1 or noise <= 0 or window < 1 or batch_size < 1:
        raise UserError("samples, noise, window and batch_size must be above 0.")
    modules: dict[str, list[nn.Module]] = {}
    for kind in kinds:
        found = {"block": "block", "mlp": "mlp", "attention": "attention"}.get(kind)
        if found is None or any(getattr(part, found) is None for part in parts.layers):
            raise UserError(f"There is no '{kind}' in the layers of this '{parts.family}' model.")
        modules[kind] = [getattr(part, found) for part in parts.layers]
    spans = [subject_span(tokenizer, request.text, request.subject) for request in requests]
    check_tokens(model, [ids for ids, _, _ in spans])
    subjects = torch.tensor([t for ids, first, last in spans for t in ids[first : last + 1]], device=model.device)
    if not len(subjects):
        raise UserError("There is no fact to trace.")
    embedded = parts.embedding(subjects).float()
    deviation, width = noise * float(embedded.std()), embedded.shape[1]
    generator = torch.Generator().manual_seed(seed)
    sums: dict[tuple[str, str], torch.Tensor] = {}
    counts: dict[str, int] = {}
    clean_sum = blurred_sum = 0.0
    facts = skipped = 0
    for request, (ids, first, last) in zip(requests, spans):
        one = _Fact(model, parts, ids, first, last)
        clean, states = one.clean([m for kind in kinds for m in modules[kind]])
        answer = int(clean.argmax())
        if request.old_answer is not None and encode_pair(tokenizer, request.text, request.old_answer)[1][0] != answer:
            skipped += 1
        else:
            facts += 1
            blur = deviation * torch.randn(samples, last - first + 1, width, generator=generator)
            base = float(one.probabilities(blur, [], answer, batch_size).mean())
            clean_sum += float(clean.softmax(-1)[answer])
            blurred_sum += base
            places = one.places()
            for place, tokens in places.items():
                counts[place] = counts.get(place, 0) + (1 if tokens else 0)
            for number, kind in enumerate(kinds):
                own = states[number * depth : (number + 1) * depth]
                for layer in range(depth):
                    reach = [layer] if kind == "block" else _around(layer, window, depth)
                    for place, tokens in places.items():
                        if not tokens:
                            continue
                        put = [(modules[kind][i], own[i]) for i in reach]
                        back = one.probabilities(blur, put, answer, batch_size, tokens).mean()
                        total = sums.setdefault((kind, place), torch.zeros(depth, dtype=torch.float64))
                        total[layer] += float(back) - base
        if progress is not None:
            progress.advance()
    if not facts:
        raise UserError(
            f"The model gives none of the {len(requests)} answers, so there is nothing to trace: leave old_answer out "
            f"to trace what it says instead."
        )
    effects: dict[str, dict[str, list[float] | None]] = {
        kind: {
            place: (sums[kind, place] / counts[place]).tolist() if (kind, place) in sums else None for place in PLACES
        }
        for kind in kinds
    }
    return Trace(effects, clean_sum / facts, blurred_sum / facts, facts, skipped)


def _around(layer: int, window: int, depth: int) -> range:
    start = max(0, layer - window // 2)
    return range(start, min(depth, max(start + 1, layer - window // 2 + window)))


class _Fact:
    """One prompt under tracing."""

    def __init__(self, model: Any, parts: Any, ids: list[int], first: int, last: int) -> None:
        self.model, self.parts = model, parts
        self.ids = torch.tensor([ids], device=model.device)
        self.first, self.last = first, last

    def places(self) -> dict[str, list[int]]:
        """Tokens of each place; the prompt's last token counts as that only."""
        end = self.ids.shape[1] - 1
        tokens: dict[str, list[int]] = {
            "subject": list(range(self.first, self.last)),
            "subject_last": [self.last],
            "after": list(range(self.last + 1, end)),
            "last": [end],
        }
        if self.last == end:
            tokens["subject_last"] = []
        return tokens

    def clean(self, modules: Sequence[nn.Module]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last logits, and what each module gives: (length, width)."""
        found: dict[int, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            for number, module in enumerate(modules):
                stack.enter_context(seen_output(module, lambda t, n=number: found.__setitem__(n, t[0])))  # type: ignore[misc]
            logits = self.model(input_ids=self.ids, use_cache=False).logits[0, -1].float()
        return logits, [found[n] for n in range(len(modules))]

    def probabilities(
        self,
        blur: torch.Tensor,
        put_back: Sequence[tuple[nn.Module, torch.Tensor]],
        answer: int,
        batch_size: int,
        tokens: Sequence[int] = (),
    ) -> torch.Tensor:
        """Probability of the answer for each token put back alone and each draw of the noise."""
        alone = list(tokens) or [-1]
        rows = [(token, draw) for token in alone for draw in range(len(blur))]
        found = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            where = torch.tensor([token for token, _ in part], device=self.ids.device)
            noise = blur[[draw for _, draw in part]].to(self.ids.device)
            with contextlib.ExitStack() as stack:
                stack.enter_context(changed_output(self.parts.embedding, self._blurred(noise)))
                for module, state in put_back:
                    stack.enter_context(changed_output(module, _putting(state, where)))
                logits = self.model(input_ids=self.ids.expand(len(part), -1), use_cache=False).logits[:, -1]
            found.append(logits.float().softmax(-1)[:, answer].cpu())
        return torch.cat(found)

    def _blurred(self, noise: torch.Tensor) -> Any:
        def change(embeddings: torch.Tensor) -> torch.Tensor:
            changed = embeddings.clone()
            changed[:, self.first : self.last + 1] += noise.to(embeddings.dtype)
            return changed

        return change


def _putting(state: torch.Tensor, where: torch.Tensor) -> Any:
    def change(output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        rows = torch.arange(len(where), device=where.device)
        changed[rows, where] = state[where]
        return changed

    return change
