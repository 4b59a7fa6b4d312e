"""Verifiers: from drafted tokens to one token whose law is the target's, exactly, and which is drafted if possible.

Each is split in two. ``prepare(laws, q)`` does what does not depend on the drafted tokens; ``rule.given(tokens)`` is
the law of the outcome given them, as probabilities of keeping drafted tokens and, with what is left, a residual law.
The outcome is drawn from that; tests enumerate it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from modelwright.decoding.multi_draft.balanced import BalancedSelection
from modelwright.decoding.multi_draft.draws import Uniform, Uniforms, draw
from modelwright.decoding.multi_draft.laws import (
    ORDERS,
    FirstSelection,
    FoldSelection,
    PrioritySelection,
    SetSelection,
    as_law,
    ascending,
    draft_laws,
    identical,
)
from modelwright.errors import UserError, did_you_mean

#: A residual of less mass is the trace of rounding, and stands for "accept".
NOTHING = 1e-12

#: Name to what it is.
VERIFIERS: dict[str, str] = {
    "balanced": "selection on two levels near the optimum, then speculative sampling: no linear program, any K",
    "is": "importance-weighted selection by truncated linear programs, then speculative sampling (the paper's)",
    "optimal": "the same with the whole linear program; for small vocabularies or top-k",
    "priority": "the drafted token of the largest q/p, then speculative sampling: no linear program, any K",
    "spectr": "SpecTr's K-SEQ",
    "specinfer": "SpecInfer's recursive rejection",
    "single": "ordinary speculative sampling with the first draft only",
}


class VerifyResult(NamedTuple):
    """A verified token.

    Attributes:
        token: A token of the target's law.
        accepted: Whether it is one of the drafted tokens.
        draft_index: The first draft that proposed it, or None.
    """

    token: int
    accepted: bool
    draft_index: int | None


@dataclass(frozen=True)
class Outcome:
    """The law of the verified token given the drafted ones.

    Attributes:
        kept: Probability of keeping each drafted token.
        residual: Returns the law, up to a factor, of what comes instead, ``(V,)``.
    """

    kept: Mapping[int, float]
    residual: Callable[[], Tensor]

    def draw(self, uniform: Uniform) -> int:
        """Draws the verified token, with one number or two."""
        left = uniform()
        for token, chance in self.kept.items():
            left -= chance
            if left < 0:
                return token
        residual = self.residual()
        if float(residual.sum()) <= NOTHING:
            return max(self.kept, key=lambda token: self.kept[token])
        return draw(residual, uniform)

    def law(self, vocabulary: int) -> Tensor:
        """The law as a vector ``(V,)``, float64, on the CPU."""
        law = torch.zeros(vocabulary, dtype=torch.float64)
        for token, chance in self.kept.items():
            law[token] += chance
        residual = self.residual().cpu()
        if float(residual.sum()) <= NOTHING:
            return law / law.sum()
        return law + (1 - law.sum()) * residual / residual.sum()


class Rule(Protocol):
    """What a verifier made of a target law and draft laws."""

    def given(self, tokens: Sequence[int]) -> Outcome:
        """Returns the law of the outcome, given a token of each draft, in the drafts' order."""

    def acceptance(self) -> float:
        """The probability that a drafted token is kept, over drafts and draws.

        A residual draw that happens to be another drafted token is not counted; a decoding loop still profits from it.
        """


class Canonical:
    """Selection, then speculative sampling of the selected token (Theorem 1).

    Args:
        selection: Knows which drafted token is selected and the law of that.
        q: Target law ``(V,)``, float64.
    """

    def __init__(self, selection: Any, q: Tensor) -> None:
        self.selection, self.q = selection, q

    def given(self, tokens: Sequence[int]) -> Outcome:
        """See :class:`Rule`."""
        kept = {}
        for token, chance in self.selection.choose(tokens).items():
            law = self.selection.law_at(token)
            kept[token] = chance * min(1.0, float(self.q[token]) / law) if law > 0 else chance
        return Outcome(kept, lambda: (self.q - self.selection.law).clamp_(min=0))

    def acceptance(self) -> float:
        """See :class:`Rule`."""
        return float(torch.minimum(self.q, self.selection.law).sum())


class RecursiveRejection:
    """SpecInfer: each draft in turn against what the earlier ones left of the target.

    Args:
        laws: K laws ``(V,)``, float64.
        q: Target law.
    """

    def __init__(self, laws: Sequence[Tensor], q: Tensor) -> None:
        self.laws = laws
        self.targets = [q]
        for law in laws:
            rest = (self.targets[-1] - law).clamp_(min=0)
            mass = float(rest.sum())
            # Nothing left: this draft is accepted with certainty, and what would follow does not matter.
            self.targets.append(rest / mass if mass > NOTHING else self.targets[-1])

    def given(self, tokens: Sequence[int]) -> Outcome:
        """See :class:`Rule`."""
        kept: dict[int, float] = {}
        reached = 1.0
        for token, law, target in zip(tokens, self.laws, self.targets, strict=False):
            accept = min(1.0, float(target[token]) / float(law[token]))
            kept[token] = kept.get(token, 0.0) + reached * accept
            reached *= 1 - accept
        return Outcome(kept, lambda: self.targets[-1])

    def acceptance(self) -> float:
        """See :class:`Rule`."""
        missed = 1.0
        for law, target in zip(self.laws, self.targets, strict=False):
            missed *= max(0.0, 1 - float(torch.minimum(law, target).sum()))
        return 1 - missed


