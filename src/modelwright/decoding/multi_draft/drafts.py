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
from transformers import DynamicCache

from modelwright.decoding.multi_draft.cache import Forward, Kept, check_cache
from modelwright.decoding.multi_draft.sampling import Row, Shaper, as_probabilities
from modelwright.decoding.multi_draft.tree import Draft
from modelwright.decoding.multi_draft.verifiers import draw
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
        logits = self._catch_up(rows)
        tokens, laws = self._sample(rows, logits, lengths)
        count = self.options.num_drafts
        return [
            [
                Sampled(tokens[b * count + k][: lengths[b]], laws[b * count + k][: lengths[b]])
                for k in range(count)
                if lengths[b] > 0
            ]
            for b in range(len(rows))
        ]

    def _catch_up(self, rows: Sequence[Row]) -> Tensor:
        """Feeds what was generated since the last step; returns the logits of what comes next, ``(rows, V)``."""
        if self.kept is None:
            self.kept = Kept(
                DynamicCache(config=self.forward.model.config.get_text_config(decoder=True)), [0] * len(rows)
            )
            if any(self.kept.cache.is_sliding):
                # Windows would have to be rolled back; with every key kept, the model's own mask still applies them.
                self.kept.cache = DynamicCache()
            check_cache(self.kept.cache, self.forward.model)
        else:
            at = {id(row): i for i, row in enumerate(self.rows)}
            self.kept.select([at[id(row)] for row in rows])
        self.rows = list(rows)
        kept = self.kept
        pending = [row.buffer[row.padding + held : row.length] for row, held in zip(rows, kept.held, strict=True)]
        count = max(len(p) for p in pending)
        ids = torch.zeros(len(rows), count, dtype=torch.long, device=self.device)
        there = torch.zeros_like(ids)
        positions = torch.zeros_like(ids)
        for b, part in enumerate(pending):
            ids[b, count - len(part) :] = part.to(self.device)
            there[b, count - len(part) :] = 1
            positions[b, count - len(part) :] = torch.arange(kept.held[b], kept.held[b] + len(part))
        logits = self.forward(self._known(ids), kept.mask(there), positions, kept.cache, last=True)[:, -1]
        kept.commit(range(len(rows)), [range(count - len(p), count) for p in pending], count)
        return logits

    def _sample(
        self, rows: Sequence[Row], logits: Tensor, lengths: Sequence[int]
    ) -> tuple[list[list[int]], list[list[Tensor]]]:
        """Returns tokens and laws of all drafts, sequence by sequence; the cache is as before afterwards."""
        kept, count = self.kept, self.options.num_drafts
        assert kept is not None
        tokens: list[list[int]] = [[] for _ in range(len(rows) * count)]
        laws: list[list[Tensor]] = [[] for _ in tokens]
        # Appending makes new tensors, so the old ones are the cache to come back to.
        before = [(layer, layer.keys, layer.values) for layer in kept.cache.layers]
        held = torch.tensor(kept.held, device=self.device).repeat_interleave(count)
        mask = kept.mask(torch.zeros(len(rows), 0, dtype=torch.long, device=self.device)).repeat_interleave(count, 0)
        self._extend(rows, tokens, laws, logits, [b for b in range(len(rows)) for _ in range(count)], lengths)
        for depth in range(1, max(lengths)):
            if depth == 1 and count > 1:
                kept.cache.batch_repeat_interleave(count)
            mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], 1)
            new = self._known(torch.tensor([[draft[-1]] for draft in tokens], device=self.device))
            logits = self.forward(new, mask, (held + depth - 1)[:, None], kept.cache, last=True)[:, -1]
            self._extend(rows, tokens, laws, logits, list(range(len(tokens))), lengths)
        for layer, keys, values in before:
            layer.keys, layer.values = keys, values
        return tokens, laws

    def _extend(
        self,
        rows: Sequence[Row],
        tokens: list[list[int]],
        laws: list[list[Tensor]],
        logits: Tensor,
        source: list[int],
        lengths: Sequence[int],
    ) -> None:
        """Adds a token to each draft; ``source`` is its row of the logits."""
        count = self.options.num_drafts
        first = len(logits) == len(rows) and not tokens[0]
        paths = [[] for _ in rows] if first else tokens
        owners = [rows[i if first else i // count] for i in range(len(logits))]
        prefixes = [
            torch.cat([row.ids, torch.tensor(path, dtype=torch.long, device=row.buffer.device)])
            for row, path in zip(owners, paths, strict=True)
        ]
        scores = self.shaper(owners, prefixes, self._fit(logits.to(rows[0].buffer.device)))
        if self.greedy:
            best = scores.topk(count if first else 1, -1).indices.tolist()
            for draft, row in enumerate(source):
                tokens[draft].append(best[row][draft % count if first else 0])
            return
        table = list(as_probabilities(scores, self.options.temperature).unbind(0))
        # Drafts of one beginning have one law, and are drawn from the same numbers: rows of a batch may differ in the
        # last bits.
        same: dict[tuple[int, ...], Tensor] = {}
        for draft, row in enumerate(source):
            law = same.setdefault((draft // count, *tokens[draft]), table[row])
            laws[draft].append(law)
        for draft in range(len(tokens)):
            # A sequence's random numbers must not depend on how far others want to look: no draw without need.
            needed = len(tokens[draft]) < lengths[draft // count]
            tokens[draft].append(draw(laws[draft][-1], rows[draft // count].generator) if needed else 0)

    def _known(self, ids: Tensor) -> Tensor:
        """Replaces tokens that only the target has; what is drafted after them may be poor."""
        return torch.where(ids < self.table, ids, 0)

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
            [Copied(tokens) for tokens in self._find(row.ids[row.padding :], length)] if length > 0 else []
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
