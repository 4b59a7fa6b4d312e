"""The sweep: trained by the house's frame, resumed after a kill, and compared honestly."""

import json

import numpy as np
import pytest
import torch

from forked import kill_when
from modelwright.errors import UserError
from modelwright.models.loading import load_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.probing.fair_lm import TokenCounts, TokenLossReport, measure_blocks
from modelwright.probing.fair_lm.sweep_compare import at_training_loss, compare_lambdas
from modelwright.probing.fair_lm.sweep_run import checkpoint_steps, count_blocks, pick_blocks
from modelwright.progress import Silent
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.packing import tokenize
from modelwright.verbs.sweep_weight_decay import WeightDecay

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    rows = [{"text": f"document {i} says {i * i % 17}\n" * 2} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    byte_tokenizer().save_pretrained(folder / "tok")
    return folder


def verb(folder, output, **keys):
    options = {
        "data": [str(folder / "data.jsonl")],
        "tokenizer": str(folder / "tok"),
        "architecture": "llama",
        "set": {**SIZES, "attention_dropout": 0.2, "tie_word_embeddings": False},
        "lambdas": [0.0, 3.0],
        "seeds": [0, 1],
        "steps": 12,
        "batch_size": 4,
        "block_size": 24,
        "learning_rate": 1e-2,
        "checkpoints": 3,
        "device": "cpu",
    }
    return WeightDecay(output=output, **{**options, **keys})


@pytest.fixture(scope="module")
def swept(folder):
    found = verb(folder, folder / "whole", keep_models=True).run(Silent())
    return folder / "whole", found, json.loads((folder / "whole" / "result.json").read_text())


def test_the_folder_has_everything_and_the_work_is_gone(folder, swept):
    path, found, result = swept
    assert {p.name for p in path.iterdir()} == {"result.json", "report.html", "counts.parquet", "runs"}
    names = [f"lambda-{value}-seed-{seed}" for value in (0, 3) for seed in (0, 1)]
    endings = [".json", ".train.parquet", ".heldout.parquet", ".model"]
    assert {p.name for p in (path / "runs").iterdir()} == {n + e for n in names for e in endings}
    assert [p.name for p in folder.iterdir() if "training" in p.name] == []
    assert [row["lambda"] for row in found["rows"]] == [0, 3]
    assert found["reference"] == 0
    assert all(("train" in row) and ("heldout" in row) and row["seeds"] == 2 for row in result["rows"])
    assert result["rows"][0]["train"]["delta"]["balanced"] == 0
    assert result["rows"][0]["sum_lr_lambda"] == 0
    assert result["rows"][1]["sum_lr_lambda"] > 0
    assert len(found["answers"]) == 2
    assert "On held-out text" in found["answers"][1]


def test_the_page_shows_both_texts_and_what_decayed(swept):
    html = (swept[0] / "report.html").read_text()
    for said in (
        "Training text", "Held-out text", "At equal training loss", "sum of lr", "norms, biases, other vectors",
        "slope", "token-balanced", "speed gap", "<svg",
    ):  # fmt: skip
        assert said in html, said
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_a_kept_model_has_the_losses_that_are_reported(folder, swept):
    path, _, result = swept
    report = TokenLossReport.from_parquet(path / "runs" / "lambda-3-seed-1.heldout.parquet")
    run = next(r for r in result["runs"] if (r["lambda"], r["seed"]) == (3, 1))
    assert run["curve"][-1]["heldout"]["average"] == report.average
    texts = [f"document {i} says {i * i % 17}\n" * 2 for i in range(60) if i % 20 == 19]
    blocks = pick_blocks(tokenize(texts, byte_tokenizer()).tokens, 24, 10**6)
    model = load_model(path / "runs" / "lambda-3-seed-1.model", device="cpu")
    np.testing.assert_allclose(measure_blocks(model, blocks).compute().loss, report.loss, rtol=1e-5)
    assert [point["step"] for point in run["curve"]] == [0, 4, 8, 12]


def test_the_counts_are_of_the_training_stream(swept):
    counts = TokenCounts.load(swept[0] / "counts.parquet")
    counts.check(byte_tokenizer())
    texts = [f"document {i} says {i * i % 17}\n" * 2 for i in range(60) if i % 20 != 19]
    blocks = pick_blocks(tokenize(texts, byte_tokenizer()).tokens, 24, 10**6)
    np.testing.assert_array_equal(counts.counts, np.bincount(blocks[:, 1:].ravel(), minlength=259))


def test_a_run_is_the_frames_own_training(folder, swept):
    """Lambda 3 on all matrices is `modelwright train --weight-decay 3`, bit for bit: measuring changes nothing."""
    from modelwright.models.new import new_config, new_model

    tokenizer = byte_tokenizer()
    texts = [f"document {i} says {i * i % 17}\n" * 2 for i in range(60) if i % 20 != 19]
    settings = {**SIZES, "attention_dropout": 0.2, "tie_word_embeddings": False}
    model = new_model(new_config("llama", settings, tokenizer), seed=1)
    options = TrainingOptions(
        steps=12, batch_size=4, block_size=24, learning_rate=1e-2, weight_decay=3.0, seed=1, device="cpu"
    )
    train(model, tokenize(texts, tokenizer).tokens, options)
    kept = load_model(swept[0] / "runs" / "lambda-3-seed-1.model", device="cpu")
    for (name, a), b in zip(model.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("on", "shrunk"), [("embeddings", "embed_tokens"), ("head", "lm_head"), ("body", "q_proj")])
def test_a_part_alone_shrinks(folder, tmp_path, on, shrunk):
    keys = {"seeds": [0], "keep_models": True, "checkpoints": 1, "steps": 8, "learning_rate": 3e-2}
    verb(folder, tmp_path / "s", decay_on=on, **keys).run(Silent())
    plain, decayed = (load_model(tmp_path / "s" / "runs" / f"lambda-{v}-seed-0.model", device="cpu") for v in (0, 3))
    ratio = {
        n: float(b.norm() / a.norm())
        for (n, a), b in zip(plain.named_parameters(), decayed.parameters(), strict=True)
        if "norm" not in n
    }
    for name, value in ratio.items():
        part = "embeddings" if "embed" in name else "head" if "lm_head" in name else "body"
        assert (value < 0.9) == (part == on), (name, value)
    assert any(shrunk in name for name in ratio)


def test_checkpoints_can_be_swept_and_tied_models(folder, tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    found = verb(
        folder, tmp_path / "s", architecture=None, set={}, tokenizer=None, model=str(tmp_path / "m"), seeds=[0],
        steps=3, checkpoints=1, eval_data=[str(folder / "data.jsonl")], decay_on="all",
    ).run(Silent())  # fmt: skip
    assert found["rows"][0]["train"]["average"] > 0


def files(work):
    return sum(1 for _ in work.rglob("*.json"))


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_the_same(folder, swept):
    output = folder / "killed"
    work = folder / "killed.training"
    for _ in range(2):
        before = files(work)
        kill_when(
            lambda before=before: files(work) >= before + 3,
            lambda: verb(folder, output, keep_models=True, save_every=5).run(Silent()),
        )
        assert not output.exists()
    verb(folder, output, keep_models=True, save_every=5).run(Silent())
    again, whole = json.loads((output / "result.json").read_text()), swept[2]
    for a, b in zip(again["runs"], whole["runs"], strict=True):
        assert {**a, "train_seconds": 0} == {**b, "train_seconds": 0}
    assert again["rows"] == whole["rows"]
    assert not work.exists()


def test_an_unfinished_sweep_of_other_options_is_not_thrown_away(folder, tmp_path, monkeypatch):
    from modelwright.probing.fair_lm import sweep

    output, done = tmp_path / "s", []
    original = sweep._one

    def one(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments[8])
        original(*arguments)

    monkeypatch.setattr(sweep, "_one", one)
    keys = {"steps": 2, "checkpoints": 1, "seeds": [0]}
    with pytest.raises(KeyboardInterrupt):
        verb(folder, output, **keys).run(Silent())
    assert not output.exists()
    monkeypatch.setattr(sweep, "_one", original)
    with pytest.raises(UserError, match="unfinished run with other options \\(steps\\)"):
        verb(folder, output, **{**keys, "steps": 3}).run(Silent())
    called = []
    monkeypatch.setattr(sweep, "_one", lambda *a: called.append(a[8]) or original(*a))
    verb(folder, output, **keys, lambdas=[3.0, 1.0]).run(Silent())  # others of the same, and the done one left out
    assert called == ["lambda-3-seed-0", "lambda-1-seed-0"]
    assert {p.name.split(".")[0] for p in (output / "runs").iterdir()} == {"lambda-3-seed-0", "lambda-1-seed-0"}


def test_a_run_that_diverges_is_a_result(folder, tmp_path):
    found = verb(folder, tmp_path / "s", lambdas=[0.0, 1e9], seeds=[0], warmup=0, clip=0.0).run(Silent())
    assert [row["diverged"] for row in found["rows"]] == [0, 1]
    assert "train" not in found["rows"][1]
    assert "nothing can be compared" in found["answers"][0]
    with pytest.raises(UserError, match="Every run diverged"):
        verb(folder, tmp_path / "t", lambdas=[1e9], seeds=[0], warmup=0, clip=0.0).run(Silent())


def curve(averages, balanced):
    points = []
    for step, (a, b) in enumerate(zip(averages, balanced, strict=True)):
        one = {"average": a, "balanced": b, "gap": b - a}
        points.append({"step": step, "train": one, "heldout": {**one, "gap": None}})
    return points


def test_equal_training_loss_is_interpolated():
    found = at_training_loss(curve([4, 2, 1], [5, 4, 1]), 1.25)
    assert found == pytest.approx({
        "step": 1.75, "train_average": 1.25, "train_balanced": 1.75, "train_gap": 0.5, "heldout_average": 1.25,
        "heldout_balanced": 1.75,
    })  # fmt: skip
    assert at_training_loss(curve([4, 2], [5, 4]), 1.0) is None
    assert at_training_loss(curve([4, 2], [5, 4]), 9.0)["step"] == 0
    # A loss that rises again: the first time counts.
    assert at_training_loss(curve([4, 1, 3, 0], [4, 1, 3, 0]), 2.0)["step"] == pytest.approx(2 / 3)


def test_rows_compare_with_the_smallest_lambda():
    def run(value, seed, last):
        full = {
            "accuracy": 1.0, "balanced_accuracy": 0.5, "slope": -0.1,
            "bins": [{"label": "[3, 9)", "types": 2, "loss": last, "share": 0.4}],
        }  # fmt: skip
        points = curve([4, last], [4, 2 * last])
        for point in points:
            point["train"] |= full
            point["heldout"] |= full
        speed = {"mean": 0.5, "gap": 0.1, "bins": {"[3, 9)": 0.5}}
        return {
            "lambda": value, "seed": seed, "sum_lr_lambda": value, "left_of_an_idle_weight": 1.0, "curve": points,
            "learning_speed": {s: {"auc": speed, "minmax": speed} for s in ("train", "heldout")},
        }  # fmt: skip

    runs = [run(0.5, 0, 1.0), run(0.5, 1, 2.0), run(1.0, 0, 2.0), {"lambda": 1.0, "seed": 1, "diverged": "diverged"}]
    found = compare_lambdas(runs)
    assert found["reference"] == 0.5
    low, high = found["rows"]
    assert (low["train"]["average"], low["train"]["average_sd"]) == pytest.approx((1.5, np.std([1, 2], ddof=1)))
    assert high["train"]["delta"]["average"] == pytest.approx(0.5)
    assert high["train"]["delta"]["balanced"] == pytest.approx(1.0)
    assert high["train"]["delta"]["ratio"] == pytest.approx(2.0)
    assert (high["seeds"], high["diverged"]) == (1, 1)
    assert low["equal_loss"]["train_average"] == pytest.approx(2.0)  # seed 0 at 2.0, seed 1 at its own 2.0
    assert compare_lambdas([runs[3]])["answers"] == [
        "There are not two weight decays with results, so nothing can be compared."
    ]


def test_small_parts():
    assert checkpoint_steps(10, 4) == [0, 2, 5, 8, 10]
    assert checkpoint_steps(2, 8) == [0, 1, 2]
    tokens = np.arange(103, dtype=np.uint16) % 7
    assert pick_blocks(tokens, 10, 10**6).shape == (10, 10)
    assert pick_blocks(tokens, 10, 35).shape == (3, 10)
    np.testing.assert_array_equal(
        count_blocks(tokens, 10, 8), np.bincount(tokens[:100].reshape(10, 10)[:, 1:].ravel(), minlength=8)
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lambdas": []}, "at least one weight decay"),
        ({"lambdas": [0.1, 0.1]}, "none twice"),
        ({"lambdas": [-1.0]}, "must be 0 or more"),
        ({"lambdas": [float("nan")]}, "must be 0 or more"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"checkpoints": 0}, "at least 1 interval"),
        ({"heldout_share": 1.0}, "between 0 and 1"),
        ({"steps": None}, "Say how long"),
        ({"architecture": None}, "Give either --model"),
        ({"tokenizer": None}, "needs --tokenizer"),
        ({"block_size": 4000, "batch_size": 1}, "less than one block"),
        ({"decay_on": "head", "set": {**SIZES, "tie_word_embeddings": True}}, "one weight"),
        ({"base": 1}, "base of at least 2"),
    ],
)
def test_mistakes_are_sentences_and_leave_nothing(folder, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        verb(folder, tmp_path / "s", **keys).run(Silent())
    assert [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_several_processes_and_an_existing_output_are_refused(folder, swept, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already"):
        verb(folder, swept[0]).run(Silent())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        verb(folder, tmp_path / "s").run(Silent())
