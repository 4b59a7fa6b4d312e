import mmap
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from modelwright.errors import UserError
from modelwright.training.inf_cl import claim, measure
from modelwright.verify.worker import check_measurements


def test_the_claim_runs_in_miniature_and_is_deterministic(tmp_path):
    context = SimpleNamespace(scale="miniature", device="cpu", folder=tmp_path, report=lambda message: None)
    prepared = claim.prepare(context)
    assert set(prepared["rates"]) == {str(batch) for batch in claim.BATCHES}
    first, again = (claim.run(context, 0, prepared) for _ in range(2))
    check_measurements(claim.CLAIM, first)
    for values in (first, again):
        for metrics in values.values():
            for measured in ("memory", "seconds", "log_memory", "log_seconds"):
                metrics.pop(measured, None)
    assert first == again


def test_every_variant_is_the_same_loss():
    pair = measure.features(50, 8, dtype=torch.float64)
    losses = [
        measure.make_loss(v)(*pair, torch.tensor(9.0).double()) for v in ("full", "tiled", "two-calls", "chunks-7")
    ]
    gradients = [torch.autograd.grad(loss, pair) for loss in losses]
    for loss, gradient in zip(losses[1:], gradients[1:]):
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-14)
    with pytest.raises(UserError, match="'half' is not known"):
        measure.make_loss("half")


def test_the_gradients_error_is_of_float32_and_sees_a_wrong_gradient(monkeypatch):
    assert 1e-9 < claim.gradient_error("tiled", 64, 8, 0) < 1e-5
    monkeypatch.setattr(measure, "tiled_contrastive_loss", lambda *pair: 1.01 * measure.full_matrix(*pair))
    assert claim.gradient_error("tiled", 64, 8, 0) == pytest.approx(0.01, rel=1e-2)


def test_towers_learn_and_see_the_same_pairs_whatever_the_batch():
    setting = replace(claim.SETTINGS["miniature"], samples=4096, heldout=64)
    chance = 1 / 64
    assert claim.recall(setting, 128, 0.003, 0) > 5 * chance
    assert claim.recall(setting, 32, 0.003, 0) > 5 * chance
    assert claim.recall(setting, 128, 0.0, 0) < 5 * chance  # no learning without a rate


@pytest.mark.slow
def test_memory_and_time_are_measured_in_a_process_of_its_own():
    full = measure.in_fresh_process("full", 2000, 8)
    tiled = measure.in_fresh_process("tiled", 2000, 8)
    matrix = 2000 * 2000 * 4 / 2**20
    assert full["extra_mib"] > 2 * matrix
    assert 0 <= tiled["extra_mib"] < matrix
    assert full["loss"] == pytest.approx(tiled["loss"], rel=1e-5)
    assert tiled["seconds"] > 0
    with pytest.raises(UserError, match="'half' at batch 4 ended with code 1: .*is not known"):
        measure.in_fresh_process("half", 4, 4)


@pytest.mark.parametrize("resettable", [True, False])
def test_the_peak_of_memory_is_seen(resettable, monkeypatch):
    looks, read = [], measure.Path.read_text
    monkeypatch.setattr(measure.Path, "read_text", lambda path: (read(path), looks.append(path))[0])
    if not resettable:

        def refuse(*arguments):
            raise OSError

        monkeypatch.setattr(measure.Path, "write_text", refuse)
    # Asked of the system itself: malloc may hand out memory that an earlier test has returned to it.
    with measure.peak_memory() as peak, mmap.mmap(-1, 2**25) as big:
        for page in range(0, len(big), mmap.PAGESIZE):
            big[page] = 1
        before = len(looks)
        while not resettable and len(looks) < before + 2:  # a look that began when all pages were there
            time.sleep(0.001)
    assert peak.mib >= 30


@pytest.mark.parametrize("bar", claim.CLAIM.bars, ids=lambda b: b.statement)
def test_bars_name_what_is_measured(bar):
    assert {bar.method, bar.baseline} <= set(claim.CLAIM.variants)
    assert bar.metric in claim.CLAIM.metrics


def test_the_bars_are_those_asked_for():
    margins = {(bar.baseline, bar.metric): 2**bar.margin for bar in claim.CLAIM.bars if bar.metric.startswith("log")}
    assert margins["full", "log_memory"] == pytest.approx(40)
    assert margins["full", "log_seconds"] == pytest.approx(2.5)
    assert margins["two-calls", "log_seconds"] == pytest.approx(1.5)
