"""Which of the drafted tokens is selected, with what law, and how often it can be kept at best (arXiv 2410.18234).

``q`` is the target's law of the next token, ``p_1 … p_K`` are the laws that the K drafted tokens were drawn from,
independently, each ``(V,)``. A *selection* picks one drafted token Y, whose law ``p_I`` it knows exactly; ordinary
speculative sampling of Y against ``p_I`` then gives a token of law q, kept with probability ``sum_y min(q(y), p_I(y))``
(Theorem 1). Everything is float64: laws are compared, subtracted and inverted here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.errors import UserError, require

#: How far the sum of a law that a caller gives may be from 1.
SUM_TOLERANCE = 1e-3
#: Variables of a linear program beyond which it is refused: HiGHS needs minutes.
LARGEST_PROGRAM = 200_000
ORDERS = ("difference", "ratio")


def as_law(value: Any, name: str = "probabilities") -> Tensor:
    """Returns probabilities as a float64 tensor ``(V,)`` or ``(K, V)`` whose rows sum to 1.

    Args:
        value: Tensor, array or nested list.
        name: What it is called in messages.

    Raises:
        UserError: A value is negative or not a number, or a row's sum is further than 0.001 from 1.
    """
    # Straight to float64: Python's numbers would be rounded to float32 first.
    law = torch.as_tensor(value, dtype=torch.float64).detach()
    if law.ndim not in (1, 2) or law.shape[-1] == 0:
        raise UserError(f"{name} must have the shape (V,) or (K, V), not {tuple(law.shape)}.")
    low, sums = law.min().item(), law.sum(-1, keepdim=True)
    if not low >= 0:
        raise UserError(f"{name} must be numbers of at least 0, but one is {low}.")
    if not ((sums - 1).abs() <= SUM_TOLERANCE).all():
        raise UserError(f"{name} must sum to 1, but the sum is {sums.flatten()[(sums - 1).abs().argmax()].item():.6g}.")
    return law / sums


def draft_laws(p: Any, num_drafts: int | None, vocabulary: int) -> list[Tensor]:
    """Returns the law of each draft; those of identical drafts are the same object.

    Args:
        p: ``(V,)`` for identical drafts, or ``(K, V)``.
        num_drafts: K; None takes the rows of ``p``.
        vocabulary: V of the target.

    Raises:
        UserError: K is below 1 or not the number of rows, or the vocabularies differ; see also :func:`as_law`.
    """
    law = as_law(p, "draft probabilities")
    if law.shape[-1] != vocabulary:
        raise UserError(
            f"The draft's vocabulary has {law.shape[-1]} tokens and the target's {vocabulary}: they must be the same."
        )
    if num_drafts is not None and num_drafts < 1:
        raise UserError(f"There must be at least 1 draft, not {num_drafts}.")
    if law.ndim == 1:
        return [law] * (1 if num_drafts is None else num_drafts)
    if num_drafts not in (None, len(law)):
        raise UserError(f"There are {num_drafts} drafts, but laws of {len(law)}.")
    return list(law)


def identical(laws: Sequence[Tensor]) -> bool:
    """Whether all drafts have one law."""
    return all(law is laws[0] or torch.equal(law, laws[0]) for law in laws[1:])


def optimal_acceptance(p: Any, q: Any, num_drafts: int | None = None) -> float:
    """The largest probability with which any verifier of exact law can keep one of the drafted tokens.

    For identical drafts: ``min over sets S of q(S) + 1 - p(S)^K`` (for K = 2 the paper's Theorem 3; max-flow = min-cut
    for any K). The minimum is at a prefix of the tokens in ascending order of q/p, since the expression is concave in
    ``(p(S), q(S))``: O(V log V). Different drafts have no such order; there the linear program is solved, which is
    refused where it is large.

    Args:
        p: Draft law ``(V,)``, or ``(K, V)`` for different drafts.
        q: Target law ``(V,)``.
        num_drafts: K; may be left out for ``(K, V)``.

    Raises:
        UserError: The laws make no sense (see :func:`as_law`), or drafts differ over too many tokens.
    """
    target = as_law(q, "target probabilities")
    laws = draft_laws(p, num_drafts, target.shape[-1])
    return _optimum(laws, target)


def _optimum(laws: Sequence[Tensor], q: Tensor) -> float:
    if not identical(laws):
        return float(torch.minimum(SetSelection(laws, q).law, q).sum())
    # Tokens that are never drafted raise q(S) and leave p(S) alone: they are in no minimal set.
    drafted = (laws[0] > 0).nonzero().flatten()
    p, q = laws[0][drafted], q[drafted]
    return min(1.0, float(prefix_values([p] * len(laws), q, ascending(q / p)).min()))


def prefix_values(laws: Sequence[Tensor], q: Tensor, order: Tensor) -> Tensor:
    """``q(S) + 1 - prod_k p_k(S)`` for the first 1, 2 … tokens of an order; the empty set would give 1."""
    product = torch.ones_like(q)
    sums = laws[0][order].cumsum(0)
    for k, law in enumerate(laws):
        sums = sums if k == 0 or law is laws[0] else law[order].cumsum(0)
        product = product * (sums / sums[-1])
    return q[order].cumsum(0) + 1 - product


class PrioritySelection:
    """Of the drafted tokens, the first draft on the highest level: no linear program, any number of drafts.

    With levels from the order of q/p (those of different drafts: q over the mean of their laws),
    ``p_I(o_i) = prod_k P_k(o_i or later) - prod_k P_k(later than o_i)``. Where the draft is nearly the target that
    favours the likely tokens too much: so two coarser divisions are tried as well, one level for all (which is the
    first draft alone) and two levels, divided where the optimum has its minimal set; the best is taken. Which is best
    is seen from the laws alone, so the result stays exact. Not of the paper.

    Args:
        laws: K laws ``(V,)``, float64.
        q: Target law ``(V,)``, float64.
    """

    def __init__(self, laws: Sequence[Tensor], q: Tensor) -> None:
        same = identical(laws)
        mean = laws[0] if same else torch.stack(list(laws)).mean(0)
        drafted = (mean > 0).nonzero().flatten()
        own = [laws[0][drafted]] * len(laws) if same else [law[drafted] for law in laws]
        target, fine = q[drafted], q[drafted] / mean[drafted]
        order = ascending(fine)
        cut = int(prefix_values(own, target, order).argmin())
        divisions = [fine, (fine > fine[order[cut]]).to(q.dtype), torch.zeros_like(fine)]
        found = [_level_law(own, levels, order) for levels in divisions]
        best = max(range(3), key=lambda i: float(torch.minimum(target, found[i]).sum()))
        self.levels = scatter(divisions[best], drafted, q)
        self.law = scatter(found[best], drafted, q)

    def choose(self, tokens: Sequence[int]) -> dict[int, float]:
        """Returns the probability with which each drafted token is selected; those of 0 are left out."""
        return {tokens[int(self.levels[list(tokens)].argmax())]: 1.0}

    def law_at(self, token: int) -> float:
        """``p_I`` of one token."""
        return float(self.law[token])


def _level_law(laws: Sequence[Tensor], levels: Tensor, order: Tensor) -> Tensor:
    """Law of the first draft on the highest level: ``sum_k p_k prod_{j<k} P_j(below) prod_{j>k} P_j(not above)``.

    Args:
        laws: K laws ``(n,)``.
        levels: Level of each token, ``(n,)``.
        order: Sorts ``levels`` in ascending order.
    """
    _, block, sizes = levels[order].unique_consecutive(return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0) - 1
    below: list[Tensor] = []
    within: list[Tensor] = []
    for k, law in enumerate(laws):
        if k and law is laws[0]:
            below.append(below[0])
            within.append(within[0])
            continue
        sums = law[order].cumsum(0)[ends]
        below.append(torch.cat([sums.new_zeros(1), sums[:-1]])[block])
        within.append(sums[block])
    total = torch.zeros_like(laws[0])
    for k, law in enumerate(laws):
        term = law[order]
        for j in range(len(laws)):
            if j != k:
                term = term * (below[j] if j < k else within[j])
        total = total + term
    return torch.empty_like(total).index_copy_(0, order, total)


def ascending(values: Tensor) -> Tensor:
    """Indices that sort ``(n,)`` float64 values; equal ones stay in their order."""
    if values.device.type != "cpu":
        return torch.argsort(values, stable=True)
    # numpy's vectorised sort takes a fifth of torch's time, but is not stable.
    array = values.numpy()
    order = np.argsort(array)
    in_order = array[order]
    if (in_order[1:] == in_order[:-1]).any():
        order = np.argsort(array, kind="stable")
    return torch.from_numpy(order)


def _after(values: Tensor) -> Tensor:
    """Sums of what stands behind each element, from the end, so that small tails keep their digits."""
    sums = values.flip(0).cumsum(0).flip(0)
    return torch.cat([sums[1:], sums.new_zeros(1)])


def _won(own: Sequence[Any], later: Sequence[Any]) -> Any:
    """``prod(own + later) - prod(later)`` without the subtraction, which would lose a rare token's digits."""
    total: Any = 0.0
    for k, mass in enumerate(own):
        term = mass
        for j in range(len(own)):
            term = term * (later[j] if j < k else later[j] + own[j]) if j != k else term
        total = total + term
    return total


