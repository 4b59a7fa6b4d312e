"""The claim: same budget for every variant, deterministic, and every number measured."""

import math
from types import SimpleNamespace

import pytest
import torch

from modelwright.curation.jest import claim
from modelwright.verify.worker import check_measurements

CONTEXT = SimpleNamespace(scale="miniature", device="cpu", folder=None, report=lambda message: None)
MINIATURE = claim.SETTINGS["miniature"]


def test_miniature_measures_every_variant_and_repeats_exactly():
    prepared = claim.prepare(CONTEXT)
    assert {k: set(v) for k, v in prepared["rates"].items()} == {k: set(v) for k, v in claim._WORLDS.items()}
    first, again = (claim.run(CONTEXT, 0, prepared) for _ in range(2))
    check_measurements(claim.CLAIM, first)
    timed = {"time", "scoring"}
    for variant, metrics in first.items():
        for name, value in metrics.items():
            if name not in timed:
                assert value == again[variant][name] or math.isnan(value), (variant, name)
    assert first["oracle"]["matched"] == 1
    assert set(first["jest"]) == set(claim.CLAIM.metrics)
    assert first["jest"]["recall"] != claim.run(CONTEXT, 1, prepared)["jest"]["recall"]


@pytest.mark.parametrize("bar", claim.CLAIM.bars, ids=lambda b: b.statement)
def test_bars_compare_what_is_measured_on_both_sides(bar):
    kind = "plain" if bar.metric == "recall_plain" else "noisy"
    assert {bar.method, bar.baseline} <= set(claim._WORLDS[kind])


def test_the_tuning_seed_is_not_reported():
    assert all(claim.TUNING_SEED not in seeds for seeds in claim.CLAIM.seeds.values())


def test_a_curve_counts_as_there_once_it_stays():
    assert claim.steps_to({20: 0.1, 40: 0.5, 60: 0.3, 80: 0.5, 100: 0.6}, 0.4) == 80
    assert claim.steps_to({20: 0.5, 40: 0.5}, 0.4) == 20
    assert math.isnan(claim.steps_to({20: 0.5, 40: 0.3}, 0.4))


def test_costs_are_the_papers():
    assert claim.cost("jest") == claim.cost("independent") == claim.cost("hard") == pytest.approx(7 / 3)
    assert claim.cost("uniform") == claim.cost("oracle") == claim.cost("easy_reference") == 1


def test_the_worlds_hold_what_they_say():
    setting = claim.Setting(pool=20_000)
    for kind, matched in (("noisy", 0.4), ("plain", 0.85)):
        world = claim.World(setting, kind, 3)
        assert float(world.pool.matched.float().mean()) == pytest.approx(matched, abs=0.02)
        assert bool(world.curated.matched.all())
        assert all(bool(test.matched.all()) and len(test) == 640 for test in world.test)
        assert len(world.test) == 4
    again = claim.World(setting, "plain", 3)
    assert torch.equal(again.pool.left, world.pool.left)


def test_an_ideal_model_recalls_everything():
    eye = torch.eye(48)
    pairs = claim.Pairs(eye, eye.clone(), torch.ones(48, dtype=torch.bool))

    def ideal(left, right):
        return SimpleNamespace(queries=left, keys=right)

    assert claim.recall_at_1(ideal, [pairs]) == 1
    swapped = claim.Pairs(eye, eye.roll(1, 0), pairs.matched)
    assert claim.recall_at_1(ideal, [swapped]) == 0


def test_super_batches_and_weights_are_the_same_for_every_variant(monkeypatch):
    world = claim.World(MINIATURE, "noisy", 0)
    seen = {}
    draw = torch.randint
    for variant in ("uniform", "jest", "oracle"):
        seen[variant] = []

        def noted(*arguments, to=seen[variant], **keywords):
            found = draw(*arguments, **keywords)
            to.append(found)
            return found

        reference = claim.train(world, "reference", 1e-3, 0).model
        monkeypatch.setattr(torch, "randint", noted)
        claim.train(world, variant, 1e-3, 0, reference)
        monkeypatch.undo()
    for variant in ("jest", "oracle"):
        assert len(seen[variant]) == len(seen["uniform"]) == MINIATURE.steps
        assert all(torch.equal(a, b) for a, b in zip(seen[variant], seen["uniform"]))