class _Overlap:
    """``sum min(p, q / gamma)`` for any gamma, by running sums in the order of q/p, which are kept on the CPU."""

    def __init__(self, p: Tensor, q: Tensor) -> None:
        both = ((p > 0) & (q > 0)).nonzero().flatten()
        own, target = p[both], q[both]
        ratio = target / own
        order = ascending(ratio)
        self.ratio = ratio[order].cpu().numpy()
        sums = torch.stack([own[order], target[order]]).cumsum(1).cpu().numpy()
        self.p, self.q = np.pad(sums, ((0, 0), (1, 0)))

    def __call__(self, gamma: float) -> float:
        """The overlap."""
        at = int(self.ratio.searchsorted(gamma))
        return float(self.q[at] / gamma + self.p[-1] - self.p[at])


class SequentialSelection:
    """SpecTr's K-SEQ: each draft in turn is kept with probability ``min(1, q / (gamma p))``.

    The smallest valid gamma is used: the root of ``sum_k prod_{j<k} (1 - beta_j) = gamma`` with
    ``beta_k = sum min(p_k, q / gamma)``, by bisection, from above since below it the residual would be negative. For
    identical drafts this is the paper's ``1 - (1 - beta)^K = gamma beta``; for different ones it is our extension.

    Args:
        laws: K laws ``(V,)``, float64.
        q: Target law.
    """

    def __init__(self, laws: Sequence[Tensor], q: Tensor) -> None:
        self.laws, self.q = laws, q
        overlaps = [_Overlap(law, q) for law in (laws[:1] if identical(laws) else laws)]
        overlaps *= len(laws) // len(overlaps)

        def reach(gamma: float) -> tuple[list[float], list[float]]:
            """Probabilities of keeping each draft when it is its turn, and of its turn coming."""
            keep = [overlap(gamma) for overlap in overlaps]
            turn = [1.0]
            for chance in keep[:-1]:
                turn.append(turn[-1] * (1 - chance))
            return keep, turn

        low, high = 1.0, float(len(laws))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(reach(middle)[1]) <= middle else (middle, high)
        self.gamma = high
        self.keep, self.turn = reach(high)

    def given(self, tokens: Sequence[int]) -> Outcome:
        """See :class:`Rule`."""
        kept: dict[int, float] = {}
        reached = 1.0
        for token, law in zip(tokens, self.laws, strict=True):
            accept = min(1.0, float(self.q[token]) / (self.gamma * float(law[token])))
            kept[token] = kept.get(token, 0.0) + reached * accept
            reached *= 1 - accept
        return Outcome(kept, self._residual)

    def _residual(self) -> Tensor:
        rest = self.q.clone()
        for law, turn in zip(self.laws, self.turn, strict=True):
            rest -= turn * torch.minimum(law, self.q / self.gamma)
        return rest.clamp_(min=0)

    def acceptance(self) -> float:
        """See :class:`Rule`."""
        missed = 1.0
        for chance in self.keep:
            missed *= max(0.0, 1 - chance)
        return 1 - missed


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """A way to verify drafted tokens.

    Attributes:
        method: One of :data:`VERIFIERS`.
        lp_size: For ``is``: tokens whose pairs are variables of the linear program (the paper's best: 5).
        alphabet_size: For ``is``: tokens, most probable under the target, that go before all others (the paper's best:
            40); None for all.
        order: For ``is``: ``difference`` orders tokens by q - p² (the paper), ``ratio`` by q/p.
    """

    method: str = "is"
    lp_size: int = 5
    alphabet_size: int | None = 40
    order: str = "difference"

    def __post_init__(self) -> None:
        if self.method not in VERIFIERS:
            raise UserError(f"There is no verifier '{self.method}': {did_you_mean(self.method, VERIFIERS)}")
        if self.order not in ORDERS:
            raise UserError(f"The order must be one of {', '.join(ORDERS)}, not '{self.order}'.")
        if self.lp_size < 0:
            raise UserError(f"lp_size must be 0 or more, not {self.lp_size}.")
        if self.alphabet_size is not None and self.lp_size > self.alphabet_size:
            raise UserError(f"lp_size is {self.lp_size}, above alphabet_size, which is {self.alphabet_size}: lower it.")

    def prepare(self, laws: Sequence[Tensor], q: Tensor) -> Rule:
        """Returns the rule for a target law and the laws of the drafts, float64 ``(V,)`` each, taken as they are."""
        if len(laws) == 1 or self.method == "single":
            return Canonical(FirstSelection(laws, q), q)
        if self.method == "specinfer":
            return RecursiveRejection(laws, q)
        if self.method == "spectr":
            return SequentialSelection(laws, q)
        if self.method == "balanced":
            if identical(laws):
                return Canonical(BalancedSelection(laws[0], q, len(laws)), q)
            # Different drafts: whichever of the others keeps most.
            rules: list[Rule] = [RecursiveRejection(laws, q), SequentialSelection(laws, q)]
            rules.append(Canonical(PrioritySelection(laws, q), q))
            return max(rules, key=lambda rule: rule.acceptance())
        if self.method == "priority":
            return Canonical(PrioritySelection(laws, q), q)
        if self.method == "optimal":
            return Canonical(SetSelection(laws, q), q)
        options: dict[str, Any] = {
            "lp_size": self.lp_size,
            "alphabet_size": self.alphabet_size,
            "order": self.order,
        }
        return Canonical(FoldSelection(laws, q, **options), q)

    def verify(self, tokens: Sequence[int], laws: Sequence[Tensor], q: Tensor, uniform: Uniform) -> int:
        """Returns a token of law ``q``; arguments are taken as they are."""
        return self.prepare(laws, q).given(tokens).draw(uniform)