def scatter(values: Tensor, tokens: Tensor, like: Tensor) -> Tensor:
    """Returns ``(V,)``: the values at their tokens, 0 elsewhere."""
    return torch.zeros_like(like).index_copy_(0, tokens, values)


@dataclass(frozen=True)
class TwoDrafts:
    """Selection between two drafted tokens a ~ u and b ~ v: one wins over the other with a probability of the pair.

    Attributes:
        rank: Position of each token in the order of priority, ``(V,)``; of a pair that the program does not decide,
            the first in the order wins.
        weights: Probability that the token ranked i wins over the one ranked j, for the first ``s``, ``(s, s)``.
        law: ``p_I``, ``(V,)``.
        only: Where one draft alone does better than this order: which, 0 or 1.
    """

    rank: Tensor
    weights: np.ndarray
    law: Tensor
    only: int | None = None

    def wins(self, a: int, b: int) -> float:
        """Probability that ``a`` is selected of the two."""
        if a == b:
            return 1.0
        if self.only is not None:
            return 1.0 - self.only
        i, j = int(self.rank[a]), int(self.rank[b])
        if max(i, j) < len(self.weights):
            return float(self.weights[i, j])
        return 1.0 if i < j else 0.0


def two_drafts(
    u: Tensor, v: Tensor, q: Tensor, *, lp_size: int, alphabet_size: int | None = None, order: str = "difference"
) -> TwoDrafts:
    """The paper's truncated linear program for two drafts (section 4 and its appendix on truncation).

    Tokens are ordered by ``q - u v`` (for identical drafts the paper's ``q - p^2``) or by q over the mean of u and v
    (``order="ratio"``, not of the paper), those of the alphabet first. Pairs of the first ``lp_size`` tokens are
    variables; of every other pair the first in the order wins. The paper does not say how tokens outside the alphabet
    are treated; here they follow in the same order, which needs no rule of its own.

    An order favours likely tokens, too much so where the draft is nearly the target: for p = q it would keep less than
    a single draft does. So where one of the two drafts alone has the larger overlap with q, it is selected. (Ours.)

    Args:
        u: Law of the first draft, ``(V,)`` float64.
        v: Law of the second.
        q: Target law.
        lp_size: s, tokens whose pairs are variables; 0 or 1 for no program at all.
        alphabet_size: Tokens most probable under q that come before all others; None for all.
        order: One of :data:`ORDERS`.
    """
    drafted = ((u > 0) | (v > 0)).nonzero().flatten()
    a, b, target = u[drafted], v[drafted], q[drafted]
    key = target - a * b if order == "difference" else 2 * target / (a + b)
    by_key = ascending(-key)
    if alphabet_size is not None and alphabet_size < len(drafted):
        inside = torch.zeros(len(drafted), dtype=torch.bool, device=q.device)
        inside[torch.topk(target, alphabet_size).indices] = True
        by_key = by_key[torch.argsort((~inside[by_key]).to(torch.uint8), stable=True)]
    tokens = drafted[by_key]
    a, b, target = a[by_key], b[by_key], target[by_key]
    after_a, after_b = _after(a), _after(b)
    law = _won([a, b], [after_a, after_b])
    rank = torch.full_like(q, len(tokens), dtype=torch.long)
    rank[tokens] = torch.arange(len(tokens), device=q.device)
    head = min(lp_size, len(tokens))
    weights = np.triu(np.ones((head, head)), 1)
    if head > 1:
        first = [t[:head].cpu().numpy() for t in (a, b, target, law)]
        # What a token of the head has for sure: met by itself, or by one behind the head.
        base = (_won([a[:head], b[:head]], [after_a[head - 1], after_b[head - 1]])).cpu().numpy()
        solved = _pair_program(*first, base=base)
        if solved is not None:
            weights, head_law = solved
            law[:head] = torch.from_numpy(head_law).to(law.device)
    overlaps = [float(torch.minimum(alone, q).sum()) for alone in (u, v)]
    if max(overlaps) > float(torch.minimum(law, target).sum()):
        only = overlaps.index(max(overlaps))
        return TwoDrafts(rank, weights, (u, v)[only], only)
    return TwoDrafts(rank, weights, scatter(law, tokens, q))


