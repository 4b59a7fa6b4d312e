"""The claim's world and its parts; the claim itself in miniature."""

from types import SimpleNamespace

import numpy as np
import pytest

from modelwright.training.stability_gap.claim import CLAIM, SETTINGS, VARIANTS, best_first, prepare, run
from modelwright.training.stability_gap.entities import QUESTION, STATEMENT, entity_world, texts
from modelwright.verify.runner import check_claim


def test_the_world_is_what_it_says():
    world = entity_world(0, pool=4000)
    assert world.vocabulary == 2 + 224 + 16
    assert texts(world.pool[:1])[0].count(" ") == 2
    entity, value = world.pool[:, 1] - 2, world.pool[:, 2] - 2 - 224
    statements = world.pool[:, 0] == STATEMENT
    assert (entity[statements] >= 160).all()
    true = world.facts[entity] == value
    np.testing.assert_array_equal(world.good[statements], true[statements])
    assert 0.4 < world.good.mean() < 0.6
    asked = world.pool[~statements]
    assert 0 < len(asked) < 50
    assert (asked[:, 1] - 2 < 160).all()
    assert (asked[:, 2] - 2 - 224 == world.facts[asked[:, 1] - 2] + 8).all()
    assert 0.28 < (world.pretraining[:, 0] == QUESTION).mean() < 0.32
    assert len(world.questions(True)) == len(world.statements()) == 64


def test_the_ranking_finds_the_true_statements():
    world = entity_world(1, pool=4000)
    best = best_first(world)[:400]
    assert world.good[best].all()
    assert len(np.unique(world.pool[best][:, 1])) > 60  # of all entities, not only of some


@pytest.mark.slow
def test_the_claim_can_be_judged_and_runs_in_miniature():
    check_claim(CLAIM)
    context = SimpleNamespace(scale="miniature", device="cpu", report=lambda message: None)
    prepared = prepare(context)
    assert set(prepared["rates"]) <= set(VARIANTS)
    found = run(context, 0, prepared)
    assert set(found) == set(VARIANTS)
    for bar in CLAIM.bars:
        assert {bar.metric} <= set(found[bar.method]) & set(found[bar.baseline])
    assert set(SETTINGS) == set(CLAIM.seeds)
