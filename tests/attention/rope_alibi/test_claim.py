"""The claim: every variant is what it is called, and it repeats."""

import dataclasses

import pytest
import torch

from modelwright.attention.rope_alibi import RopeAlibiConfig, claim
from modelwright.verify.runner import check_claim


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
    assert set(prepared["learning_rates"]) == set(claim.TRAINED)
    measured = claim.run(Here(), 0, prepared)
    assert list(measured) == list(claim.VARIANTS)
    assert all(list(values) == list(claim.CLAIM.metrics) for values in measured.values())
    assert measured == claim.run(Here(), 0, prepared)
    assert measured != claim.run(Here(), 1, prepared)
    # Rescaled by nothing, the rotary model is itself; by more, it is not.
    assert measured["ntk"]["once"] == measured["yarn"]["once"] == measured["rope"]["once"]
    assert len({measured[name]["sixteen"] for name in ("ntk", "yarn", "rope")}) == 3


def test_held_out_text_is_not_trained_on():
    train, heldout = (bytes(part.astype("uint8")).decode() for part in claim.text(claim.SETTINGS["cpu"].chunks, 0))
    lines = {line.strip() for line in heldout.splitlines() if len(line.strip()) >= 40}
    assert lines
    assert not lines & {line.strip() for line in train.splitlines()}
    assert len(heldout) >= claim.SETTINGS["cpu"].heldout


@pytest.mark.parametrize("variant", claim.TRAINED)
def test_the_variants(variant):
    setting = claim.SETTINGS["miniature"]
    model = claim.build(variant, setting, 0).eval()
    settings = RopeAlibiConfig.of(model.config)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    rotated = not torch.equal(model.model.rotary_emb.inv_freq, torch.zeros(4))
    assert rotated == (variant != "alibi")
    assert (model.config._attn_implementation == "rope_alibi_harmonic") == (variant != "rope")
    assert settings.slopes == ("geometric" if variant in ("geometric", "alibi") else "harmonic")
    assert settings.distance == ("harmonic" if variant == "harmonic_distance" else "linear")
    weights = [claim.build(other, setting, 0).lm_head.weight for other in claim.TRAINED]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    # A model without rotation and without a bias could not tell these apart.
    assert not torch.allclose(
        model(ids).logits[0, -1], model(ids[:, torch.tensor([*range(10, -1, -1), 11])]).logits[0, -1]
    )
