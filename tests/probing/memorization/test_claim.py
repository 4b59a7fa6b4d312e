from types import SimpleNamespace

import numpy as np
import pytest

from modelwright.probing.memorization import claim
from modelwright.verify.runner import check_claim

CONTEXT = SimpleNamespace(scale="miniature", device="cpu", folder=None, report=lambda message: None)


@pytest.mark.slow
def test_the_claim_runs_in_miniature_and_repeats_exactly():
    check_claim(claim.CLAIM)
    prepared = claim.prepare(CONTEXT)
    measured = claim.run(CONTEXT, 0, prepared)
    assert set(measured) <= set(claim.VARIANTS)
    assert {m for values in measured.values() for m in values} <= set(claim.CLAIM.metrics)
    for bar in claim.CLAIM.bars:
        assert bar.metric in measured[bar.method]
        assert bar.metric in measured[bar.baseline]
    assert claim.run(CONTEXT, 0, prepared) == measured
    assert measured["large"]["agreement"] == 1


def test_the_simulated_paradox_turns_the_pooled_sign():
    table = claim.simulate(20_000, 1)
    assert claim.coverage(table, "routed") >= 11 / 12
    assert claim.coverage(table, "pooled") < 0.5
    recited = table[table["sequence_duplicates"] >= 6]
    rest = table[table["sequence_duplicates"] < 6]
    signs = [np.corrcoef(t["continuation_perplexity"], t["memorized"])[0, 1] for t in (recited, rest)]
    assert signs[0] > 0.2
    assert signs[1] < -0.2


def test_the_routed_regression_wins_by_the_margin():
    train, test = claim.simulate(20_000, 1), claim.simulate(20_000, 2)
    loss = {
        v: claim._measure(test, claim.predictions(v, train, test, 1.0, 0), "log_loss") for v in ("routed", "pooled")
    }
    assert loss["routed"] + 0.05 < loss["pooled"]


def test_shares_are_of_the_memorised():
    world = claim.made_world(claim.SETTINGS["miniature"], 0)
    model = claim.train(claim.SETTINGS["miniature"], world, 16, 1e-3, 0, "cpu")[0]
    table = claim.audited(world, model)
    table["memorized"] = table["planted_copies"] >= 3
    found = claim.shares(table)
    assert found["copies_2"] == 0
    assert found["copies_32"] == 1
    assert found["fall"] == 0
    assert found["recitation"] + found["recollection"] == pytest.approx(1)
    assert found["recitation"] == pytest.approx(12 / 20)
    table["memorized"] = table["planted_copies"] == 3
    assert claim.shares(table)["fall"] == 1
