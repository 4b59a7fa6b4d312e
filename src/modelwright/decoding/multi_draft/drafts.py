"""Where drafts come from: an assistant model, the model's own first layers, or the prompt.

A drafter is asked once per call of ``generate`` to ``start``; what it returns proposes drafts for each step. Drafts of
a step must be independent given what was generated, and each must name the law that its tokens were drawn from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from modelwright.decoding.multi_draft.cache import Forward, Kept, check_cache, full_cache
from modelwright.decoding.multi_draft.draws import draw_rows
from modelwright.decoding.multi_draft.sampling import Row, Shaper, as_probabilities
from modelwright.decoding.multi_draft.tree import Draft
from modelwright.errors import UserError
from modelwright.models.scoring import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Proposer(Protocol):
    """Proposes drafts during one call of ``generate``."""

    @property
    def calls(self) -> int:
        """Forward calls of a draft model so far."""

    def propose(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[Draft]]:
        """Returns drafts for each sequence, none longer than its length says; there may be none."""


class Drafter(Protocol):
    """A source of drafts."""

    def start(self, target: PreTrainedModel, shaper: Shaper, greedy: bool) -> Proposer:
        """Begins a call of ``generate``."""


@dataclass(frozen=True)
class Sampled:
    """A draft whose tokens were drawn.

    Attributes:
        tokens: The tokens.
        laws: The law that each was drawn from, ``(V,)`` float64; empty where the target takes its argmax.
    """

    tokens: list[int]
    laws: list[Tensor]

    def law(self, depth: int, like: Tensor) -> Tensor:
        """See :class:`~modelwright.decoding.multi_draft.tree.Draft`."""
        return self.laws[depth].to(like.device)


@dataclass(frozen=True)
class Copied:
    """A draft that follows from the prompt, with certainty: its laws are points.

    Attributes:
        tokens: The tokens.
    """

    tokens: list[int]

    def law(self, depth: int, like: Tensor) -> Tensor:
        """See :class:`~modelwright.decoding.multi_draft.tree.Draft`."""
        point = torch.zeros_like(like)
        point[self.tokens[depth]] = 1
        return point


@dataclass(kw_only=True)
class AssistantDrafts:
    """Drafts from a smaller model with the same vocabulary.

    Where the target takes its most probable token, drafts begin with the assistant's K most probable ones and go on
    greedily; else they are K independent samples.

    Attributes:
        model: A causal language model.
        num_drafts: K, drafts a step.
        temperature: The draft law is flattened by it, after the processors of ``generate`` (temperature, top-k …) were
            applied to the assistant's logits as to the target's. Higher: more diverse drafts.
        pad_vocabulary: Whether to cut or fill up logits of another size than the target's, for models of one tokenizer
            whose tables were padded differently.
    """

    model: PreTrainedModel
    num_drafts: int = 2
    temperature: float = 1.0
    pad_vocabulary: bool = False

    def __post_init__(self) -> None:
        _check(self.num_drafts)
        if not self.temperature > 0:
            raise UserError(f"The draft temperature must be above 0, not {self.temperature}.")

    def start(self, target: PreTrainedModel, shaper: Shaper, greedy: bool) -> Proposer:
        """See :class:`Drafter`.

        Raises:
            UserError: The vocabularies differ.
        """
        own, wanted = vocabulary_size(self.model), vocabulary_size(target)
        if own != wanted and not self.pad_vocabulary:
            raise UserError(
                f"The draft model has {own} tokens and the target {wanted}: they must share a tokenizer. If they do "
                "and only their tables were padded differently, set pad_vocabulary."
            )
        return _AssistantProposer(self.model, self, wanted, shaper, greedy)


@dataclass(kw_only=True)
class EarlyExitDrafts:
    """Drafts from the first layers of the target itself, its final norm and its head; no second model.

    Useful if the model was trained for it (LayerSkip and the like).

    Attributes:
        layers: Layers to run.
        num_drafts: K, drafts a step.
        temperature: See :class:`AssistantDrafts`.
    """

    layers: int
    num_drafts: int = 2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(self.num_drafts)
        if not self.temperature > 0:
            raise UserError(f"The draft temperature must be above 0, not {self.temperature}.")

    def start(self, target: PreTrainedModel, shaper: Shaper, greedy: bool) -> Proposer:
        """See :class:`Drafter`.

        Raises:
            UserError: The model has not so many layers, or they were not found.
        """
        options = AssistantDrafts(
            model=early_exit(target, self.layers), num_drafts=self.num_drafts, temperature=self.temperature
        )
        return options.start(target, shaper, greedy)


@dataclass(kw_only=True)
class PromptLookupDrafts:
    """Drafts that are copied from what follows earlier occurrences of the last tokens: no model at all.

    Attributes:
        num_drafts: K, different continuations a step at most; the latest occurrences of the longest match come first.
        longest: Most tokens that must match.
        shortest: Fewest tokens that must match.
    """

    num_drafts: int = 2
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        _check(self.num_drafts)
        if not 1 <= self.shortest <= self.longest:
            raise UserError(f"A match needs 1 <= shortest <= longest, not {self.shortest} and {self.longest}.")

    def start(self, target: PreTrainedModel, shaper: Shaper, greedy: bool) -> Proposer:
        """See :class:`Drafter`."""
        return _LookupProposer(self)


def _check(num_drafts: int) -> None:
    if num_drafts < 1:
        raise UserError(f"There must be at least 1 draft, not {num_drafts}.")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns the number of logits a model gives."""
    head = model.get_output_embeddings()
    weight = getattr(head if head is not None else model.get_input_embeddings(), "weight", None)
    return int(weight.shape[0]) if weight is not None else int(model.config.get_text_config().vocab_size)


