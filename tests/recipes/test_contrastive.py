"""The bundled recipe on contrastive batches, end to end at a fraction of its size."""

import re

import pytest

from modelwright.recipes.run import run_recipe
from modelwright.report.render import render
from report.test_render import check_page, words

TINY = [
    "seeds=[0]", "workers=1", "steps.world.with.set.pool_size=600", "steps.world.with.set.reference_size=200",
    "steps.world.with.set.heldout_size=40", "steps.reference.with.steps=4", "steps.train.with.steps=4",
    "steps.reference.with.eval_every=2", "steps.train.with.eval_every=2",
]  # fmt: skip


@pytest.mark.slow
def test_every_method_trains_and_the_report_shows_it(tmp_path):
    run = run_recipe("contrastive", tmp_path / "run", overrides=TINY)
    steps = {step["id"]: step for step in run["steps"]}
    methods = ("uniform", "curated only", "hard", "easy reference", "independent", "JEST")
    for method in methods:
        trained = steps[f"train[method={method},seed=0]"]["result"]
        assert trained["pairs"] == 4 * 128
        for heldout in ("heldout", "heldout_combinations"):
            measured = steps[f"evaluate[heldout={heldout},method={method},seed=0]"]["result"]
            assert 0 <= measured["mean_recall@1"] <= measured["mean_recall@10"] <= 1
    # The control is the reference once more: the same pairs in the same order from the same weights.
    curated, reference = (steps[i]["result"] for i in ("train[method=curated only,seed=0]", "reference[seed=0]"))
    assert curated["final_loss"] == reference["final_loss"]
    text = render(tmp_path / "run").read_text(encoding="utf-8")
    check_page(text)
    said = words(text)
    assert 'class="notice"' not in text
    for piece in (
        *methods,
        "new combinations",
        "Retrieval while it trains",
        "Clean pairs in the batch",
        "JEST: the first",
    ):
        assert piece in said, piece
    assert len(re.findall("<img", text)) >= 2 * 7 + 2 * 2 * 6
