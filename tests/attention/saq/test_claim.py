"""The claim: it repeats, every variant is what it is called, and the control has the bits of what it is set against."""

import torch

from modelwright.attention.saq import claim
from modelwright.verify.runner import check_claim


class Here:
    scale, device, folder = "miniature", "cpu", None

    def report(self, message):
        pass


def test_miniature_measures_every_variant_and_repeats_exactly():
    check_claim(claim.CLAIM)
    measured = claim.run(Here(), 0, {})
    assert list(measured) == list(claim.VARIANTS)
    assert all(set(values) == set(claim.CLAIM.metrics) for values in measured.values())
    assert measured == claim.run(Here(), 0, {})
    assert measured["plain"]["error"] == 0
    assert measured["kivi2"]["way"] == 0
    assert measured["kivi4"]["way"] == 1


def test_the_control_has_the_same_bits_the_other_way_round():
    states = torch.randn(2, 1, 1, 128 * 5 + 9, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for variant in ("saq", "upside_down"):
        layer = claim.layer_for(variant)
        for begin, end in ((0, 300), (300, 301), (301, 640), (640, 649)):
            keys, values = layer.update(*(s[:, :, begin:end] for s in states))
        found[variant] = [k.bits for k, _ in layer.segments for _ in range(k.segments)]
        assert keys.shape == values.shape == (1, 1, 649, 32)
        # Segments stand in the order of their tokens.
        assert float((keys - states[0]).abs().max()) < 1.5
    assert found == {"saq": [2, 2, 2, 4, 8], "upside_down": [8, 4, 2, 2, 2]}


def test_perplexity_without_quantising_is_that_of_one_pass():
    setting = claim.SETTINGS["miniature"]
    model, tests = claim.trained(setting, 0, "cpu")
    with torch.no_grad():
        logits = model(tests).logits[:, -claim.SEGMENT - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tests[:, -claim.SEGMENT :].flatten())
    assert abs(claim.perplexity(model, tests, "plain") - float(loss.exp())) < 1e-2