class _AssistantProposer:
    def __init__(
        self, model: PreTrainedModel, options: AssistantDrafts, vocabulary: int, shaper: Shaper, greedy: bool
    ) -> None:
        self.forward, self.options, self.vocabulary = Forward(model), options, vocabulary
        self.shaper, self.greedy = shaper, greedy
        self.limit = context_length(model)
        self.table = model.get_input_embeddings().weight.shape[0]
        self.device = model.device
        self.rows: list[Row] = []
        self.kept: Kept | None = None

    @property
    def calls(self) -> int:
        return self.forward.calls

    def propose(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[Draft]]:
        if self.limit is not None:
            # Beyond its positions the assistant has nothing to say; the target goes on alone.
            room = [self.limit - (row.length - row.padding) + 1 for row in rows]
            lengths = [max(0, min(pair)) if min(room) > 0 else 0 for pair in zip(lengths, room, strict=True)]
        if max(lengths) < 1:
            return [[] for _ in rows]
        drawn, laws = self._sample(rows, self._catch_up(rows), lengths)
        tokens = drawn.tolist()
        count = self.options.num_drafts
        drafts: list[list[Draft]] = []
        for b, length in enumerate(lengths):
            # Drafts of one beginning share a law, which they were drawn from; one object, so that this is seen at once.
            shared: dict[tuple[int, ...], Tensor] = {}
            some: list[Draft] = []
            for k in range(b * count, (b + 1) * count if length > 0 else 0):
                path = tokens[k][:length]
                if max(path) >= self.vocabulary:
                    raise UserError("A draft model's scores of the next token are not numbers: try another dtype.")
                own = [shared.setdefault(tuple(path[:depth]), law[k]) for depth, law in enumerate(laws[:length])]
                some.append(Sampled(path, own))
            drafts.append(some)
        return drafts

    def _catch_up(self, rows: Sequence[Row]) -> Tensor:
        """Feeds what was generated since the last step; returns the logits of what comes next, ``(rows, V)``."""
        if self.kept is None:
            # With every key kept, a model's own mask still applies its windows: nothing has to be rolled back.
            self.kept = Kept(full_cache(self.forward.model), [0] * len(rows))
            check_cache(self.kept.cache, self.forward.model)
        else:
            at = {id(row): i for i, row in enumerate(self.rows)}
            self.kept.select([at[id(row)] for row in rows])
        self.rows = list(rows)
        kept = self.kept
        pending = [row.host[row.padding + held : row.length] for row, held in zip(rows, kept.held, strict=True)]
        count = max(len(p) for p in pending)
        columns = torch.zeros(3, len(rows), count, dtype=torch.long)
        for b, part in enumerate(pending):
            last = slice(count - len(part), count)
            columns[0, b, last] = part
            columns[1, b, last] = torch.arange(kept.held[b], kept.held[b] + len(part))
            columns[2, b, last] = 1
        ids, positions, there = columns.to(self.device)
        full = kept.full and all(len(part) == count for part in pending)
        mask = None if full else kept.mask(there)
        logits = self.forward(self._known(ids), mask, positions, kept.cache, last=True)[:, -1]
        kept.commit(range(len(rows)), [range(count - len(p), count) for p in pending], count)
        return logits

    def _sample(self, rows: Sequence[Row], logits: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Draws all drafts, without waiting for the device; the cache is as before afterwards.

        Returns:
            Tokens ``(rows * K, longest)``, sequence by sequence; and by depth their laws, ``(rows * K, V)`` each.
        """
        kept, count, longest = self.kept, self.options.num_drafts, max(lengths)
        assert kept is not None
        # Appending makes new tensors, so the old ones are the cache to come back to.
        before = [(layer, layer.keys, layer.values) for layer in kept.cache.layers]
        held = [h for h in kept.held for _ in range(count)]
        mask = None
        if not kept.full:
            empty = torch.zeros(len(rows), 0, dtype=torch.long, device=self.device)
            mask = kept.mask(empty).repeat_interleave(count, 0)
        positions = (torch.arange(longest)[:, None, None] + torch.tensor(held)[:, None]).to(self.device)
        device = rows[0].device
        # A sequence's random numbers must not depend on how far others want to look: none without need.
        points = torch.tensor(
            [
                [row.uniform() if depth < length and not self.greedy else 0.0 for depth in range(longest)]
                for row, length in zip(rows, lengths, strict=True)
                for _ in range(count)
            ],
            dtype=torch.float64,
        ).T.to(device)
        tokens = torch.zeros(len(held), 0, dtype=torch.long, device=device)
        laws: list[Tensor] = []
        for depth in range(longest):
            if depth == 1 and count > 1:
                kept.cache.batch_repeat_interleave(count)
            if depth:
                if mask is not None:
                    mask = torch.cat([mask, mask.new_ones(len(held), 1)], 1)
                new = self._known(tokens[:, -1:].to(self.device))
                logits = self.forward(new, mask, positions[depth - 1], kept.cache, last=True)[:, -1]
            found, law = self._next(rows, logits.to(device), tokens, points[depth])
            tokens = torch.cat([tokens, found[:, None]], 1)
            if law is not None:
                laws.append(law)
        for layer, keys, values in before:
            layer.keys, layer.values = keys, values
        return tokens, laws

    def _next(
        self, rows: Sequence[Row], logits: Tensor, tokens: Tensor, points: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns a further token of each draft, ``(rows * K,)``, and the laws ``(rows * K, V)`` they were drawn from.

        Args:
            rows: Sequences.
            logits: ``(rows, V)`` at the first token, else ``(rows * K, V)``.
            tokens: Tokens drawn so far, ``(rows * K, depth)``.
            points: A random number for each draft.
        """
        count, first = self.options.num_drafts, tokens.shape[1] == 0
        owners = rows if first else [row for row in rows for _ in range(count)]
        scores = self.shaper(self._fit(logits), owners, lambda i: torch.cat([owners[i].ids, tokens[i]]))
        if self.greedy:
            best = scores.topk(count, -1).indices.flatten() if first else scores.argmax(-1)
            return best, None
        laws = as_probabilities(scores, self.options.temperature)
        if first:
            laws = laws.repeat_interleave(count, 0)
        elif count > 1:
            # Drafts of one beginning have one law, but rows of a batch may differ in the last bits: take the first's.
            paths = tokens.view(len(rows), count, -1)
            like = (paths[:, :, None] == paths[:, None]).all(-1).to(torch.uint8).argmax(-1)
            laws = laws[(like + count * torch.arange(len(rows), device=like.device)[:, None]).flatten()]
        return draw_rows(laws, points), laws

    def _known(self, ids: Tensor) -> Tensor:
        """Replaces tokens that only the target has; what is drafted after them may be poor."""
        return ids if self.table >= self.vocabulary else torch.where(ids < self.table, ids, 0)

    def _fit(self, logits: Tensor) -> Tensor:
        missing = self.vocabulary - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[..., : self.vocabulary]


class _LookupProposer:
    def __init__(self, options: PromptLookupDrafts) -> None:
        self.options = options
        self.calls = 0

    def propose(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[Draft]]:
        return [
            [Copied(tokens) for tokens in self._find(row.host[row.padding : row.length], length)] if length > 0 else []
            for row, length in zip(rows, lengths, strict=True)
        ]

    def _find(self, ids: Tensor, length: int) -> list[list[int]]:
        found: list[list[int]] = []
        for size in range(self.options.longest, self.options.shortest - 1, -1):
            if len(ids) <= size:
                continue
            # A match that something follows, so not the end itself.
            hits = (ids[:-1].unfold(0, size, 1) == ids[-size:]).all(1).nonzero().flatten()
            for at in reversed(hits.tolist()):
                tokens = ids[at + size : at + size + length].tolist()
                if not any(other[: len(tokens)] == tokens for other in found):
                    found.append(tokens)
                if len(found) == self.options.num_drafts:
                    return found
        return found


def early_exit(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Returns a model of the first layers of another, which shares its parameters and takes no memory.

    Args:
        model: A causal language model whose blocks stand in one ``ModuleList``.
        layers: Blocks to keep, at least 1 and fewer than there are.

    Raises:
        UserError: There are not so many, or they were not found.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not 1 <= layers < total:
        raise UserError(f"An early exit needs at least 1 and fewer than the model's {total} layers, not {layers}.")
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if not lists:
        raise UserError(f"The blocks of {type(model).__name__} were not found, so it cannot exit early.")
    path = lists[0].split(".")
    config = copy.deepcopy(model.config)
    short = config.get_text_config(decoder=True)
    if getattr(short, "layer_types", None) is not None:
        short.layer_types = short.layer_types[:layers]
    short.num_hidden_layers = layers
    top: Any = _shallow(model, config)
    part: Any = top
    for name in path[:-1]:
        child = _shallow(part._modules[name], short)
        part._modules[name] = child
        part = child
    part._modules[path[-1]] = nn.ModuleList(list(part._modules[path[-1]])[:layers])
    return top


def _shallow(module: Any, config: Any) -> Any:
    """A copy of a module whose children can be exchanged without changing the original's."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    # A wrapped forward (of a hook library) would still be bound to the original.
    twin.__dict__.pop("forward", None)
    if hasattr(module, "config"):
        twin.config = config
    return twin
