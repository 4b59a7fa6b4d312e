"""`modelwright prune …` as verbs and as a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import kill_when, modelwright
from modelwright.data import write_rows
from modelwright.errors import UserError
from modelwright.models.loading import load_model, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs import load_verb

TEXTS = [f"Sentence number {i} of a text that nobody would read, but a model may. " * 6 for i in range(20)]


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model("llama", tie_word_embeddings=True), byte_tokenizer(), "model")
    write_rows("data.jsonl", [{"text": text} for text in TEXTS])
    write_rows("other.jsonl", [{"text": "Quite another text: 1, 2, 3."}, {"text": "def f(x): return x + 1"}])


def prune(name: str = "disp-llm", progress: Any = None, **options: Any) -> dict[str, Any]:
    given = {
        "model": "model", "data": ["data.jsonl"], "output": Path("small"), "block_size": 32, "batch_size": 2,
        "speed_length": 16,
    }  # fmt: skip
    if name == "disp-llm":
        given |= {"steps": 6, "lr": 1e-2, "save_every": 2}
    result = load_verb(f"prune {name}")(**(given | options)).run(progress or Silent())
    return json.loads(json.dumps(result, allow_nan=False))


def test_a_pruned_model_and_its_report() -> None:
    progress = Lines()
    result = prune(progress=progress, compare=True, test=["other.jsonl"])
    total = sum(p.numel() for n, p in load_model("model").named_parameters() if ".layers." in n and p.ndim == 2)
    assert 0.48 < result["ratio"] <= 0.5
    assert result["block_parameters"] <= total / 2
    small = load_model("small")
    assert sum(p.numel() for p in small.parameters()) == result["parameters"] < result["parameters_before"]
    assert any("step 6" in line and "kept in each block" in line for line in progress.lines)
    report = json.loads(Path("small/pruning.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["dense", "disp-llm", "magnitude", "wanda", "slicegpt", "random"]
    assert len(report["history"]) == 6
    assert report["widths"] == small.config.widths
    for row in report["rows"]:
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
        assert row["perplexity"] > 1
    assert report["rows"][1]["weight_bytes"] < report["rows"][0]["weight_bytes"]
    html = Path("small/pruning.html").read_text()
    for word in ("MLP units", "block 1", "slicegpt", "other.jsonl", "weights, MiB", "<svg"):
        assert word in html
    assert not Path("small.search").exists()
    assert any(line.startswith("block 1: attention reads") for line in progress.lines)
    with pytest.raises(UserError, match="exists already"):
        prune()
    load_verb("convert")(architecture="plain", model="small", output=Path("plain")).run(Silent())
    plain, ids = load_model("plain"), torch.arange(3, 20)[None]
    assert plain.config.model_type == "llama"
    assert torch.allclose(plain(input_ids=ids).logits, small(input_ids=ids).logits, atol=1e-5)


def test_few_documents_are_all_read_and_the_report_says_so() -> None:
    write_rows("few.jsonl", [{"text": text} for text in TEXTS[:4]])
    prune("random", data=["few.jsonl"])
    assert "calibration text itself, which flatters" in Path("small/pruning.html").read_text()


@pytest.mark.parametrize("name", ["magnitude", "wanda", "slicegpt", "random"])
def test_methods_without_a_search(name: str) -> None:
    result = prune(name)
    assert 0.44 < result["ratio"] <= 0.5
    ids = torch.arange(3, 20)[None]
    assert torch.isfinite(load_model("small")(input_ids=ids).logits).all()
    assert "2 documents" in Path("small/pruning.html").read_text()


def test_tasks_before_and_after(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", [{"q": "a", "choices": ["b", "c"], "answer": i % 2} for i in range(4)])
    (folder / "own.yaml").write_text(
        f"task: own_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    prune("random", tasks=["own_choice"], include_path=[str(folder)])
    report = json.loads(Path("small/pruning.json").read_text())
    assert all(0 <= row["tasks"]["own_choice"]["acc"] <= 1 for row in report["rows"])
    assert "own_choice, acc" in Path("small/pruning.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"block_size": 500, "data": ["other.jsonl"]}, "fewer than one block of 500"),
        ({"block_size": 600}, "longer than the model's context"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"save_every": 0}, "--save-every must be"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"round_to": 64}, "multiples of 64: give 1 to 32"),
        ({"name": "wanda", "balance": float("nan")}, "balance is a share"),
        ({"model": "nowhere"}, "does not exist"),
        ({"data": ["nowhere.jsonl"]}, "does not exist"),
    ],
)
def test_bad_input_leaves_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(**options)
    assert sorted(p.name for p in Path().iterdir()) == ["data.jsonl", "model", "other.jsonl"]


def test_another_family_is_refused_before_any_work() -> None:
    save_model(tiny_model("mamba2"), byte_tokenizer(), "mamba")
    with pytest.raises(UserError, match="cannot be pruned in width"):
        prune(model="mamba")


def test_a_nan_in_the_weights_stops_it() -> None:
    model = load_model("model")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    save_model(model, byte_tokenizer(), "broken")
    with pytest.raises(UserError, match="The loss is nan at step 1"):
        prune(model="broken")
    assert not Path("small").exists()


@pytest.mark.slow
def test_killed_in_the_search_it_goes_on(tmp_path: Path) -> None:
    prune(output=Path("whole"), steps=40)
    kill_when(Path("small.search").exists, lambda: prune(steps=40))
    assert Path("small.search").exists()
    assert not Path("small").exists()
    with pytest.raises(UserError, match="unfinished search with other options"):
        prune(steps=40, lr=2e-2)
    progress = Lines()
    prune(steps=40, progress=progress)
    assert "of 40 steps were done before" in progress.lines[0]
    assert Path("small/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_on_the_command_line_a_bad_ratio_is_one_sentence() -> None:
    line = "prune disp-llm --model model --data data.jsonl --ratio 1.5 --output small"
    done = modelwright(*line.split())
    assert done.returncode == 2
    assert "between 0 and 1, not 1.5" in done.stderr
    assert "Traceback" not in done.stderr
