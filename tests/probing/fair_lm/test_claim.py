"""The claim: same data for every variant, deterministic, every number measured, and the right parts decay."""

import dataclasses

import numpy as np
import pytest
import torch

from modelwright.probing.fair_lm import claim
from modelwright.probing.fair_lm.decay import decay_groups


@dataclasses.dataclass
class Here:
    scale: str = "miniature"
    device: str = "cpu"
    folder: None = None

    def report(self, message: str) -> None:
        pass


@pytest.mark.slow
def test_miniature_measures_every_variant_and_repeats_exactly():
    prepared = claim.prepare(Here())
    tried = prepared["training_loss"]["decay_0"]
    assert tried[f"{prepared['learning_rate']:g}"] == min(tried.values())
    target, dropouts = prepared["training_loss"]["decay_1"], prepared["training_loss"]["dropout"]
    nearest = min(dropouts.values(), key=lambda loss: abs(loss - target))
    assert dropouts[f"{prepared['dropout']:g}"] == nearest
    assert prepared["smoothing"] == 0.1
    measured = claim.run(Here(), 0, prepared)
    assert set(measured) == set(claim.VARIANTS)
    for variant, values in measured.items():
        assert set(values) | {"equal_balanced"} == set(claim.CLAIM.metrics), variant
    for name in ("average_over", "balanced_over", "rare_over", "frequent_over", "uneven", "rare_uneven"):
        assert measured["decay_0"][name] == 1
    assert measured["decay_0"]["sum_lr_lambda"] == measured["dropout"]["sum_lr_lambda"] == 0
    assert measured["decay_1"]["sum_lr_lambda"] == pytest.approx(10 * measured["decay_0.1"]["sum_lr_lambda"])
    assert measured == claim.run(Here(), 0, prepared)


def test_the_tuning_seed_is_not_a_seed_of_the_claim():
    for seeds in claim.CLAIM.seeds.values():
        assert claim.TUNING_SEED not in seeds


def test_the_text_is_a_zipf_law_and_held_out_text_another_draw_of_it():
    setting = claim.SETTINGS["cpu"]
    data, other = claim._data(setting, 0), claim._data(setting, 1)
    assert {name: blocks.shape for name, blocks in data.splits.items()} == {"train": (100, 24), "heldout": (100, 24)}
    np.testing.assert_array_equal(data.splits["train"].ravel(), data.train)
    assert (data.splits["train"] != data.splits["heldout"]).mean() > 0.5
    assert (data.train != other.train).any()
    counts = np.bincount(data.train, minlength=setting.types)
    assert counts[0] / counts[1] == pytest.approx(2**1.2, rel=0.2)


def test_what_decays_is_what_the_variant_says():
    model = claim.build(claim.SETTINGS["miniature"], 0)
    assert not model.config.tie_word_embeddings
    for variant, (value, on) in claim.DECAYS.items():
        decayed = {g["name"] for g in decay_groups(model, value, on) if g["weight_decay"]}
        expected = {"all": {"embeddings", "head", "body", "rest"}}.get(on, {on}) if value else set()
        assert decayed == expected, variant


def test_dropout_and_smoothing_are_on():
    setting = claim.SETTINGS["miniature"]
    model = claim.build(setting, 0, dropout=0.5).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    plain = claim.build(setting, 0).eval()
    smooth = claim.build(setting, 0).eval()
    smooth.loss_function = claim._smoothed(0.2)
    logits = plain(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], label_smoothing=0.2)
    torch.testing.assert_close(smooth(ids, labels=ids).loss, expected)
    assert smooth(ids, labels=ids).loss != plain(ids, labels=ids).loss
    torch.testing.assert_close(smooth(ids).logits, logits)


@pytest.mark.slow
def test_the_gpus_text_is_of_other_files_for_held_out():
    setting = dataclasses.replace(
        claim.SETTINGS["gpu"], types=400, world={"pool_chunks": 60, "target_chunks": 1, "heldout_chunks": 1}
    )
    data = claim._data(setting, 0)
    assert data.train.max() < 400
    assert all(len(blocks) for blocks in data.splits.values())
