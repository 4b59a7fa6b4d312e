"""The claim: what it draws, that it is deterministic, and that every variant is what it is called."""

import dataclasses

import pytest
import torch

from modelwright.attention.string import claim
from modelwright.verify.runner import check_claim


@dataclasses.dataclass
class Here:
    scale: str = "miniature"
    device: str = "cpu"
    folder: None = None

    def report(self, message: str) -> None:
        pass


SMALL = dataclasses.replace(claim.SETTINGS["miniature"], length=60, tests=200)


def test_miniature_measures_every_variant_and_repeats_exactly():
    check_claim(claim.CLAIM)
    measured = claim.run(Here(), 0, {})
    assert list(measured) == list(claim.VARIANTS)
    assert all(list(values) == list(claim.CLAIM.metrics) for values in measured.values())
    assert measured == claim.run(Here(), 0, {})
    assert measured != claim.run(Here(), 1, {})


@pytest.mark.parametrize("depth", [None, *claim.DEPTHS.values()])
def test_sequences(depth):
    batch = claim.sequences(SMALL, 300, 60, torch.Generator().manual_seed(0), depth)
    assert (batch.kind == 1).sum(1).tolist() == [SMALL.needles] * 300
    assert (batch.kind == 2).nonzero()[:, 1].tolist() == [59] * 300
    places = []
    for kind, key, value, answer in zip(batch.kind, batch.key, batch.value, batch.answer, strict=True):
        needles = (kind == 1).nonzero()[:, 0]
        keys = key[needles]
        assert len(keys.unique()) == SMALL.needles  # so a question has one answer
        asked = needles[keys == key[-1]]
        assert len(asked) == 1
        assert value[asked[0]] == answer
        places.append(int(asked[0]))
    share = torch.tensor(places) / 59
    low, high = depth or (0, 1)
    assert low <= share.min() < low + 0.1
    assert high - 0.1 < share.max() <= high
    # Neither the question's value nor the commonest value gives the answer away.
    assert float((batch.value[:, -1] == batch.answer).float().mean()) < 3 / SMALL.keys


def test_tests_are_shared_by_variants_and_trained_lengths_are_skewed(monkeypatch):
    lengths = []
    draw = claim.sequences

    def record(setting, rows, length, generator, depth=None):
        lengths.append(length)
        return draw(setting, rows, length, generator, depth)

    monkeypatch.setattr(claim, "sequences", record)
    setting = dataclasses.replace(SMALL, steps=300, length=192, batch=1, full_batch=1, hidden=8)
    claim.trained(setting, 0, skewed=True, device="cpu")
    assert len(lengths) == 300
    assert sum(length >= 128 for length in lengths) / 300 < 0.25
    assert min(lengths) == claim.SHORTEST
    lengths.clear()
    claim.trained(dataclasses.replace(setting, steps=9), 0, skewed=False, device="cpu")
    assert lengths[3:] == [192] * 6
    assert max(lengths[:3]) < 192


@torch.no_grad()
def test_every_variant_changes_the_model_and_leaves_it(monkeypatch):
    model = claim.build(SMALL).eval()
    batch = claim.sequences(SMALL, 4, 60, torch.Generator().manual_seed(0))
    plain = model(batch, "cpu")
    outputs = {"rope": plain}
    for variant in claim.VARIANTS:
        with claim.changed(model.llama, SMALL, variant):
            outputs[variant] = model(batch, "cpu")
        assert torch.equal(model(batch, "cpu"), plain), variant
    same = {name for name, found in outputs.items() if torch.allclose(found, plain, atol=1e-7)}
    assert same == {"rope", "flat"}
    assert torch.equal(outputs["string"], outputs["flat_string"])
    different = [name for name in outputs if name not in {"flat", "flat_string"}]
    for i, first in enumerate(different):
        for second in different[i + 1 :]:
            assert not torch.equal(outputs[first], outputs[second]), (first, second)


def test_a_perfect_and_a_blind_reader():
    class Fixed(torch.nn.Module):
        def __init__(self, right):
            super().__init__()
            self.llama = claim.build(SMALL).llama
            self.right = right

        def forward(self, batch, device):
            found = batch.answer if self.right else (batch.answer + 1) % SMALL.keys
            return torch.nn.functional.one_hot(found, SMALL.keys).float()

    assert set(claim.accuracy(Fixed(True), SMALL, 0, "string", "cpu").values()) == {1.0}
    assert set(claim.accuracy(Fixed(False), SMALL, 0, "rope", "cpu").values()) == {0.0}