def _pair_program(
    a: np.ndarray, b: np.ndarray, q: np.ndarray, law: np.ndarray, *, base: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Maximises ``sum_i min(q_i, p_I(i))`` over the pairs of a few tokens; None if the order cannot be improved on."""
    # Selection only moves mass within the head, so neither sum can be exceeded.
    if np.minimum(q, law).sum() >= min(q.sum(), law.sum()) - 1e-15:
        return None
    n = len(q)
    first, second = np.triu_indices(n, 1)
    mass = a[first] * b[second] + a[second] * b[first]
    pairs = len(mass)
    # Variables: the weight of each pair's first token, then t_i <= min(q_i, p_I(i)).
    rows = np.concatenate([first, second, np.arange(n)])
    columns = np.concatenate([np.arange(pairs), np.arange(pairs), pairs + np.arange(n)])
    matrix = _sparse(np.concatenate([-mass, mass, np.ones(n)]), rows, columns, (n, pairs + n))
    bound = base.copy()
    np.add.at(bound, second, mass)
    bounds = np.concatenate(
        [np.tile([0.0, 1.0], (pairs, 1)), np.stack([np.zeros(n), q], 1)],
    )
    cost = np.concatenate([np.zeros(pairs), -np.ones(n)])
    found = _solve(cost, matrix, bound, None, None, bounds)[:pairs].clip(0, 1)
    weights = np.zeros((n, n))
    weights[first, second], weights[second, first] = found, 1 - found
    better = base.copy()
    np.add.at(better, first, mass * found)
    np.add.at(better, second, mass * (1 - found))
    return weights, better


class FoldSelection:
    """Two-draft selection in stages: each further draft meets the one that was selected so far.

    The selected token so far is independent of the next draft, with a law that is known, so each stage is a two-draft
    problem of different laws. (The paper treats K > 2 by successive two-draft selection; that it is a fold rather
    than a tournament is our reading.)

    Args:
        laws: K laws ``(V,)``, float64.
        q: Target law ``(V,)``.
        lp_size: See :func:`two_drafts`.
        alphabet_size: See :func:`two_drafts`.
        order: See :func:`two_drafts`.
    """

    def __init__(
        self,
        laws: Sequence[Tensor],
        q: Tensor,
        *,
        lp_size: int = 5,
        alphabet_size: int | None = 40,
        order: str = "difference",
    ) -> None:
        self.law = laws[0]
        self.stages: list[TwoDrafts] = []
        for law in laws[1:]:
            stage = two_drafts(self.law, law, q, lp_size=lp_size, alphabet_size=alphabet_size, order=order)
            self.stages.append(stage)
            self.law = stage.law

    def choose(self, tokens: Sequence[int]) -> dict[int, float]:
        """Returns the probability with which each drafted token is selected; those of 0 are left out."""
        chances = {tokens[0]: 1.0}
        for stage, token in zip(self.stages, tokens[1:], strict=True):
            given: dict[int, float] = {}
            for held, chance in chances.items():
                keep = stage.wins(held, token)
                given[held] = given.get(held, 0.0) + chance * keep
                given[token] = given.get(token, 0.0) + chance * (1 - keep)
            chances = {t: c for t, c in given.items() if c > 0}
        return chances

    def law_at(self, token: int) -> float:
        """``p_I`` of one token."""
        return float(self.law[token])


class SetSelection:
    """The optimal selection for any K, by a linear program over the sets of distinct drafted tokens.

    A rule may as well depend on the set only, since nothing else enters ``p_I``. Its size grows as V^K.

    Args:
        laws: K laws ``(V,)``, float64.
        q: Target law ``(V,)``.

    Raises:
        UserError: The program would have more than :data:`LARGEST_PROGRAM` variables.
    """

    def __init__(self, laws: Sequence[Tensor], q: Tensor) -> None:
        drafted = torch.stack(list(laws)).amax(0).nonzero().flatten()
        p = torch.stack([law[drafted] for law in laws]).cpu().numpy()
        n, count = p.shape[1], len(laws)
        size = n + sum(d * math.comb(n, d) for d in range(1, min(n, count) + 1))
        if size > LARGEST_PROGRAM:
            raise UserError(
                f"The optimal selection of {count} drafts over {n} tokens needs a linear program of {size:,} "
                f"variables, more than {LARGEST_PROGRAM:,}: use the verifier 'is' or 'priority', or a smaller top_k."
            )
        sets: list[np.ndarray] = []
        masses: list[np.ndarray] = []
        for d in range(1, min(n, count) + 1):
            members = np.array(list(itertools.combinations(range(n), d)))
            mass = np.zeros(len(members))
            for pattern in itertools.product(range(d), repeat=count):
                if len(set(pattern)) == d:
                    mass += np.prod([p[k, members[:, place]] for k, place in enumerate(pattern)], axis=0)
            sets.append(members[mass > 0])
            masses.append(mass[mass > 0])
        self.token = drafted.cpu().numpy()
        self.flow = self._optimal(sets, masses, q[drafted].cpu().numpy())
        total = np.zeros(n)
        self.shares: dict[frozenset[int], dict[int, float]] = {}
        for members, mass, flow in zip(sets, masses, self.flow, strict=True):
            np.add.at(total, members, flow * mass[:, None])
            for row, share in zip(members, flow, strict=True):
                self.shares[frozenset(self.token[row].tolist())] = dict(
                    zip(self.token[row].tolist(), share.tolist(), strict=True)
                )
        self.law = scatter(torch.from_numpy(total).to(q.device), drafted, q)

    @staticmethod
    def _optimal(sets: list[np.ndarray], masses: list[np.ndarray], q: np.ndarray) -> list[np.ndarray]:
        """Returns each set's shares of its tokens, ``(sets, d)``; rows sum to 1."""
        n = len(q)
        token = np.concatenate([members.ravel() for members in sets])
        size = [members.size for members in sets]
        flows = len(token)
        owner = np.concatenate([np.repeat(np.arange(len(m)), m.shape[1]) for m in sets])
        owner += np.repeat(np.cumsum([0, *[len(m) for m in sets[:-1]]]), size)
        mass = np.concatenate(masses)
        # Variables: flow from a set to each of its tokens, then t_i <= min(q_i, what flows to i).
        rows = np.concatenate([token, np.arange(n)])
        columns = np.arange(flows + n)
        upper = _sparse(np.concatenate([-np.ones(flows), np.ones(n)]), rows, columns, (n, flows + n))
        equal = _sparse(np.ones(flows), owner, np.arange(flows), (len(mass), flows + n))
        bounds = np.concatenate([np.tile([0.0, np.inf], (flows, 1)), np.stack([np.zeros(n), q], 1)])
        cost = np.concatenate([np.zeros(flows), -np.ones(n)])
        found = _solve(cost, upper, np.zeros(n), equal, mass, bounds)[:flows].clip(0)
        shares: list[np.ndarray] = []
        for members, part in zip(sets, np.split(found, np.cumsum(size)[:-1]), strict=True):
            part = part.reshape(members.shape)
            whole = part.sum(1, keepdims=True)
            # A set too rare for the solver's tolerance: any rule will do, since p_I is computed from it.
            shares.append(np.where(whole > 0, part / np.where(whole > 0, whole, 1), 1 / members.shape[1]))
        return shares

    def choose(self, tokens: Sequence[int]) -> dict[int, float]:
        """Returns the probability with which each drafted token is selected; those of 0 are left out."""
        return {t: share for t, share in self.shares[frozenset(tokens)].items() if share > 0}

    def law_at(self, token: int) -> float:
        """``p_I`` of one token."""
        return float(self.law[token])


class FirstSelection:
    """The first draft alone: single-draft speculative sampling.

    Args:
        laws: Laws, of which the first counts.
        q: Target law.
    """

    def __init__(self, laws: Sequence[Tensor], q: Tensor) -> None:
        self.law = laws[0]

    def choose(self, tokens: Sequence[int]) -> dict[int, float]:
        """Returns the first drafted token, with probability 1."""
        return {tokens[0]: 1.0}

    def law_at(self, token: int) -> float:
        """``p_I`` of one token."""
        return float(self.law[token])


def _sparse(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Any:
    sparse: Any = require("scipy.sparse", "decoding", "the linear programs of multi-draft verification")
    return sparse.csr_array((values, (rows, columns)), shape=shape)


def _solve(cost: Any, upper: Any, bound: Any, equal: Any, value: Any, bounds: Any) -> np.ndarray:
    optimize: Any = require("scipy.optimize", "decoding", "the linear programs of multi-draft verification")
    found = optimize.linprog(
        cost, A_ub=upper, b_ub=bound, A_eq=equal, b_eq=value, bounds=bounds, method="highs", options=_TOLERANCES
    )
    if found.x is None:
        raise RuntimeError(f"the linear program of multi-draft verification was not solved: {found.message}")
    return np.asarray(found.x)


_TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
