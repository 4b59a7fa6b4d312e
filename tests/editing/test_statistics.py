import pytest
import torch

from modelwright.data import Records
from modelwright.editing import KeyStatistics
from modelwright.editing.deltas import LowRank
from modelwright.editing.edit import WeightEdit
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

TEXTS = [f"{i}: " + "some words of a text " * (i % 7) for i in range(1, 100)]
TOKENIZER = byte_tokenizer()


def slow_gram(model, texts, layer, window):
    keys = []
    down = roles(model).layers[layer].down.module
    handle = down.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0].double()))
    for text in texts:
        ids = TOKENIZER(text)["input_ids"]
        for start in range(0, len(ids), window):
            with torch.no_grad():
                model(torch.tensor([ids[start : start + window]]))
    handle.remove()
    keys = torch.cat(keys)
    return keys.T @ keys, len(keys)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba2"])
def test_the_gram_is_that_of_one_text_at_a_time(family):
    model = tiny_model(family)
    found = KeyStatistics.collect(model, TOKENIZER, TEXTS[:20], [0, 1], window=40, batch_tokens=256)
    for layer in (0, 1):
        gram, count = slow_gram(model, TEXTS[:20], layer, 40)
        assert found.count == count
        assert torch.allclose(found.grams[layer].double(), gram, rtol=1e-4, atol=1e-5 * float(gram.max()))
    assert torch.equal(found.covariance(1), found.grams[1] / found.count)
    # The model still runs whole.
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_of_a_wide_gram_half_is_computed_and_the_rest_is_its_mirror(tmp_path, monkeypatch):
    from modelwright.editing import statistics

    model, options = tiny_model("llama"), {"layers": [0, 1], "batch_tokens": 256}
    plain = KeyStatistics.collect(model, TOKENIZER, TEXTS, **options)
    monkeypatch.setattr(statistics, "_STRIP", 10)
    assert len(statistics._strips(len(plain.grams[0]))) > 3
    # It is written, and goes on, after each group of documents.
    found = KeyStatistics.collect(
        model, TOKENIZER, TEXTS, **options, path=tmp_path / "keys.safetensors", save_seconds=-1
    )
    for layer in (0, 1):
        first = statistics._strips(len(found.grams[layer]))[0].stop
        assert torch.equal(found.grams[layer][first:, :first], found.grams[layer][:first, first:].T)
        assert torch.allclose(found.grams[layer], plain.grams[layer], rtol=1e-4, atol=1e-6 * plain.count)


def test_it_stops_at_the_number_of_tokens():
    model = tiny_model("llama")
    assert KeyStatistics.collect(model, TOKENIZER, TEXTS, [0], n_tokens=777).count == 777


def test_killed_and_continued_it_is_the_same(tmp_path, monkeypatch):
    model = tiny_model("llama")
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS * 2):
        (folder / f"{i:03}.txt").write_text(text)
    options = {"layers": [0, 1], "n_tokens": 10_000, "batch_tokens": 512}
    whole = KeyStatistics.collect(model, TOKENIZER, folder, **options, path=tmp_path / "whole.safetensors")
    from modelwright.editing import statistics

    calls, add = [], statistics._add

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(statistics, "_add", dies)
    path = tmp_path / "part.safetensors"
    with pytest.raises(KeyboardInterrupt):
        KeyStatistics.collect(model, TOKENIZER, folder, **options, path=path, save_seconds=0)
    part = KeyStatistics.load(path)
    assert 0 < part.count < whole.count
    assert not part.complete
    monkeypatch.setattr(statistics, "_add", add)
    resumed = KeyStatistics.collect(model, TOKENIZER, folder, **options, path=path)
    assert resumed.count == whole.count
    assert all(torch.equal(resumed.grams[n], whole.grams[n]) for n in (0, 1))
    with pytest.raises(UserError, match="other text"):
        KeyStatistics.collect(model, TOKENIZER, Records(folder, encoding_errors="replace"), **options, path=path)
    with pytest.raises(UserError, match="the layers 0, 1"):
        KeyStatistics.collect(model, TOKENIZER, folder, [0], path=path)
    with pytest.raises(UserError, match="another model"):
        KeyStatistics.collect(tiny_model("llama", seed=1), TOKENIZER, folder, [0, 1], path=path)


def test_saved_loaded_and_checked(tmp_path):
    model = tiny_model("llama")
    found = KeyStatistics.collect(model, TOKENIZER, TEXTS, [1])
    found.save(tmp_path / "s.safetensors")
    loaded = KeyStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.grams[1], found.grams[1])
    assert (loaded.count, loaded.fingerprint, loaded.documents) == (found.count, found.fingerprint, 99)
    loaded.check(model, [1])
    with pytest.raises(UserError, match="no key statistics of layer 0"):
        loaded.check(model, [0])
    with pytest.raises(UserError, match="of another model"):
        loaded.check(tiny_model("llama", seed=1), [1])
    (tmp_path / "bad.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="damaged"):
        KeyStatistics.load(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        KeyStatistics.load(tmp_path / "none.safetensors")


def test_they_are_of_the_model_below_its_edits():
    model = tiny_model("llama")
    base = KeyStatistics.collect(model, TOKENIZER, TEXTS, [0, 1])
    delta = LowRank(torch.randn(32, 1), torch.randn(1, 64))
    name = "model.layers.0.mlp.down_proj.weight"
    edit = WeightEdit("test", model_fingerprint(model, whole=[name]), {name: delta})
    with edit.applied(model):
        base.check(model, [0, 1])
        again = KeyStatistics.collect(model, TOKENIZER, TEXTS, [0, 1])
    assert torch.equal(again.grams[1], base.grams[1])


def test_the_solution_solves():
    model = tiny_model("llama")
    found = KeyStatistics.collect(model, TOKENIZER, TEXTS, [1])
    rhs = torch.randn(64, 3)
    matrix = found.covariance(1).double()
    ridged = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.allclose(ridged @ found.solve(1, rhs, ridge=0.1), rhs.double(), atol=1e-9)
    few = KeyStatistics.collect(model, TOKENIZER, TEXTS, [1], n_tokens=20)
    with pytest.raises(UserError, match="are singular .* collect more text, or give a ridge"):
        few.solve(1, rhs)
    few.solve(1, rhs, ridge=0.01)
    with pytest.raises(UserError, match="ridge is -1"):
        few.solve(1, rhs, ridge=-1)


def test_errors():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="no layer 2"):
        KeyStatistics.collect(model, TOKENIZER, TEXTS, [2])
    with pytest.raises(UserError, match="hold no tokens"):
        KeyStatistics.collect(model, TOKENIZER, [""], [1])
    with pytest.raises(UserError, match="no MLP"):
        KeyStatistics.collect(tiny_model("mamba2"), TOKENIZER, TEXTS, [0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": []}, "at least one layer"),
        ({"n_tokens": 0}, "one token"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"layers": [9]}, "no layer 9"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        KeyStatistics.collect(tiny_model("llama"), TOKENIZER, ["some text"], **{"layers": [0], **keys})
