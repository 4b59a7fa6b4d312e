"""The optimum: closed form, linear program and brute force are one number; selections know their own law."""

import itertools
import math

import numpy as np
import pytest
import torch

from decoding.multi_draft.law_cases import cases, random_law
from modelwright.decoding.multi_draft import acceptance_probability, optimal_acceptance, selection_distribution
from modelwright.decoding.multi_draft.balanced import BalancedSelection
from modelwright.decoding.multi_draft.laws import (
    FoldSelection,
    PrioritySelection,
    SetSelection,
    as_law,
    draft_laws,
    two_drafts,
)
from modelwright.errors import UserError


def brute_force(laws, q):
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(q)), r) for r in range(len(q) + 1))
    return min(float(q[list(s)].sum()) + 1 - math.prod(float(p[list(s)].sum()) for p in laws) for s in sets)


def test_formula_program_and_brute_force_agree():
    for laws, q in cases(80):
        value = optimal_acceptance(torch.stack(laws), q)
        assert value == pytest.approx(brute_force(laws, q), abs=1e-9)
        program = SetSelection(laws, q)
        assert float(torch.minimum(program.law, q).sum()) == pytest.approx(value, abs=1e-9)


def test_one_draft_gives_the_overlap_and_more_give_more():
    rng = np.random.default_rng(1)
    for _ in range(20):
        p, q = random_law(30, rng), random_law(30, rng)
        values = [optimal_acceptance(p, q, k) for k in range(1, 9)]
        assert values[0] == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


def test_acceptance_is_certain_exactly_when_no_set_is_missing_mass():
    """Theorem 2: P* = 1 if and only if q(S) >= p(S)^2 for every S."""
    rng = np.random.default_rng(2)
    seen = set()
    for _ in range(200):
        p = random_law(4, rng, sharpness=0.6, zeros=0)
        q = as_law(0.7 * p + 0.3 * random_law(4, rng, sharpness=0.6, zeros=0))
        sets = [list(s) for r in range(5) for s in itertools.combinations(range(4), r)]
        certain = all(float(q[s].sum()) >= float(p[s].sum()) ** 2 - 1e-12 for s in sets)
        assert (optimal_acceptance(p, q, 2) > 1 - 1e-12) == certain
        seen.add(certain)
    assert seen == {True, False}


def test_a_whole_program_is_optimal_and_a_truncated_one_is_not_above():
    rng = np.random.default_rng(3)
    below = 0
    for _ in range(15):
        p, q = random_law(25, rng), random_law(25, rng)
        best = optimal_acceptance(p, q, 2)
        for order in ("difference", "ratio"):
            options = {"alphabet_size": None, "order": order}
            whole = acceptance_probability(p, q, 2, "is", lp_size=25, **options)
            part = acceptance_probability(p, q, 2, "is", lp_size=4, **options)
            none = acceptance_probability(p, q, 2, "is", lp_size=0, **options)
            assert whole == pytest.approx(best, abs=1e-9)
            assert none <= part + 1e-9 <= best + 2e-9
            below += part < best - 1e-6
    assert below


def test_the_optimum_bounds_every_verifier_and_specinfer_is_above_one_draft():
    for laws, q in cases(60, largest=9, drafts=4):
        p = torch.stack(laws)
        best = optimal_acceptance(p, q)
        values = {
            m: acceptance_probability(p, q, None, m)
            for m in ("single", "specinfer", "spectr", "priority", "is", "balanced")
        }
        assert max(values.values()) <= best + 1e-9
        assert values["single"] <= values["specinfer"] + 1e-12


def balanced(laws, q):
    return BalancedSelection(laws[0], q, len(laws))


def induced(selection, laws):
    """The law of the selected token, by going through all drafts."""
    law = torch.zeros_like(laws[0])
    for tokens in itertools.product(range(len(law)), repeat=len(laws)):
        mass = math.prod(float(p[t]) for p, t in zip(laws, tokens, strict=True))
        if mass:
            chances = selection.choose(tokens)
            assert set(chances) <= set(tokens)
            assert sum(chances.values()) == pytest.approx(1, abs=1e-12)
            for token, chance in chances.items():
                law[token] += mass * chance
    return law


