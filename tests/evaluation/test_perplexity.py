"""The perplexity verb: lm-eval's layout, exact counts, one sentence for what is wrong."""

import json
import math

import pytest
import torch

from modelwright.errors import UserError
from modelwright.evaluation.perplexity import Totals, perplexity
from modelwright.models.loading import save_model
from modelwright.models.scoring import DocumentScore
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.perplexity import Perplexity

TEXTS = ["one document", "a second, läng", "third " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    save_model(tiny_model("llama"), byte_tokenizer(), folder / "model")
    save_model(tiny_model("llama"), None, folder / "without")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder


def run(folder, tmp_path, **options):
    options = {"model": str(folder / "model"), "data": [str(folder / "data.jsonl")], "device": "cpu", **options}
    return Perplexity(output=tmp_path / "out.json", **options).run(Silent())


def test_result_file_samples_and_summary_agree(folder, tmp_path):
    found = run(folder, tmp_path, samples=tmp_path / "samples.jsonl", name="mine", window=32)
    written = json.loads((tmp_path / "out.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    nats = -sum(row["log_probability"] for row in rows)
    length = sum(len(t.encode()) for t in TEXTS)
    assert found["bytes"] == found["tokens"] == sum(row["bytes"] for row in rows) == length
    assert found["bits_per_byte"] == pytest.approx(nats / length / math.log(2), rel=1e-12)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nats / length))
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / sum(len(t.split()) for t in TEXTS)))
    assert written["results"]["mine"]["bits_per_byte,none"] == found["bits_per_byte"]
    assert written["results"]["mine"]["bits_per_byte_stderr,none"] == found["bits_per_byte_stderr"] > 0
    assert written["n-samples"]["mine"] == {"original": 3, "effective": 3}
    assert written["config"]["model_args"]["parameters"] == 35168
    same = perplexity(tiny_model("llama"), byte_tokenizer(), TEXTS, task="mine", window=32)
    assert same["results"] == written["results"]


def test_standard_error_is_that_of_the_ratio():
    """Against the spread over many draws of documents."""
    generator = torch.Generator().manual_seed(0)
    ratios, errors = [], []
    for _ in range(400):
        totals = Totals()
        for length in torch.randint(10, 200, (60,), generator=generator).tolist():
            nats = length * (1 + 0.3 * torch.randn(1, generator=generator).item())
            totals.add(DocumentScore(-nats, length, length, length))
        metrics = totals.metrics()
        ratios.append(metrics["bits_per_byte"])
        errors.append(metrics["bits_per_byte_stderr"])
    assert torch.tensor(errors).mean() == pytest.approx(torch.tensor(ratios).std().item(), rel=0.1)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_probability_that_is_not_finite_is_refused(value):
    totals = Totals()
    totals.add(DocumentScore(-1.0, 1, 1, 1))
    with pytest.raises(UserError, match="document 2"):
        totals.add(DocumentScore(value, 1, 1, 1))


def test_samples_do_not_stay_without_results(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("modelwright.files.write_json", _full)
    with pytest.raises(OSError, match="full"):
        run(folder, tmp_path, samples=tmp_path / "samples.jsonl")
    assert list(tmp_path.iterdir()) == []


def _full(*_, **__):
    raise OSError("full")


def test_one_document_has_no_standard_error(folder, tmp_path):
    assert run(folder, tmp_path, limit=1)["bits_per_byte_stderr"] is None
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"]["perplexity"]["bits_per_byte_stderr,none"] == "N/A"


def test_faults(folder, tmp_path):
    with pytest.raises(UserError, match="no tokenizer.*--tokenizer"):
        run(folder, tmp_path, model=str(folder / "without"))
    assert run(folder, tmp_path, model=str(folder / "without"), tokenizer=str(folder / "model"))["documents"] == 3
    with pytest.raises(UserError, match="--force"):
        run(folder, tmp_path)
    with pytest.raises(UserError, match="window of 4096"):
        run(folder, tmp_path, window=4096, force=True)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="empty"):
        run(folder, tmp_path, data=[str(tmp_path / "empty.jsonl")], force=True)
    assert json.loads((tmp_path / "out.json").read_text())["counts"]["documents"] == 3
