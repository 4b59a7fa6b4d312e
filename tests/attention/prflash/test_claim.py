"""The claim: equal operations, as many blocks, and it repeats."""

import dataclasses

import pytest
import torch

from modelwright.attention.prflash import claim
from modelwright.verify.runner import check_claim

CPU = claim.SETTINGS["cpu"]


@dataclasses.dataclass
class Here:
    scale: str = "miniature"
    device: str = "cpu"
    folder: None = None

    def report(self, message: str) -> None:
        pass


def test_miniature_measures_every_variant_and_repeats_exactly():
    check_claim(claim.CLAIM)
    prepared = claim.prepare(Here())
    measured = claim.run(Here(), 0, prepared)
    assert list(measured) == list(claim.VARIANTS) == list(prepared["learning_rates"])
    metrics = list(claim.CLAIM.metrics)
    assert all(list(values) == (metrics[:2] if name == "full" else metrics) for name, values in measured.items())
    assert measured == claim.run(Here(), 0, prepared)
    assert measured != claim.run(Here(), 1, prepared)
    # The window is read with its own blocks, and the others are not.
    assert measured["window"]["loss"] == measured["window"]["loss_window"]
    assert measured["full"]["loss"] != measured["full"]["loss_window"]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_operations_are_equal_and_blocks_about_as_many(scale):
    setting = claim.SETTINGS[scale]
    done = {variant: claim.steps(variant, setting) * claim.operations(variant, setting) for variant in claim.VARIANTS}
    assert max(done.values()) / min(done.values()) < 1.02
    drawn = claim.config("prflash", setting).participation.density(16)
    window = claim.config("window", setting).participation.density(16)
    assert abs(drawn - window) < 0.03
    assert claim.steps("prflash", setting) > 1.05 * setting.steps


def test_single_passes_compare_equal_densities():
    blocks = CPU.context // CPU.block
    rows = torch.arange(blocks)
    for density in claim.DENSITIES.values():
        from modelwright.attention.prflash import Participation, fixed_blocks

        law = Participation(law="exponential", rate=claim._rate(density, blocks))
        assert law.density(blocks) == pytest.approx(density, abs=1e-6)
        kept = fixed_blocks(tuple(range(claim._window(density, blocks))), rows, blocks)
        assert float(kept.sum() / (blocks * (blocks + 1) / 2)) == pytest.approx(density, abs=0.05)
