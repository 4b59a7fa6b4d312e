"""Scoring all drafts of a step in one call of the target: as a tree in one sequence, or as rows of a batch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from modelwright.decoding.multi_draft.cache import Forward, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Literal["auto", "tree", "rows"]


class Draft(Protocol):
    """Some tokens that may come next."""

    @property
    def tokens(self) -> list[int]:
        """The tokens, first to last."""

    def law(self, depth: int, like: Tensor) -> Tensor:
        """The law that the token at ``depth`` was drawn from, given those before: ``(V,)`` float64 on like's device."""


@dataclass
class Tree:
    """Drafts with their common beginnings joined. Node 0 is the last token that is certain.

    Attributes:
        tokens: Token of each node; parents come before children.
        parents: Parent of each node; -1 for the root.
        depths: Depth of each node.
        nodes: Node of each draft at each depth: ``nodes[k][0]`` is the root.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    nodes: list[list[int]] = field(default_factory=list)


def join(root: int, drafts: Sequence[Draft]) -> Tree:
    """Returns the tree of drafts behind a token."""
    tree = Tree([root])
    children: dict[tuple[int, int], int] = {}
    for draft in drafts:
        node, path = 0, [0]
        for token in draft.tokens:
            if (node, token) not in children:
                children[node, token] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.depths.append(tree.depths[node] + 1)
            node = children[node, token]
            path.append(node)
        tree.nodes.append(path)
    return tree


def ancestors(parents: Sequence[int], size: int) -> Tensor:
    """Returns ``(size, size)`` bool: whether a node is seen by another, by itself or by its descendants.

    Rows beyond the tree see only themselves, so that no softmax is over nothing.
    """
    seen = np.eye(size, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return torch.from_numpy(seen)


class Scored(Protocol):
    """The target's logits on a step's drafts.

    Attributes:
        scores: Logits ``(rows, n, V)``.
    """

    scores: Tensor

    def place(self, sequence: int, draft: int, depth: int) -> tuple[int, int]:
        """Where the logits are of what follows the first ``depth`` tokens of a draft (0: of what follows the root)."""

    def commit(self, paths: Sequence[tuple[int, int]]) -> None:
        """Keeps, for each sequence, the root and ``(draft, depth)``: so many tokens of that draft; drops the rest."""


class TreeScores:
    """One sequence per prompt; siblings do not see each other.

    Args:
        forward: The target.
        kept: Its cache.
        roots: Last token of each sequence, which is not in the cache.
        drafts: Drafts of each sequence.
    """

    def __init__(
        self,
        forward: Forward,
        kept: Kept,
        roots: Sequence[int],
        drafts: Sequence[Sequence[Draft]],
        device: torch.device,
    ) -> None:
        self.kept = kept
        self.trees = [join(root, some) for root, some in zip(roots, drafts, strict=True)]
        self.size = size = max(len(tree.tokens) for tree in self.trees)
        ids = [tree.tokens + [tree.tokens[0]] * (size - len(tree.tokens)) for tree in self.trees]
        positions = [
            [held + depth for depth in tree.depths] + [held] * (size - len(tree.depths))
            for tree, held in zip(self.trees, kept.held, strict=True)
        ]
        ids_there, positions_there = torch.tensor([ids, positions]).to(device)
        within = torch.stack([ancestors(tree.parents, size) for tree in self.trees]).to(device)
        held = kept.mask(torch.zeros(len(ids), 0, dtype=torch.bool, device=device))
        seen = torch.cat([held[:, None, :].expand(-1, size, -1), within], 2)[:, None]
        self.scores = forward(ids_there, as_mask(seen, forward.model), positions_there, kept.cache)

    def place(self, sequence: int, draft: int, depth: int) -> tuple[int, int]:
        """See :class:`Scored`."""
        return sequence, self.trees[sequence].nodes[draft][depth] if depth else 0

    def commit(self, paths: Sequence[tuple[int, int]]) -> None:
        """See :class:`Scored`."""
        new = [tree.nodes[draft][: depth + 1] if depth else [0] for tree, (draft, depth) in zip(self.trees, paths)]
        self.kept.commit(range(len(new)), new, self.size)


class RowScores:
    """A row of a batch for each draft, behind copies of the cache: for any attention function.

    Args:
        forward: The target.
        kept: Its cache.
        roots: Last token of each sequence, which is not in the cache.
        drafts: Drafts of each sequence.
    """

    def __init__(
        self,
        forward: Forward,
        kept: Kept,
        roots: Sequence[int],
        drafts: Sequence[Sequence[Draft]],
        device: torch.device,
    ) -> None:
        self.kept = kept
        self.count = count = max(1, *(len(some) for some in drafts))
        self.size = size = 1 + max((len(draft.tokens) for some in drafts for draft in some), default=0)
        rows = []
        for root, some in zip(roots, drafts, strict=True):
            tokens = [[root, *draft.tokens] for draft in some] or [[root]]
            tokens += [tokens[0]] * (count - len(tokens))
            rows += [row + [root] * (size - len(row)) for row in tokens]
        if count > 1:
            kept.cache.batch_repeat_interleave(count)
        copies = Kept(kept.cache, [held for held in kept.held for _ in range(count)])
        mask = None if kept.full else copies.mask(torch.ones(len(rows), size, dtype=torch.long, device=device))
        positions = [[held + depth for depth in range(size)] for held in copies.held]
        ids_there, positions_there = torch.tensor([rows, positions]).to(device)
        self.scores = forward(ids_there, mask, positions_there, kept.cache)

    def place(self, sequence: int, draft: int, depth: int) -> tuple[int, int]:
        """See :class:`Scored`."""
        return sequence * self.count + (draft if depth else 0), depth

    def commit(self, paths: Sequence[tuple[int, int]]) -> None:
        """See :class:`Scored`."""
        rows = [b * self.count + (draft if depth else 0) for b, (draft, depth) in enumerate(paths)]
        self.kept.commit(rows, [range(depth + 1) for _, depth in paths], self.size)


def as_mask(seen: Tensor, model: PreTrainedModel) -> Tensor:
    """Returns what the model's attention function takes: bool for sdpa; for eager what is added to the scores."""
    if model.config._attn_implementation != "eager":
        return seen
    dtype = model.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


