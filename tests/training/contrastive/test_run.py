"""`modelwright train contrastive` end to end: killed and resumed, interrupted, chosen batches, refused."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.nn import functional
from transformers import AutoModel, AutoProcessor

from forked import kill_when
from modelwright import catalog
from modelwright.errors import UserError
from modelwright.evaluation.retrieval import evaluate_retrieval
from modelwright.models.loading import save_model
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.progress import Silent
from modelwright.training.contrastive import run
from modelwright.training.contrastive.arguments import ContrastiveOptions
from modelwright.training.contrastive.batches import Order
from modelwright.training.contrastive.encoders import load_pair_encoder, pair_encoder
from modelwright.training.contrastive.pairs import read_pairs
from modelwright.training.contrastive.run import make_selection
from modelwright.training.contrastive.selection import Chosen
from modelwright.training.resume import working_folder
from modelwright.verbs.train_contrastive import TrainContrastive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive")
    for name, count in (("texts", 60), ("heldout", 9)):
        rows = [{"question": f"what is {i} of {name}?", "answer": f"it is {i * i % 41}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = folder / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    for i in range(40):
        Image.fromarray(noise[i]).save(pictures / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}", "clean": i % 2} for i in range(40)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Dropout makes the random state matter.
    save_model(*tiny_pair("bert", hidden_dropout_prob=0.2), folder / "bert")
    save_model(*tiny_pair("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), folder / "still")
    save_model(*tiny_pair("clip", attention_dropout=0.2), folder / "clip")
    save_model(*tiny_pair("siglip"), folder / "siglip")
    return folder


def verb(folder, output, **keys):
    # 7 and 11 make no row of the log fall on a checkpoint.
    options = {
        "data": [str(folder / "texts.jsonl")],
        "eval_data": [str(folder / "heldout.jsonl")],
        "model": str(folder / "bert"),
        "steps": 30,
        "batch_size": 16,
        "mini_batch_size": 6,
        "learning_rate": 1e-3,
        "log_every": 7,
        "eval_every": 0 if keys.get("eval_data") == [] else 15,
        "save_every": 11,
        "workers": 0,
        "device": "cpu",
    }
    return TrainContrastive(output=output, **{**options, **keys})


def pictures(folder, output, **keys):
    options = {"data": [str(folder / "pictures")], "eval_data": [], "model": str(folder / "clip"), "steps": 3}
    return verb(folder, output, **{**options, "batch_size": 12, "mini_batch_size": 5, "log_every": 1, **keys})


def rows(path):
    found = [json.loads(line) for line in (path / "training_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in found]


def same_weights(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert json.loads((a / "contrastive.json").read_text()) == json.loads((b / "contrastive.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(folder):
    result = verb(folder, folder / "undisturbed").run(Silent())
    return folder / "undisturbed", result


def test_the_folder_is_a_text_encoder_for_everybody(folder, undisturbed):
    path, result = undisturbed
    assert [row["step"] for row in rows(path)] == [1, 7, 14, 15, 21, 28, 30]
    assert {"step", "pairs", "loss", "learning_rate", "grad_norm", "scale"} <= rows(path)[-1].keys()
    assert [row["step"] for row in rows(path) if "eval_query_to_key_r1" in row] == [15, 30]
    assert (result["steps"], result["pairs"], result["epochs"]) == (30, 480, 8.0)
    assert (result["kind"], result["objective"], result["skipped"]) == ("text-text", "softmax", 0)
    assert result["final_loss"] == rows(path)[-1]["loss"]
    assert result["pairs_per_second"] > 0
    assert not (folder / "undisturbed.training").exists()
    encoder = load_pair_encoder(path, device="cpu")
    assert encoder.scale().item() == pytest.approx(result["scale"])
    found = evaluate_retrieval(encoder, read_pairs(folder / "heldout.jsonl"))
    assert found["query_to_key_recall@1"] == result["eval_query_to_key_r1"]
    sentence = SentenceTransformer(str(path), device="cpu")
    texts = ["what is 3 of texts?", "it is 9"]
    with torch.no_grad():
        ours = encoder(encoder.collator([{"query": texts[0], "key": texts[1]}]))
    assert np.allclose(sentence.encode(texts), torch.cat([ours.queries, ours.keys]).numpy(), atol=1e-5)


class StopAt(Silent):
    """Sends a signal to this very process while training."""

    def __init__(self, steps, number):
        self.left, self.number, self.training = steps, number, False

    def start(self, label, total=None):
        self.training = label == "train"

    def advance(self, units=1, note=""):
        self.left -= units if self.training else 0
        if self.training and self.left <= 0:
            os.kill(os.getpid(), self.number)
            self.left = 10**9


def test_interrupted_it_saves_and_goes_on_from_there(folder, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("modelwright.training.resume._SHOWN_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        verb(folder, tmp_path / "m", save_every=0, workers=2).run(StopAt(9, signal.SIGINT))
    work = tmp_path / "m.training"
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-9"]
    assert not (tmp_path / "m").exists()
    (work / "checkpoint-12").mkdir()  # as kill -9 leaves it, half-written
    with pytest.raises(UserError, match=r"other options \(learning_rate\).*--force"):
        verb(folder, tmp_path / "m", learning_rate=1e-4).run(Silent())
    previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        with pytest.raises(KeyboardInterrupt):
            verb(folder, tmp_path / "m").run(StopAt(18, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, previous)
    verb(folder, tmp_path / "m").run(Silent())
    assert rows(tmp_path / "m") == rows(undisturbed[0])
    same_weights(tmp_path / "m", undisturbed[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def newest(work):
    return max((int(p.parent.name.split("-")[1]) for p in work.glob("checkpoint-*/modelwright.json")), default=0)


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_ends_the_same(folder, undisturbed, tmp_path):
    work = tmp_path / "m.training"
    kill_when(lambda: newest(work) >= 11, lambda: verb(folder, tmp_path / "m").run(Silent()))
    assert not (tmp_path / "m").exists()
    assert newest(work) in (11, 22)
    verb(folder, tmp_path / "m").run(Silent())
    assert rows(tmp_path / "m") == rows(undisturbed[0])
    same_weights(tmp_path / "m", undisturbed[0])


def test_adafactor_resumes_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("modelwright.training.resume._SHOWN_EVERY", 0.0)
    keys = {"optimizer": "adafactor", "gradient_checkpointing": True, "steps": 4}
    with pytest.raises(KeyboardInterrupt):
        pictures(folder, tmp_path / "m", **keys).run(StopAt(2, signal.SIGINT))
    for name in ("m", "whole"):
        pictures(folder, tmp_path / name, **keys).run(Silent())
    assert rows(tmp_path / "m") == rows(tmp_path / "whole")
    same_weights(tmp_path / "m", tmp_path / "whole")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_images_and_texts(folder, tmp_path, family):
    result = pictures(folder, tmp_path / "m", model=str(folder / family), epochs=1, steps=None).run(Silent())
    assert (result["kind"], result["steps"]) == ("image-text", 3)
    assert result["objective"] == ("sigmoid" if family == "siglip" else "softmax")
    assert ("bias" in result) == (family == "siglip")
    loaded = AutoModel.from_pretrained(tmp_path / "m")
    assert not torch.equal(loaded.logit_scale, AutoModel.from_pretrained(folder / family).logit_scale)
    AutoProcessor.from_pretrained(tmp_path / "m", backend="pil")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_stays_as_it_was(folder, tmp_path, tower):
    result = pictures(folder, tmp_path / "m", freeze=tower, weight_decay=1.0).run(Silent())
    before, after = (AutoModel.from_pretrained(p).state_dict() for p in (folder / "clip", tmp_path / "m"))
    stems = {"image": ("vision", "visual"), "text": ("text",)}
    for name in before:
        if name.startswith(stems[tower]):
            assert torch.equal(before[name], after[name]), name
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == 3  # the other tower, its projection, the scale
    assert result["trained_parameters"] < result["parameters"]


def test_a_new_model(folder, tmp_path):
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"vision_config.image_size": 16, "vision_config.patch_size": 8, "projection_dim": 16}
    keys = {"model": None, "architecture": "clip", "tokenizer": str(folder / "bert")}
    result = pictures(folder, tmp_path / "m", set={**settings, **more}, **keys).run(Silent())
    assert AutoModel.from_pretrained(tmp_path / "m").config.vision_config.hidden_size == 16
    assert result["model_type"] == "clip"


def test_pairs_that_cannot_be_used_are_left_out_and_counted(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in (folder / "pictures").iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "7.png").write_bytes((data / "7.png").read_bytes()[:80])
    (data / "9.png").unlink()
    with pytest.raises(UserError, match=r"[79]\.png"):
        pictures(folder, tmp_path / "m", data=[str(data)], batch_size=40).run(Silent())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]

    class Messages(Silent):
        said = ()

        def message(self, text):
            self.said = (*self.said, text)

    progress = Messages()
    result = pictures(folder, tmp_path / "m", data=[str(data)], skip_bad=True).run(progress)
    assert (result["skipped"], result["data_pairs"]) == (2, 38)
    assert "7.png" in " ".join(progress.said)
    assert "9.png" in " ".join(progress.said)


def test_heldout_pairs_are_looked_at_before_training(folder, tmp_path, monkeypatch):
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    (heldout / "0.png").write_bytes((folder / "pictures" / "0.png").read_bytes())
    (heldout / "1.png").write_bytes((folder / "pictures" / "1.png").read_bytes()[:80])
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in (0, 1)]
    (heldout / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(run, "train_pairs", lambda *args, **keys: pytest.fail("training began"))
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=r"metadata\.jsonl:2 .*1\.png.* truncated: mend or remove"):
            pictures(folder, tmp_path / "m", eval_data=[str(heldout)], skip_bad=skip_bad).run(Silent())
    assert [p.name for p in tmp_path.iterdir()] == ["heldout"]


@dataclasses.dataclass(kw_only=True)
class First:
    """Takes the first pairs of each super-batch."""

    filter_ratio: float = 0.5
    seed: int = 0
    columns = ("clean",)

    def super_batch_size(self, batch_size):
        return round(batch_size / (1 - self.filter_ratio))

    def choose(self, encode, super_batch, size, step, extras):
        encode(super_batch)
        return Chosen(
            torch.arange(size), {"first_seed": self.seed, "first_clean": extras["clean"][:size].float().mean()}
        )


@pytest.fixture
def first(monkeypatch):
    real = catalog.load
    monkeypatch.setattr(catalog, "load", lambda kind, name: First if name == "first" else real(kind, name))


def test_chosen_batches(folder, tmp_path, first):
    keys = {"select": "first", "filter_ratio": 0.6, "seed": 5, "eval_data": [str(folder / "pictures")], "log_every": 3}
    result = pictures(folder, tmp_path / "m", **keys).run(Silent())
    log = rows(tmp_path / "m")
    assert result["epochs"] == pytest.approx(3 * 30 / 40)
    assert result["pairs"] == 36
    assert [row["first_seed"] for row in log] == [5.0, 5.0]
    assert 0 < log[-1]["first_clean"] < 1
    assert "eval_mean_r1" in log[-1]


def test_options_of_a_selection(first):
    assert make_selection("first", {"filter_ratio": "0.8"}, 3) == First(filter_ratio=0.8, seed=3)
    assert make_selection("first", {"seed": 4}, 3).seed == 4
    with pytest.raises(UserError, match="'first' has no option 'filter': did you mean 'filter_ratio'"):
        make_selection("first", {"filter": 1}, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "either --model .* or --architecture"),
        ({"architecture": "clip"}, "either --model .* or --architecture"),
        ({"model": None, "architecture": "clip"}, "needs --tokenizer"),
        ({"set": {"hidden_size": 3}}, "give them with --architecture"),
        ({"filter_ratio": 0.5}, "filter_ratio is an option of a selection"),
        ({"select": "jset"}, "did you mean 'jest'"),
        ({"steps": None}, "one of steps or epochs"),
        ({"epochs": 2.0}, "one of steps or epochs"),
        ({"batch_size": 61}, "hold 60 pairs, fewer than one batch of 61"),
        ({"mini_batch_size": 0}, "mini_batch_size must be"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"beta1": 1.0}, "beta1 must be 0 or more and less than 1"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must lie between 0 and 1"),
        ({"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"key_field": "reply"}, "reply"),
        ({"freeze": "image"}, "single encoder of texts"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"device": "tpu9"}, "not available"),
        ({"scale": -1.0}, "scale must be"),
    ],
)
def test_faults_leave_nothing_behind(folder, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        verb(folder, tmp_path / "out" / "m", **keys).run(Silent())
    assert not list((tmp_path / "out").glob("*"))


def test_data_and_model_that_do_not_fit(folder, tmp_path):
    with pytest.raises(UserError, match="encoder of image and text, but the data are pairs of text and text"):
        verb(folder, tmp_path / "m", model=str(folder / "clip")).run(Silent())
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": " "}\n')
    with pytest.raises(UserError, match=r"blank\.jsonl.*2"):
        verb(folder, tmp_path / "m", data=[str(blank)]).run(Silent())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blank.jsonl"]


def test_an_existing_output_is_refused_before_any_work(folder, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="--force"):
        verb(folder, tmp_path / "m", data=["nowhere.jsonl"]).run(Silent())
    with (
        working_folder(tmp_path / "n", {}, False),
        pytest.raises(UserError, match="Another process is training"),
    ):
        verb(folder, tmp_path / "n").run(Silent())


def test_the_verb_has_the_same_options_and_defaults():
    fields = {f.name: f.default for f in dataclasses.fields(TrainContrastive)}
    for option in dataclasses.fields(ContrastiveOptions):
        assert fields[option.name] == option.default, option.name


def test_lengths():
    assert ContrastiveOptions(epochs=2).total_steps(7) == 14
    assert ContrastiveOptions(epochs=0.5).total_steps(7) == 4
    assert ContrastiveOptions(epochs=0.1).total_steps(10) == 1
    assert ContrastiveOptions(steps=3).total_steps(7) == 3
    assert ContrastiveOptions(steps=100, warmup=0.1).warmup_steps(100) == 10


def test_a_fixed_scale_and_a_plain_softmax_for_siglip(folder, tmp_path):
    result = pictures(folder, tmp_path / "m", model=str(folder / "siglip"), objective="softmax", scale=30.0).run(
        Silent()
    )
    assert (result["objective"], result["scale"]) == ("softmax", pytest.approx(30.0))
    assert "bias" not in result
    again = load_pair_encoder(tmp_path / "m", device="cpu")
    assert (again.objective, again.fixed_scale) == ("softmax", 30.0)
    assert pair_encoder(again.model, again.processor).objective == "sigmoid"


@pytest.mark.parametrize(("directions", "expected"), [("auto", False), ("both", True), ("one", False)])
def test_directions(folder, tmp_path, directions, expected):
    keys = {"steps": 1, "log_every": 1, "eval_data": [], "seed": 3}
    result = verb(folder, tmp_path / "m", directions=directions, model=str(folder / "still"), **keys).run(Silent())
    encoder, data = load_pair_encoder(folder / "still", device="cpu"), read_pairs(folder / "texts.jsonl")
    with torch.no_grad():
        found = encoder(encoder.collator(data.rows(Order(60, 16, 3).of(0))))
    logits, labels = found.scale * found.queries @ found.keys.T, torch.arange(16)
    losses = [functional.cross_entropy(x, labels).item() for x in (logits, logits.T)]
    assert result["final_loss"] == pytest.approx(sum(losses) / 2 if expected else losses[0], rel=1e-5)