@pytest.mark.parametrize(
    "make",
    [
        PrioritySelection,
        SetSelection,
        balanced,
        lambda laws, q: FoldSelection(laws, q, lp_size=0),
        lambda laws, q: FoldSelection(laws, q, lp_size=3, alphabet_size=4),
        lambda laws, q: FoldSelection(laws, q, lp_size=9, alphabet_size=None, order="ratio"),
    ],
)
def test_a_selection_knows_its_law(make):
    for laws, q in cases(40, largest=5):
        if make is balanced:
            laws = laws[:1] * len(laws)
        selection = make(laws, q)
        assert float(selection.law.sum()) == pytest.approx(1, abs=1e-12)
        assert (selection.law >= 0).all()
        assert not selection.law[torch.stack(laws).sum(0) == 0].any()
        torch.testing.assert_close(induced(selection, laws), selection.law, rtol=0, atol=1e-12)
        for token in range(len(q)):
            assert selection.law_at(token) == pytest.approx(float(selection.law[token]), abs=1e-14)


def test_tokens_of_one_ratio_are_one_level():
    p, q = as_law([0.1, 0.2, 0.3, 0.4]), as_law([0.15, 0.3, 0.15, 0.4])
    selection = PrioritySelection([p, p], q)
    assert selection.levels[0] == selection.levels[1]
    torch.testing.assert_close(induced(selection, [p, p]), selection.law, rtol=0, atol=1e-14)


def test_no_selection_is_worse_than_a_single_draft():
    rng = np.random.default_rng(10)
    for _ in range(40):
        near = random_law(30, rng, zeros=0)
        p = as_law(0.9 * near + 0.1 * random_law(30, rng))
        for k in (2, 4):
            for method, options in (
                ("balanced", {}),
                ("priority", {}),
                ("is", {}),
                ("is", {"lp_size": 0, "order": "ratio"}),
            ):
                one = acceptance_probability(p, near, 1)
                assert acceptance_probability(p, near, k, method, **options) >= one - 1e-12


def test_the_law_of_the_papers_order():
    """p_I(o_i) = p_i^2 + 2 p_i (mass after i): section 4's explicit law, for tokens sorted by q - p^2."""
    rng = np.random.default_rng(4)
    p, q = random_law(12, rng, zeros=0), random_law(12, rng)
    order = torch.argsort(q - p * p, descending=True)
    after = 1 - p[order].cumsum(0)
    law = torch.empty_like(p)
    law[order] = p[order] ** 2 + 2 * p[order] * after
    stage = two_drafts(p, p, q, lp_size=0)
    torch.testing.assert_close(stage.law, law, rtol=0, atol=1e-14)


def program_by_hand(p, q, size):
    """Section 4's truncated program for two identical drafts, written out pair by pair: its value."""
    from scipy.optimize import linprog

    order = np.argsort(-(q - p * p))
    p, q = p[order], q[order]
    count = len(p)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    base = p**2
    for i in range(count):
        for j in range(i + 1, count):
            if (i, j) not in pairs:
                base[i] += 2 * p[i] * p[j]
    upper, bound = np.zeros((count, len(pairs) + count)), base.copy()
    for variable, (i, j) in enumerate(pairs):
        upper[i, variable], upper[j, variable] = -2 * p[i] * p[j], 2 * p[i] * p[j]
        bound[j] += 2 * p[i] * p[j]
    upper[np.arange(count), len(pairs) + np.arange(count)] = 1
    bounds = [(0, 1)] * len(pairs) + [(0, value) for value in q]
    return -linprog(np.r_[np.zeros(len(pairs)), -np.ones(count)], A_ub=upper, b_ub=bound, bounds=bounds).fun


def test_the_truncated_program_is_the_papers():
    rng = np.random.default_rng(12)
    above = 0
    for size in (2, 3, 5, 8):
        for _ in range(5):
            p, q = random_law(20, rng, zeros=0), random_law(20, rng, zeros=0)
            wanted, one = program_by_hand(p.numpy(), q.numpy(), size), acceptance_probability(p, q, 1)
            found = acceptance_probability(p, q, 2, "is", lp_size=size, alphabet_size=None)
            assert found == pytest.approx(max(wanted, one), abs=1e-9)
            above += wanted > one
    assert above > 10


