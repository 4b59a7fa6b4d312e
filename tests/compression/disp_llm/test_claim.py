from types import SimpleNamespace

import pytest
import torch

from modelwright.compression.disp_llm import claim
from modelwright.models.tiny import tiny_model
from modelwright.verify.runner import check_claim
from modelwright.verify.worker import check_measurements


@pytest.mark.slow
def test_the_claim_runs_in_miniature_and_is_deterministic(tmp_path):
    context = SimpleNamespace(scale="miniature", device="cpu", folder=tmp_path, report=lambda message: None)
    prepared = claim.prepare(context)
    assert all(len(tried) in (2, 6) for tried in prepared["tried"].values())
    first, again = (claim.run(context, 0, prepared) for _ in range(2))
    check_claim(claim.CLAIM)
    check_measurements(claim.CLAIM, first)
    assert first == again
    assert first["dense"]["ratio"] == 1
    assert first["semi"]["ratio"] == pytest.approx(0.5, abs=1e-3)
    assert first["disp"]["ratio"] <= 0.5


def test_two_of_four_are_kept_and_they_are_the_largest():
    model = tiny_model("llama")
    semi = claim._semi_structured(model)
    before, after = (m.model.layers[0].mlp.up_proj.weight.detach().view(-1, 4) for m in (model, semi))
    assert (after.count_nonzero(1) == 2).all()
    assert torch.equal(after.abs().sum(1), before.abs().topk(2, dim=1).values.sum(1))
    assert claim._ratio(model, semi) == pytest.approx(0.5)
    assert torch.equal(semi.lm_head.weight, model.lm_head.weight)
