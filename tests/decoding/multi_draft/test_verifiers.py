"""Every verifier's output has the target's law: exactly by enumeration, and drawn."""

import itertools
import math

import numpy as np
import pytest
import torch

from decoding.multi_draft.law_cases import cases, random_law
from modelwright.decoding.multi_draft import VERIFIERS, Verifier, acceptance_probability, multi_draft_verify
from modelwright.decoding.multi_draft.draws import Uniforms, draw, draw_rows
from modelwright.decoding.multi_draft.laws import as_law
from modelwright.errors import UserError

SETTINGS = [
    *(Verifier(method=m) for m in VERIFIERS),
    Verifier(lp_size=0),
    Verifier(lp_size=2, alphabet_size=3),
    Verifier(lp_size=5, alphabet_size=None, order="ratio"),
]
IDS = [f"{v.method}-{v.lp_size}-{v.alphabet_size}-{v.order}" for v in SETTINGS]


def output_law(verifier, laws, q):
    rule = verifier.prepare(laws, q)
    total = torch.zeros_like(q)
    for tokens in itertools.product(range(len(q)), repeat=len(laws)):
        mass = math.prod(float(p[t]) for p, t in zip(laws, tokens, strict=True))
        if mass:
            total += mass * rule.given(tokens).law(len(q))
    return total


def kept(verifier, laws, q):
    rule = verifier.prepare(laws, q)
    drafts = itertools.product(range(len(q)), repeat=len(laws))
    masses = ((math.prod(float(p[t]) for p, t in zip(laws, ts, strict=True)), ts) for ts in drafts)
    return sum(mass * sum(rule.given(ts).kept.values()) for mass, ts in masses if mass)