def test_the_papers_scheme_is_above_spectr_for_a_sharper_target_and_below_for_one_like_the_draft():
    """Why the claim holds in part: an order favours likely tokens, which a target as flat as its draft does not."""
    for sharper, sign in ((1.0, -1), (2.0, 1)):
        rng = np.random.default_rng(13)
        gains = []
        for _ in range(20):
            base = random_law(50, rng, 2.0, zeros=0).log()
            p = as_law(torch.softmax(base, 0))
            q = as_law(torch.softmax(sharper * base + 0.5 * torch.from_numpy(rng.normal(size=50)), 0))
            gains.append(acceptance_probability(p, q, 2, "is") - acceptance_probability(p, q, 2, "spectr"))
        assert sign * np.mean(gains) > 0.02


def test_priority_for_any_number_of_drafts():
    """p_I(o_i) = F_i - F_{i-1}, F_i = 1 - (1 - cumsum(p)_i)^K."""
    rng = np.random.default_rng(5)
    p, q = random_law(20, rng, zeros=0, sharpness=2.0), random_law(20, rng, zeros=0, sharpness=2.0)
    order = torch.argsort(q / p, descending=True)
    reach = 1 - (1 - p[order].cumsum(0)).clamp(min=0) ** 5
    law = torch.empty_like(p)
    law[order] = reach.diff(prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(selection_distribution(p, q, 5, "priority"), law, rtol=0, atol=1e-13)


def test_rare_tokens_keep_their_digits():
    p = as_law([1 - 3e-15, 1e-15, 2e-15])
    q = as_law([1 - 3e-9, 2e-9, 1e-9])
    # Ratios 1, 2e6, 5e5: token 2 is selected if it is drafted and token 1 is not.
    assert float(selection_distribution(p, q, 2, "priority")[2]) == pytest.approx(4e-15, rel=1e-9)


def test_an_optimum_for_a_large_vocabulary_is_near_that_of_its_heart():
    rng = np.random.default_rng(6)
    p, q = random_law(20_000, rng, zeros=0.5), random_law(20_000, rng, zeros=0.5)
    order = torch.argsort(torch.where(p > 0, q / p, math.inf))
    low = min(float(q[order][:i].sum()) + 1 - float(p[order][:i].sum()) ** 3 for i in range(0, 20_001, 50))
    value = optimal_acceptance(p, q, 3)
    assert value <= low + 1e-12
    assert value == pytest.approx(low, abs=5e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_acceptance([0.5, 0.6], [0.5, 0.5], 2), "sum to 1, but the sum is 1.1"),
        (lambda: optimal_acceptance([1.5, -0.5], [0.5, 0.5], 2), "at least 0, but one is -0.5"),
        (lambda: optimal_acceptance([float("nan"), 1.0], [0.5, 0.5], 2), "at least 0, but one is nan"),
        (lambda: optimal_acceptance([0.5, 0.5], [0.5, 0.25, 0.25], 2), "vocabulary has 2 tokens and the target's 3"),
        (lambda: optimal_acceptance([0.5, 0.5], [0.5, 0.5], 0), "at least 1 draft, not 0"),
        (lambda: optimal_acceptance([[0.5, 0.5]] * 2, [0.5, 0.5], 3), "3 drafts, but laws of 2"),
        (lambda: as_law([[[1.0]]]), "shape"),
        (lambda: SetSelection([torch.full((300,), 1 / 300).double()] * 3, torch.full((300,), 1 / 300)), "top_k"),
        (lambda: selection_distribution([0.5, 0.5], [0.5, 0.5], 2, "spectr"), "no token is selected first"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_laws_may_be_a_little_off_and_are_brought_to_one():
    assert float(as_law([0.5, 0.5004]).sum()) == 1
    assert len(draft_laws([0.5, 0.5], 3, 2)) == 3


def test_the_balanced_selection_keeps_more_than_spectr():
    rng = np.random.default_rng(11)
    gained, possible = 0.0, 0.0
    for sharpness, noise in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.3)):
        for k in (2, 3, 4, 8):
            for _ in range(5):
                base = random_law(40, rng, sharpness, zeros=0).log()
                q = as_law(torch.softmax(1.2 * base, 0))
                p = as_law(torch.softmax(base + noise * torch.from_numpy(rng.normal(size=40)), 0))
                spectr = acceptance_probability(p, q, k, "spectr")
                found = acceptance_probability(p, q, k, "balanced")
                best = optimal_acceptance(p, q, k)
                assert min(spectr, best - 1e-4) - 1e-9 <= found <= best + 1e-12
                gained, possible = gained + found - spectr, possible + best - spectr
    assert gained > 0.5 * possible > 0
