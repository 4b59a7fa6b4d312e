"""A selection that comes near the optimum for any number of identical drafts in O(V log V), without a linear program.

Not of the paper. The optimum itself says what to aim at. Let S be its minimal set, a prefix of the tokens in ascending
order of q/p. A selection is optimal if and only if a token outside S is selected whenever one is drafted, such tokens
get at most their q, and tokens of S at least theirs. So: two levels, and within each a ``p_I`` as near q as can be.

Within a level its drafts are looked at one after the other; token x is taken with probability ``a(x)``, and the last
one in any case. Let ``A`` be the mass of the level and what is below, ``L`` that below alone, and ``B = A - sum p a``
over the level's tokens. Over all numbers of drafts, of K, that may be on the level,

    p_I(x) = p(x) (a(x) g + (1 - a(x)) r),  g = (A^K - B^K) / (A - B),  r = (B^K - L^K) / (B - L).

So every ``p_I = p clip(q/p, r, g)`` can be had that has the level's right sum, which is so for one ``sum p a``.

With a single level the result is at least SpecTr's. K-SEQ keeps ``sum min(q, gamma p)`` with ``gamma = g`` at its own
``beta = sum p a``. There ``sum p clip(q/p, r, g) <= 1``, since ``sum (r p - q)+ <= r sum (p - q/gamma)+``, and that is
``(1 - beta)^K``, what K-SEQ misses. As r and g fall with beta, the solution has a smaller beta and a larger g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelwright.decoding.multi_draft.laws import ascending, prefix_values, scatter

#: Values of beta (the share of the level's mass that is taken at sight) tried at once, and rounds of refinement.
_GRID, _ROUNDS = 1025, 4


class BalancedSelection:
    """Near-optimal selection among identical drafts: two levels, or one where that is better.

    Args:
        p: Law of every draft, ``(V,)`` float64.
        q: Target law ``(V,)``.
        num_drafts: K.
    """

    def __init__(self, p: Tensor, q: Tensor, num_drafts: int) -> None:
        drafted = (p > 0).nonzero().flatten()
        own, target = p[drafted], q[drafted]
        order = ascending(target / own)
        tokens, own, target = drafted[order], own[order], target[order]
        cut = int(prefix_values([own] * num_drafts, target, torch.arange(len(own), device=q.device)).argmin()) + 1
        below = own[:cut].sum()
        take, law = _level(own, target, torch.zeros_like(below), num_drafts)
        self.cut_rank = 0
        if cut < len(own):
            parts = [
                _level(own[:cut], target[:cut], torch.zeros_like(below), num_drafts),
                _level(own[cut:], target[cut:], below, num_drafts),
            ]
            two = torch.cat([part[1] for part in parts])
            if torch.minimum(two, target).sum() > torch.minimum(law, target).sum():
                take, law, self.cut_rank = torch.cat([part[0] for part in parts]), two, cut
        self.law = scatter(law, tokens, q)
        self.take = scatter(take, tokens, q)
        upper = (torch.arange(len(own), device=q.device) >= self.cut_rank).to(q.dtype)
        self.upper = scatter(upper, tokens, q)

    def choose(self, tokens: Sequence[int]) -> dict[int, float]:
        """Returns the probability with which each drafted token is selected; those of 0 are left out."""
        places = list(tokens)
        upper, take = self.upper[places].tolist(), self.take[places].tolist()
        level = [i for i, high in enumerate(upper) if high] or list(range(len(places)))
        chances: dict[int, float] = {}
        left = 1.0
        for i in level:
            chance = left if i == level[-1] else left * take[i]
            if chance > 0:
                chances[places[i]] = chances.get(places[i], 0.0) + chance
            left -= chance
        return chances

    def law_at(self, token: int) -> float:
        """``p_I`` of one token."""
        return float(self.law[token])


def _level(p: Tensor, q: Tensor, below: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns ``a`` and ``p_I`` of a level's tokens, which are in ascending order of q/p.

    Args:
        p: Draft law ``(n,)``.
        q: Target law.
        below: Draft mass of the level below.
        count: K.
    """
    mass = p.sum()
    ratio = q / p
    upto_p = torch.cat([p.new_zeros(1), p.cumsum(0)])
    upto_q = torch.cat([q.new_zeros(1), q.cumsum(0)])
    total = mass * _powers(below + mass, below, count)
    low, high = torch.zeros_like(mass), torch.ones_like(mass)
    for _ in range(_ROUNDS):
        beta = low + (high - low) * torch.linspace(0, 1, _GRID, dtype=p.dtype, device=p.device)
        g, r = _slopes(mass, below, beta, count)
        at_r, at_g = torch.searchsorted(ratio, r), torch.searchsorted(ratio, g)
        # sum p clip(q/p, r, g) falls with beta; wanted is the last value that has not fallen below the total.
        sums = r * upto_p[at_r] + (upto_q[at_g] - upto_q[at_r]) + g * (upto_p[-1] - upto_p[at_g])
        last = (sums >= total).nonzero().flatten()
        first = last[-1] if len(last) else torch.zeros((), dtype=torch.long, device=p.device)
        low, high = beta[first], beta[(first + 1).clamp(max=_GRID - 1)]
    g, r = _slopes(mass, below, low, count)
    spread = g - r
    take = ((ratio - r) / spread).clamp(0, 1) if spread > 0 else torch.ones_like(p)
    # The law of exactly this `take`, however near beta came to the solution.
    g, r = _slopes(mass, below, (p * take).sum() / mass, count)
    return take, p * (take * g + (1 - take) * r)


def _slopes(mass: Tensor, below: Tensor, beta: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rest = below + mass * (1 - beta)
    return _powers(below + mass, rest, count), _powers(rest, below, count)


def _powers(a: Tensor, b: Tensor, count: int) -> Tensor:
    """``(a^K - b^K) / (a - b)``, as a sum, which loses no digits where a and b are near."""
    total = torch.ones_like(a + b)
    power = b
    for _ in range(count - 1):
        total = total * a + power
        power = power * b
    return total
