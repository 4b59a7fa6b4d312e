import math
from types import SimpleNamespace

import pytest
import torch

from modelwright.decoding.multi_draft import claim
from modelwright.verify.runner import check_claim
from modelwright.verify.worker import check_measurements


@pytest.mark.slow
def test_the_claim_runs_in_miniature_and_is_deterministic(tmp_path):
    context = SimpleNamespace(scale="miniature", device="cpu", folder=tmp_path, report=lambda message: None)
    first, again = (claim.run(context, 0, {}) for _ in range(2))
    check_claim(claim.CLAIM)
    check_measurements(claim.CLAIM, first)
    assert first == again
    for metric in ("ngram_2", "ngram_4", "llama_2", "llama_4"):
        best = first["optimum"][metric]
        assert all(values[metric] <= best + 1e-9 for values in first.values())


def test_an_ngram_model_is_a_law_and_knows_what_it_counted():
    text = [0, 1, 2] * 30
    model = claim.NGram(text, 2, 4)
    law = model.law([0, 1])
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert int(law.argmax()) == 2
    assert (law > 0).all()
    # Witten-Bell: 29 of 29 times the same, and one kind of continuation backs off once.
    shorter = claim.NGram(text, 1, 4).law([1])
    assert float(law[2]) == pytest.approx((30 + float(shorter[2])) / 31, abs=0.02)


def test_a_draft_like_the_target_fills_every_block():
    setting = claim.SETTINGS["miniature"]
    law = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = claim._blocks("balanced", lambda past: law, lambda past: law, [0, 1], setting, generator)
    assert found == setting.length + 1
    other = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    never = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    assert claim._blocks("is", lambda past: other, lambda past: never, [0, 1], setting, generator) == 1


def test_blocks_have_the_length_that_acceptance_foretells():
    """One draft, laws that do not depend on the past: 1 + a + a^2 + … tokens a block."""
    setting = claim.SETTINGS["miniature"].__class__(**{**vars(claim.SETTINGS["miniature"]), "blocks": 3000})
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    found = claim._blocks("single", lambda past: q, lambda past: p, [0], setting, torch.Generator().manual_seed(0))
    expected = sum(0.7**i for i in range(setting.length + 1))
    assert found == pytest.approx(expected, abs=4 * 1.5 / math.sqrt(3000))
