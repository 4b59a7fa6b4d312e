from types import SimpleNamespace

import numpy as np
import pytest

from modelwright.curation.zip_fit import claim
from modelwright.verify.worker import check_measurements
from modelwright.worlds.domains import domains


def test_the_claim_runs_in_miniature_and_is_deterministic(tmp_path):
    context = SimpleNamespace(scale="miniature", device="cpu", folder=tmp_path, report=lambda message: None)
    prepared = claim.prepare(context)
    assert set(prepared["rates"]) == set(claim.VARIANTS)
    first, again = (claim.run(context, 0, prepared) for _ in range(2))
    check_measurements(claim.CLAIM, first)
    for values in (first, again):
        for metrics in values.values():
            del metrics["seconds"]
    assert first == again
    assert first["oracle"]["precision"] == first["oracle"]["byte_precision"] == 1
    assert 0 <= first["zip-fit"]["r_squared"] <= 1


def test_the_model_learns():
    setting = claim.SETTINGS["miniature"].__class__({}, 8, 32, 60, 8, 32, (0.02,))
    text = b"abcdefgh" * 200
    assert claim.cross_entropy(text, text, setting, 0.02, 0) < 1 < np.log(256)


def test_every_selection_has_as_many_bytes():
    world = domains(5, pool_size=60, target_size=5)
    sizes = {len(claim._training_text(world, claim.rank(v, world, 5)[0])) for v in ("zip-fit", "random", "oracle")}
    assert len(sizes) == 1
    in_domain = [row["text"] for row in world.pool if row["kind"] == "target"]
    assert sizes == {sum(len(text.encode()) + 1 for text in in_domain)}


@pytest.mark.parametrize("bar", claim.CLAIM.bars, ids=lambda b: b.statement)
def test_bars_name_what_is_measured(bar):
    assert {bar.method, bar.baseline} <= set(claim.CLAIM.variants)
    assert bar.metric in claim.CLAIM.metrics