#: Whether trees work, by model and attention function: found once.
_trees: weakref.WeakKeyDictionary[Any, dict[str, bool]] = weakref.WeakKeyDictionary()


def takes_trees(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether a model computes the same for drafts in one tree as for each by itself.

    Attention functions other than eager and sdpa may not read a four-dimensional mask, or may take the place in the
    cache for the position; for those two the model is asked, on a few tokens.

    Args:
        model: A causal language model.
        ids: Some of its tokens, ``(n,)``.
    """
    # Of every part, since some parts may have been given another attention than the whole.
    names = {
        str(getattr(part.config, "_attn_implementation", None)) for part in model.modules() if hasattr(part, "config")
    }
    if len(names) != 1 or not names <= {"eager", "sdpa"}:
        return False
    attention = names.pop()
    known = _trees.setdefault(model, {})
    if attention not in known:
        known[attention] = _probe(model, ids)
    return known[attention]


@dataclass
class _Fixed:
    tokens: list[int]

    def law(self, depth: int, like: Tensor) -> Tensor:
        raise NotImplementedError


def _probe(model: PreTrainedModel, ids: Tensor) -> bool:
    forward = Forward(model)
    if "position_ids" not in forward.names:
        return False
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Neighbours of real tokens: siblings that differ, so that one that sees the other gives itself away.
    a, b, c, d, e = ((int(ids[-1]) + step) % vocabulary for step in range(5))
    prompt = torch.tensor([[d, c, b]], device=ids.device)
    drafts: list[Draft] = [_Fixed([b, c]), _Fixed([c, d]), _Fixed([c, e])]

    def scored(layout: Any) -> list[Tensor]:
        kept = Kept(DynamicCache(), [0])
        ones = torch.ones_like(prompt)
        forward(prompt, ones, torch.arange(3, device=ids.device)[None], kept.cache, last=True)
        kept.held = [3]
        found = layout(forward, kept, [a], [drafts], ids.device)
        return [found.scores[found.place(0, k, depth)].float() for k in range(3) for depth in range(3)]

    try:
        pairs = list(zip(scored(TreeScores), scored(RowScores), strict=True))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    return all((x - y).abs().max() <= tolerance * (1 + y.abs().max()) for x, y in pairs)
