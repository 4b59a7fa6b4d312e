"""The claim runs in miniature, deterministically, and its parts measure what they say."""

import pytest
import torch

from modelwright.training.migu import claim
from modelwright.verify.runner import check_claim


class Small:
    scale, device = "miniature", "cpu"

    def report(self, message):
        pass


@pytest.mark.slow
def test_it_runs():
    check_claim(claim.CLAIM)
    prepared = claim.prepare(Small())
    assert set(prepared["chosen"]) == set(claim.TUNED)
    for variant, tried in prepared["tried"].items():
        assert len(tried) == len(claim.RATES)  # as many for each
        assert tried[str(prepared["chosen"][variant])] == max(tried.values())
    first = claim.run(Small(), 1, prepared)
    assert set(first) == set(claim.CLAIM.variants)
    for bar in claim.CLAIM.bars:
        assert bar.metric in first[bar.method]
        assert bar.metric in first[bar.baseline]
    assert claim.TUNING_SEED not in {seed for seeds in claim.CLAIM.seeds.values() for seed in seeds}


def test_harm_moves_every_variant_by_the_same_norm(monkeypatch):
    start = claim.prepare_model(Small(), 1)
    moved = {}
    copied = claim._copy
    for variant in ("ft", "migu", "low"):
        models = []
        monkeypatch.setattr(claim, "_copy", lambda m, models=models: models.append(copied(m)) or models[-1])
        monkeypatch.setitem(claim.SETTINGS, "miniature", claim.Setting(2, 24, 8, 16, 1, 4, 2, 4, 1))
        found = claim.harm(Small(), start, variant)
        assert set(found) == {"harm", "progress"}
        before = dict(start.model.named_parameters())
        moved[variant] = [
            torch.sqrt(sum((p - before[n]).square().sum() for n, p in model.named_parameters())).item()
            for model in models
        ]
        assert len(models) == 2
        for name, p in models[0].named_parameters():
            if "proj" not in name:
                assert torch.equal(p, before[name])
    for steps in moved.values():
        assert steps == pytest.approx([0.3, 0.3], rel=1e-3)
