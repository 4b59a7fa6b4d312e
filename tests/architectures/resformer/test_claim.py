"""The claim: same data for every variant, deterministic, and every number measured."""

import dataclasses

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from modelwright.architectures.resformer import claim
from modelwright.architectures.resformer.diagnostics import attention_concentration


@dataclasses.dataclass
class Here:
    scale: str = "miniature"
    device: str = "cpu"
    folder: None = None

    def report(self, message: str) -> None:
        pass


def test_miniature_measures_every_variant_and_repeats_exactly():
    prepared = claim.prepare(Here())
    assert set(prepared["learning_rates"]) == set(claim.VARIANTS)
    assert all(len(tried) == len(prepared["grid"]) for tried in prepared["validation_bits_per_byte"].values())
    measured = claim.run(Here(), 0, prepared)
    assert set(measured) == set(claim.VARIANTS)
    assert all(set(values) == set(claim.CLAIM.metrics) for values in measured.values())
    assert measured == claim.run(Here(), 0, prepared)
    assert measured != claim.run(Here(), 1, prepared)
    assert measured["svformer"]["cache"] == 3 / 4  # (N + 1) / 2N of 2 layers
    assert measured["cla2"]["cache"] == measured["gqa"]["cache"] == 1 / 2
    assert measured["resformer"]["cache"] == 1


def test_the_best_rate_is_chosen():
    prepared = claim.prepare(Here())
    for variant, rate in prepared["learning_rates"].items():
        tried = prepared["validation_bits_per_byte"][variant]
        assert tried[f"{rate:g}"] == min(tried.values())


def test_the_tuning_seed_is_not_a_seed_of_the_claim():
    for seeds in claim.CLAIM.seeds.values():
        assert claim.TUNING_SEED not in seeds


@pytest.mark.parametrize("scale", ["miniature", pytest.param("cpu", marks=pytest.mark.slow)])
def test_validation_is_of_other_files_and_counts_bytes(scale):
    setting = claim.SETTINGS[scale]
    data = claim._data(setting, 0)
    assert data.validation.shape[1] == setting.length + 1
    assert int(data.train.max()) < setting.vocabulary
    # Every training sequence fits: there is more text than one window.
    assert len(data.train) > 10 * setting.length
    train = " ".join(map(str, data.train.tolist()))
    shared = sum(" ".join(map(str, row[:20])) in train for row in data.validation.tolist())
    assert shared <= 0.1 * len(data.validation)


def test_bits_per_byte_is_the_definition():
    setting = claim.SETTINGS["miniature"]
    data = claim._data(setting, 0)
    model = claim.build("resformer", setting, 0).eval()
    nats = size = 0.0
    for row in data.validation:
        logits = model(row[:-1].unsqueeze(0)).logits[0].detach().double().log_softmax(-1)
        nats -= float(logits.gather(-1, row[1:, None]).sum())
        size += float(data.widths[row[1:]].sum())
    assert claim._bits_per_byte(model, data, "cpu") == pytest.approx(
        nats / size / torch.log(torch.tensor(2.0)).item(), rel=1e-5
    )


def test_the_entropy_is_that_of_the_last_two_layers():
    setting = dataclasses.replace(
        claim.SETTINGS["miniature"], shape={**claim.SETTINGS["miniature"].shape, "num_hidden_layers": 4}
    )
    model = claim.build("resformer", setting, 0).eval()
    ids = torch.randint(setting.vocabulary, (4, 25), generator=torch.Generator().manual_seed(0))
    layers = attention_concentration(model, ids[:, :-1]).entropy_by_layer
    assert len(set(layers)) == 4
    assert claim._deep_entropy(model, ids, "cpu") == pytest.approx((layers[2] + layers[3]) / 2)


def test_training_warms_up_and_falls_to_a_tenth_without_decay_of_coefficients():
    setting = dataclasses.replace(claim.SETTINGS["miniature"], steps=40)
    rates, spared = [], []

    def record(optimizer, *_):
        rates.append({group["lr"] for group in optimizer.param_groups})
        spared.append({len(p.shape) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]})

    handle = register_optimizer_step_pre_hook(record)
    try:
        # DenseFormer's coefficients are a matrix, which a rule by shape alone would let decay.
        claim._trained("denseformer", setting, 0, 1e-2, torch.arange(200) % setting.vocabulary, "cpu")
    finally:
        handle.remove()
    assert all(len(rate) == 1 for rate in rates)
    values = [rate.pop() for rate in rates]
    peak = values.index(max(values))
    assert values[peak] == pytest.approx(1e-2)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[0] < 0.5e-2
    assert 1e-3 <= values[-1] < 1.2e-3
    assert all(dimensions == {1, 2} for dimensions in spared)
