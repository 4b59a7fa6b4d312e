"""`modelwright train --attention`: the model learns with it, resumes with it, and whoever loads it has it."""

import os
import signal

import pytest
import torch

from modelwright.errors import UserError
from modelwright.models.loading import load_model, save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.progress import Silent
from modelwright.verbs.train import Train

IDS = torch.randint(3, 250, (2, 48), generator=torch.Generator().manual_seed(0))
LEARNED = "rope-alibi: {distance: harmonic, learnable: true}"
DRAWN = "prflash: {block_size: 8, mode: independent}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    (folder / "data.txt").write_text("".join(f"document {i} says {i * i % 17}\n" for i in range(300)))
    save_model(tiny_model("llama"), byte_tokenizer(), folder / "start")
    save_model(tiny_model("gpt2"), byte_tokenizer(), folder / "gpt2")
    return folder


def verb(folder, output, attention, **keys):
    options = {
        "data": [str(folder / "data.txt")], "model": str(folder / "start"), "steps": 6, "batch_size": 2,
        "block_size": 48, "save_every": 2, "log_every": 1, "learning_rate": 1e-2, "device": "cpu",
    }  # fmt: skip
    return Train(output=output, attention=attention, **{**options, **keys})


def logits(path):
    with torch.no_grad():
        return load_model(path, device="cpu")(IDS).logits


@pytest.mark.parametrize("attention", [LEARNED, DRAWN])
def test_killed_and_continued_it_is_the_same_model_and_not_the_plain_one(folder, tmp_path, attention):
    class StopAt(Silent):
        left = 3

        def start(self, label, total=None):
            self.training = label == "train"

        def advance(self, units=1, note=""):
            if self.training:
                StopAt.left -= units
                if StopAt.left == 0:
                    os.kill(os.getpid(), signal.SIGINT)

    verb(folder, tmp_path / "whole", attention).run(Silent())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelwright.training.resume._SHOWN_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            verb(folder, tmp_path / "cut", attention).run(StopAt())
    with pytest.raises(UserError, match="attention"):
        verb(folder, tmp_path / "cut", None).run(Silent())
    verb(folder, tmp_path / "cut", attention).run(Silent())
    whole = logits(tmp_path / "whole")
    assert torch.equal(logits(tmp_path / "cut"), whole)
    verb(folder, tmp_path / "plain", None).run(Silent())
    assert float((logits(tmp_path / "plain") - whole).abs().max()) > 1e-3


def test_a_trained_model_says_what_it_was_trained_with(folder, tmp_path):
    verb(folder, tmp_path / "m", LEARNED).run(Silent())
    model = load_model(tmp_path / "m", device="cpu")
    assert model.config.modelwright_attention["name"] == "rope-alibi"
    assert model.config.modelwright_attention["options"]["distance"] == "harmonic"
    factors = torch.cat([p for n, p in model.named_parameters() if n.endswith("bias_factor")])
    assert bool((factors != 1).any())
    # Trained further, it keeps its attention without being told.
    verb(folder, tmp_path / "further", None, model=str(tmp_path / "m"), steps=2).run(Silent())
    model = load_model(tmp_path / "further", device="cpu")
    further = torch.cat([p for n, p in model.named_parameters() if n.endswith("bias_factor")])
    assert model.config._attn_implementation == "rope_alibi_harmonic"
    assert not torch.equal(further, factors)


@pytest.mark.parametrize(
    ("attention", "model", "words"),
    [
        ("rope-alibi", "gpt2", "its positions are not rotary"),
        ("rope-alibi: {lambda_r: 2}", "start", "lambda_r is 2"),
        ("no-such", "start", "no 'no-such' among the attentions"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(folder, tmp_path, attention, model, words):
    with pytest.raises(UserError, match=words):
        verb(folder, tmp_path / "m", attention, model=str(folder / model)).run(Silent())
    assert not list(tmp_path.iterdir())