def multi_draft_verify(
    draft_tokens: Any,
    draft_probs: Any,
    target_probs: Any,
    method: str = "is",
    generator: torch.Generator | None = None,
    **options: Any,
) -> VerifyResult:
    """Turns K drafted tokens into one of the target's law, drafted if possible.

    Args:
        draft_tokens: K tokens, drawn independently, each from its draft's law.
        draft_probs: Law of all drafts ``(V,)``, or of each ``(K, V)``: exactly those that were drawn from, with
            temperature, top-k and so on applied.
        target_probs: The target's law ``(V,)``.
        method: One of :data:`VERIFIERS`.
        generator: Source of randomness; None for torch's own.
        **options: Further fields of :class:`Verifier`, such as ``lp_size``.

    Raises:
        UserError: The laws make no sense, a drafted token is impossible under its law, or an option is out of range.
    """
    q = as_law(target_probs, "target probabilities")
    if q.ndim != 1:
        raise UserError(f"target probabilities must have the shape (V,), not {tuple(q.shape)}.")
    tokens = [int(token) for token in torch.as_tensor(draft_tokens).flatten().tolist()]
    laws = draft_laws(draft_probs, len(tokens), len(q))
    for k, (token, law) in enumerate(zip(tokens, laws, strict=True)):
        if not 0 <= token < len(q):
            raise UserError(f"Draft {k} is token {token}, outside the vocabulary of {len(q)}.")
        if not law[token] > 0:
            raise UserError(f"Draft {k} is token {token}, which has probability 0 under the law it is said to be from.")
    token = make_verifier(method, **options).verify(tokens, laws, q, Uniforms(generator, at_once=1))
    return VerifyResult(token, token in tokens, tokens.index(token) if token in tokens else None)


def make_verifier(method: str | Verifier, **options: Any) -> Verifier:
    """Returns a verifier by name.

    Raises:
        UserError: See :class:`Verifier`.
    """
    if isinstance(method, Verifier):
        return method
    try:
        return Verifier(method=method, **options)
    except TypeError as error:
        raise UserError(f"Not an option of a verifier: {str(error).split('argument ')[-1]}.") from error


def acceptance_probability(p: Any, q: Any, num_drafts: int | None = None, method: str = "is", **options: Any) -> float:
    """The probability that a verifier keeps a drafted token.

    Args:
        p: Draft law ``(V,)``, or ``(K, V)``.
        q: Target law ``(V,)``.
        num_drafts: K; may be left out for ``(K, V)``.
        method: One of :data:`VERIFIERS`.
        **options: Further fields of :class:`Verifier`.

    Raises:
        UserError: The laws or options make no sense.
    """
    target = as_law(q, "target probabilities")
    laws = draft_laws(p, num_drafts, len(target))
    return make_verifier(method, **options).prepare(laws, target).acceptance()


def selection_distribution(p: Any, q: Any, num_drafts: int | None = None, method: str = "is", **options: Any) -> Tensor:
    """The law ``p_I`` of the selected token, ``(V,)`` float64.

    Args:
        p: Draft law ``(V,)``, or ``(K, V)``.
        q: Target law ``(V,)``.
        num_drafts: K; may be left out for ``(K, V)``.
        method: ``is``, ``optimal``, ``priority`` or ``single``; the others select nothing before they accept.
        **options: Further fields of :class:`Verifier`.

    Raises:
        UserError: The laws or options make no sense, or the method has no selection.
    """
    target = as_law(q, "target probabilities")
    laws = draft_laws(p, num_drafts, len(target))
    rule = make_verifier(method, **options).prepare(laws, target)
    if not isinstance(rule, Canonical):
        raise UserError(f"'{method}' accepts drafts one after the other: no token is selected first.")
    law: Tensor = rule.selection.law
    return law
