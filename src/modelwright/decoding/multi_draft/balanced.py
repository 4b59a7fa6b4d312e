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

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from modelwright.decoding.multi_draft.laws import ascending, prefix_values, scatter

#: Steps of false position at most; a dozen are usual.
_STEPS = 60
#: How far the two levels may be from the optimum before a single one is tried too.
_NEAR = 1e-4


class BalancedSelection:
    """Near-optimal selection among identical drafts: two levels, or one where that is better.

    Never below SpecTr's by more than 0.0001, the distance from the optimum at which one level is not tried.

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
        values = prefix_values([own] * num_drafts, target, torch.arange(len(own), device=q.device))
        self.cut = int(values.argmin()) + 1
        optimum = min(1.0, float(values[self.cut - 1]))
        best = -1.0
        if self.cut < len(own):
            below = float(own[: self.cut].sum())
            low = _level(own[: self.cut], target[: self.cut], 0.0, num_drafts)
            high = _level(own[self.cut :], target[self.cut :], below, num_drafts)
            take, law = torch.cat([low[0], high[0]]), torch.cat([low[1], high[1]])
            best = float(torch.minimum(law, target).sum())
        if best < optimum - _NEAR:
            one_take, one = _level(own, target, 0.0, num_drafts)
            if float(torch.minimum(one, target).sum()) > best:
                take, law, self.cut = one_take, one, 0
        self.law = scatter(law, tokens, q)
        self.take = scatter(take, tokens, q)
        upper = (torch.arange(len(own), device=q.device) >= self.cut).to(q.dtype)
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


def _level(p: Tensor, q: Tensor, below: float, count: int) -> tuple[Tensor, Tensor]:
    """Returns ``a`` and ``p_I`` of a level's tokens, which are in ascending order of q/p.

    Args:
        p: Draft law ``(n,)``.
        q: Target law.
        below: Draft mass of the level below.
        count: K.
    """
    mass = float(p.sum())
    ratio = q / p
    known = ratio.cpu().numpy()
    upto_p, upto_q = (np.concatenate([[0.0], t.cumsum(0).cpu().numpy()]) for t in (p, q))
    total = mass * _powers(below + mass, below, count)

    def missing(beta: float) -> float:
        """``sum p clip(q/p, r, g)`` above the total; falls with beta, from at least 0 at 0 to at most 0 at 1."""
        g, r = _slopes(mass, below, beta, count)
        at_r, at_g = known.searchsorted(r), known.searchsorted(g)
        return float(r * upto_p[at_r] + (upto_q[at_g] - upto_q[at_r]) + g * (upto_p[-1] - upto_p[at_g])) - total

    g, r = _slopes(mass, below, _root(missing), count)
    take = ((ratio - r) / (g - r)).clamp_(0, 1) if g > r else torch.ones_like(p)
    # The law of exactly this `take`, however near the solution is.
    g, r = _slopes(mass, below, float((p * take).sum()) / mass, count)
    return take, p * (take * g + (1 - take) * r)


def _root(falling: Callable[[float], float]) -> float:
    """Zero of a falling function on [0, 1], by false position with the Illinois rule."""
    low, high = 0.0, 1.0
    at_low, at_high = falling(low), falling(high)
    if at_low <= 0:
        return low
    for _ in range(_STEPS):
        if at_high >= 0 or high - low < 1e-15:
            return high
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        value = falling(middle)
        if abs(value) < 1e-15:
            return middle
        if value > 0:
            low, at_low, at_high = middle, value, at_high / 2
        else:
            high, at_high, at_low = middle, value, at_low / 2
    return (low + high) / 2


def _slopes(mass: float, below: float, beta: float, count: int) -> tuple[float, float]:
    rest = below + mass * (1 - beta)
    return _powers(below + mass, rest, count), _powers(rest, below, count)


def _powers(a: float, b: float, count: int) -> float:
    """``(a^K - b^K) / (a - b)``, as a sum, which loses no digits where a and b are near."""
    total, power = 1.0, b
    for _ in range(count - 1):
        total = total * a + power
        power *= b
    return total