@pytest.mark.parametrize("verifier", SETTINGS, ids=IDS)
def test_the_output_law_is_the_targets_by_enumeration(verifier):
    for laws, q in cases(40, largest=5):
        torch.testing.assert_close(output_law(verifier, laws, q), q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("verifier", SETTINGS, ids=IDS)
def test_acceptance_is_what_enumeration_keeps(verifier):
    for laws, q in cases(20, largest=4):
        assert verifier.prepare(laws, q).acceptance() == pytest.approx(kept(verifier, laws, q), abs=1e-11)


@pytest.mark.parametrize("verifier", SETTINGS, ids=IDS)
def test_points_are_laws_too(verifier):
    """Copied drafts: p_k is a point. Recursive rejection and the program reach q of all drafted tokens."""
    q = as_law([0.1, 0.2, 0.3, 0.4])
    points = list(torch.eye(4, dtype=torch.float64)[[3, 1, 1]])
    torch.testing.assert_close(output_law(verifier, points, q), q, rtol=0, atol=1e-12)
    if verifier.method in ("is", "optimal", "specinfer") and verifier.lp_size >= 2:
        assert verifier.prepare(points, q).acceptance() == pytest.approx(0.6, abs=1e-9)


@pytest.mark.parametrize("verifier", SETTINGS, ids=IDS)
def test_equal_laws_are_always_accepted_and_disjoint_ones_never(verifier):
    rng = np.random.default_rng(7)
    p = random_law(5, rng)
    for k in (1, 2, 3):
        assert verifier.prepare([p] * k, p).acceptance() == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(output_law(verifier, [p] * k, p), p, rtol=0, atol=1e-12)
    left, right = as_law([0.4, 0.6, 0, 0]), as_law([0, 0, 0.7, 0.3])
    assert verifier.prepare([left] * 2, right).acceptance() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(output_law(verifier, [left] * 2, right), right, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", VERIFIERS)
def test_drawn_tokens_have_the_targets_law(method):
    from scipy.stats import chisquare

    rng = np.random.default_rng(8)
    p, q = random_law(6, rng, zeros=0), random_law(6, rng, zeros=0)
    uniform = Uniforms(torch.Generator().manual_seed(9))
    rule = Verifier(method=method).prepare([p, p], q)
    counts, accepted = np.zeros(6), 0
    for _ in range(50_000):
        tokens = [draw(p, uniform), draw(p, uniform)]
        token = rule.given(tokens).draw(uniform)
        counts[token] += 1
        accepted += token in tokens
    assert chisquare(counts, 50_000 * q.numpy()).pvalue > 1e-3
    # A residual draw may be another drafted token by chance, which is not in the formula.
    low = acceptance_probability(p, q, 2, method)
    assert accepted / 50_000 >= low - 4 * math.sqrt(0.25 / 50_000)


def test_a_result_says_which_draft_it_is():
    q = as_law([0.0, 0.0, 1.0])
    result = multi_draft_verify([0, 2], [0.5, 0.25, 0.25], q, "is")
    assert result == (2, True, 1)
    result = multi_draft_verify([0, 1], [0.5, 0.25, 0.25], q, "spectr")
    assert result == (2, False, None)


def test_the_same_seed_gives_the_same_token():
    p, q = as_law([0.4, 0.3, 0.3]), as_law([0.2, 0.3, 0.5])
    first = [multi_draft_verify([0, 1], p, q, "is", torch.Generator().manual_seed(s)).token for s in range(20)]
    again = [multi_draft_verify([0, 1], p, q, "is", torch.Generator().manual_seed(s)).token for s in range(20)]
    assert first == again
    assert len(set(first)) > 1


def test_arrays_and_lists_will_do():
    assert multi_draft_verify(np.array([1]), np.array([0.0, 1.0]), [0.0, 1.0], "priority").token == 1


def test_a_token_of_weight_zero_is_never_drawn():
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    points, tokens = (0.0, 0.29, 0.31, math.nextafter(1, 0)), [1, 1, 3, 3]
    assert [draw(weights, lambda point=point: point) for point in points] == tokens
    several = draw_rows(weights.expand(4, 5), torch.tensor(points, dtype=torch.float64))
    assert several.tolist() == tokens
    # The largest number that is ever drawn stays below every total.
    totals = torch.cat([torch.linspace(0.01, 4, 4001, dtype=torch.float64), 2.0 ** torch.arange(-60, 9).double()])
    many = totals[:, None] * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert (draw_rows(many, torch.full_like(totals, 1 - 2**-53)) == 1).all()
    assert draw_rows(torch.tensor([[1.0, 0], [0, 1]]).double(), torch.tensor([0.9, 0.1]).double()).tolist() == [0, 1]


def test_numbers_do_not_depend_on_how_many_are_fetched():
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    many, few = Uniforms(generators[0], at_once=7), Uniforms(generators[1], at_once=1)
    assert [many() for _ in range(20)] == [few() for _ in range(20)]


def test_scores_that_are_no_numbers_are_an_error():
    with pytest.raises(UserError, match="not numbers"):
        draw(torch.tensor([0.5, float("nan")]), lambda: 0.2)


P, Q = [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_draft_verify([0, 1], [0.5, 0.6, 0.0], Q), "sum to 1, but the sum is 1.1"),
        (lambda: multi_draft_verify([0, 1], P, [0.5, 0.8, -0.3]), "at least 0, but one is -0.3"),
        (lambda: multi_draft_verify([0, 2], P, Q), "Draft 1 is token 2, which has probability 0"),
        (lambda: multi_draft_verify([0, 3], P, Q), "outside the vocabulary of 3"),
        (lambda: multi_draft_verify([], P, Q), "at least 1 draft, not 0"),
        (lambda: multi_draft_verify([0, 1], [0.5, 0.5], Q), "vocabulary has 2 tokens and the target's 3"),
        (lambda: multi_draft_verify([0, 1], P, [Q, Q]), r"must have the shape \(V,\)"),
        (lambda: multi_draft_verify([0, 1], P, Q, "is", lp_size=9, alphabet_size=5), "lp_size is 9, above alphabet"),
        (lambda: multi_draft_verify([0, 1], P, Q, "is", lp_size=-1), "lp_size must be 0 or more"),
        (lambda: multi_draft_verify([0, 1], P, Q, "is", order="up"), "order must be one of"),
        (lambda: multi_draft_verify([0, 1], P, Q, "is", lp=3), "Not an option of a verifier: 'lp'"),
        (lambda: multi_draft_verify([0, 1], P, Q, "spec"), "There is no verifier 'spec': did you mean"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
