"""Training on what JEST chooses."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from modelwright.curation.jest import JestArguments, JestSelection, JestTrainer, cache_reference_embeddings
from modelwright.errors import UserError
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.training.contrastive.arguments import ContrastiveTrainingArguments
from modelwright.training.contrastive.encoders import pair_encoder
from modelwright.training.contrastive.pairs import Pairs
from modelwright.training.contrastive.selection import Chosen
from modelwright.training.contrastive.trainer import ContrastiveTrainer

WORDS = ["red", "green", "blue", "cyan", "pink", "grey", "gold", "teal"]


def data(count=80):
    rows = [(f"{WORDS[i % 8]} {i}", f"{WORDS[(3 * i) % 8]} {i}", i % 3 == 0) for i in range(count)]
    return Dataset.from_dict(dict(zip(("query", "positive", "clean"), map(list, zip(*rows)))))


def encoder(seed=0, **text):
    model, tokenizer = tiny_pair("bert", seed=seed, **text)
    return pair_encoder(model, tokenizer, max_tokens=16)


def arguments(folder, cls=JestArguments, **more):
    options = {
        "per_device_train_batch_size": 8, "mini_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    return cls(output_dir=str(folder), **{**options, **more})


def trained(folder, learner=None, dataset=None, reference=None, **more):
    torch.manual_seed(0)
    trainer = JestTrainer(
        learner or encoder(), arguments(folder, **more), train_dataset=dataset or data(), reference_model=reference
    )
    trainer.train()
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.encoder.state_dict().items()}


def test_training_logs_what_was_chosen_and_leaves_the_reference_alone(tmp_path):
    reference = encoder(1)
    before = copy.deepcopy(reference.state_dict())
    trainer = trained(tmp_path, reference=reference, super_batch_size=40, n_chunks=4)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for name in ("learnability", "learnability_chosen", "learner_loss", "reference_loss", "clean", "clean_chosen"):
        assert all(math.isfinite(row[f"jest_{name}"]) for row in rows)
    assert rows[0]["jest_flop_ratio"] == pytest.approx((3 + 5 + 5) / 3)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())


def test_cached_columns_train_as_the_reference_itself(tmp_path):
    cached = cache_reference_embeddings(data(), encoder(1))
    first = trained(tmp_path / "a", reference=encoder(1))
    second = trained(tmp_path / "b", dataset=cached)
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=1e-5, atol=1e-6)


def test_the_form_of_the_scores_is_an_argument(tmp_path):
    trainer = trained(tmp_path, reference=encoder(1), form="softmax")
    assert trainer.selection.form == "softmax"
    with pytest.raises(UserError, match="There is no form 'soft'"):
        arguments(tmp_path, form="soft").selection()


def test_columns_are_read_once_and_a_text_called_clean_is_not_logged(tmp_path, monkeypatch):
    read, column = [], Pairs.column
    monkeypatch.setattr(Pairs, "column", lambda pairs, name: read.append(name) or column(pairs, name))
    texts = [f"a clean text {i}" for i in range(80)]
    cached = cache_reference_embeddings(data().remove_columns("clean").add_column("clean", texts), encoder(1))
    rows = trained(tmp_path, dataset=cached).state.log_history
    assert sorted(read) == sorted(JestSelection.columns)
    assert "jest_learnability" in rows[0]
    assert "jest_clean" not in rows[0]


def test_a_reference_that_is_the_learner_is_refused(tmp_path):
    learner = encoder()
    trained_before = [parameter.requires_grad for parameter in learner.parameters()]
    with pytest.raises(UserError, match="shares its weights with the learner"):
        JestTrainer(learner, arguments(tmp_path), train_dataset=data(), reference_model=learner)
    assert [parameter.requires_grad for parameter in learner.parameters()] == trained_before


def test_choosing_everything_is_training_without_choosing(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    chosen = trained(tmp_path / "a", learner=encoder(**still), criterion="uniform", filter_ratio=0.0, optim="sgd")
    plain = ContrastiveTrainer(
        encoder(**still), arguments(tmp_path / "b", ContrastiveTrainingArguments, optim="sgd"), train_dataset=data()
    )
    plain.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(chosen)[name], value, rtol=1e-5, atol=1e-6)


def test_scoring_leaves_nothing_behind_but_the_choice(tmp_path):
    dropout = {"hidden_dropout_prob": 0.2}
    made = []

    class Recorded(JestSelection):
        def choose(self, *arguments):
            made.append(super().choose(*arguments).indices)
            return Chosen(made[-1], {})

    class Replayed:
        def super_batch_size(self, batch_size):
            return 5 * batch_size

        def choose(self, encode, super_batch, size, step, extras):
            return Chosen(made[step], {})

    found = []
    for name, selection in (("a", Recorded(criterion="hard")), ("b", Replayed())):
        torch.manual_seed(0)
        trainer = ContrastiveTrainer(
            encoder(**dropout),
            arguments(tmp_path / name, ContrastiveTrainingArguments),
            train_dataset=data(),
            selection=selection,
        )
        trainer.train()
        assert trainer.encoder.training
        found.append(weights(trainer))
    assert len(made) == 3
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_same_again_and_another_seed(tmp_path):
    first, again = (weights(trained(tmp_path / n, reference=encoder(1), seed=4)) for n in "ab")
    other = weights(trained(tmp_path / "c", reference=encoder(1), seed=5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pictures_scored_and_trained_at_two_patch_sizes(tmp_path):
    from PIL import Image

    pictures = [Image.new("RGB", (32, 32), (8 * i, 255 - 8 * i, i)) for i in range(30)]
    dataset = Dataset.from_dict({"image": pictures, "caption": [f"picture {i}" for i in range(30)]})
    model, processor = tiny_pair("siglip")
    trainer = trained(
        tmp_path,
        learner=pair_encoder(model, processor),
        dataset=dataset,
        criterion="hard",
        super_batch_size=16,
        scoring_patch_size=16,
        multi_resolution=True,
        max_steps=1,
    )
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["jest_flop_ratio"] < 1 + 2 / 3
    assert "forward" not in model.vision_model.embeddings.__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"super_batch_size": 7}, "less than the batch of 8"),
        ({"filter_ratio": 1.0}, "filter_ratio"),
        ({"criterion": "hardest"}, "criterion"),
        ({}, "needs a reference"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, **options)


def test_the_arguments_of_others_are_refused(tmp_path):
    with pytest.raises(UserError, match="JestArguments"):
        JestTrainer(encoder(), arguments(tmp_path, ContrastiveTrainingArguments), train_dataset=data())
    with pytest.raises(UserError, match="chooses by JEST"):
        JestTrainer(encoder(), arguments(tmp_path), train_dataset=data(), selection=object())


def test_a_super_batch_size_is_taken_exactly(tmp_path):
    for batch, size in ((8, 40), (256, 1280), (128, 640), (7, 50), (32_768, 163_840)):
        args = arguments(tmp_path, per_device_train_batch_size=batch, super_batch_size=size)
        assert args.selection().super_batch_size(batch) == size
