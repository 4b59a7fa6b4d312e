"""The trainer against a bare loop on whole batches; resumption, selection, and what it refuses."""

import copy
import json
import math
import random

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, CLIPModel, TrainingArguments

from modelwright.errors import UserError
from modelwright.evaluation.retrieval import paired_metrics
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.training.contrastive.arguments import ContrastiveTrainingArguments
from modelwright.training.contrastive.batches import Order
from modelwright.training.contrastive.encoders import pair_encoder
from modelwright.training.contrastive.selection import Chosen
from modelwright.training.contrastive.trainer import ContrastiveTrainer, load_weights, share_out, undisturbed
from modelwright.training.inf_cl.loss import InfCLLoss

BATCH, STEPS = 12, 5


def texts(rows=40, negatives=0):
    return [
        {
            "query": f"question {i} of {i * i % 7}",
            "key": f"answer {i * 3}",
            "negatives": [f"wrong {i}, {h}" for h in range(negatives)],
        }
        for i in range(rows)
    ]


def pictures(rows=40):
    noise = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), np.uint8)
    return [{"query": Image.fromarray(noise[i]), "key": f"picture {i}"} for i in range(rows)]


def data_for(family, **keys):
    return pictures(**keys) if family in ("clip", "siglip") else texts(**keys)


def tiny(family, **keys):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    return tiny_pair(family, **{**still, **keys})


def arguments(folder, **keys):
    options = {
        "per_device_train_batch_size": BATCH,
        "mini_batch_size": 5,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam makes a whole step of a gradient that is nothing but rounding
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ContrastiveTrainingArguments(output_dir=str(folder), **{**options, **keys})


def trainer_for(model, processor, folder, data, keys=None, **more):
    return ContrastiveTrainer(
        model, arguments(folder, **(keys or {})), train_dataset=data, processing_class=processor, **more
    )


def rows_of(trainer):
    timed = ("seconds", "pairs_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in trainer.state.log_history if "loss" in row]


def bare_loop(family, data, seed=42):
    """Whole batches, the full matrix, plain SGD with Trainer's linear schedule."""
    model, processor = tiny(family)
    encoder = pair_encoder(model, processor)
    encoder.train()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    order, losses = Order(len(data), BATCH, seed), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
        found = encoder(encoder.collator([data[i] for i in order.of(step)]))
        keys = found.keys if found.negatives is None else torch.cat([found.keys, found.negatives])
        logits = found.scale * found.queries @ keys.T
        labels = torch.arange(BATCH)
        if family == "siglip":
            loss = -functional.logsigmoid((logits + found.bias) * (2 * torch.eye(BATCH) - 1)).sum() / BATCH
        elif family == "clip":
            loss = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
        else:
            loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return encoder, losses


@pytest.mark.parametrize(
    ("family", "negatives"),
    [("clip", 0), ("siglip", 0), ("bert", 0), ("bert", 2)],
    ids=["clip", "siglip", "bert", "hard"],
)
def test_trains_as_a_bare_loop_on_whole_batches(family, negatives, tmp_path):
    data = data_for(family, **({"negatives": negatives} if negatives else {}))
    expected, losses = bare_loop(family, data)
    model, processor = tiny(family)
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_for(model, processor, tmp_path, data)
    trainer.train()
    log = rows_of(trainer)
    assert [row["loss"] for row in log] == pytest.approx(losses, rel=1e-5)
    assert [row["pairs"] for row in log] == [BATCH * (i + 1) for i in range(STEPS)]
    for (name, a), b in zip(trainer.encoder.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(before[n], p) for n, p in model.state_dict().items())  # trained in place
    assert {"scale", "grad_norm", "learning_rate", "epoch"} <= log[-1].keys()
    assert ("bias" in log[-1]) == (family == "siglip")
    assert log[-1]["scale"] == pytest.approx(trainer.encoder.scale().item(), rel=1e-2)
    assert log[-1]["epoch"] == pytest.approx(STEPS / 3)


def test_open_clips_loss_by_name_is_the_default(tmp_path):
    logs = []
    for loss in (None, InfCLLoss(block_size=5)):
        trainer = trainer_for(*tiny("clip"), tmp_path, pictures(), {"max_steps": 2}, loss=loss)
        trainer.train()
        logs.append([row["loss"] for row in rows_of(trainer)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_infcl_for_a_model_with_a_bias_is_the_softmax_loss(tmp_path):
    """Its fourth argument by position is another one, as in open_clip."""
    trainer = trainer_for(*tiny("siglip"), tmp_path, pictures(), {"max_steps": 1}, loss=InfCLLoss())
    trainer.train()
    encoded = trainer.embed(trainer.train_dataset)
    assert trainer.loss_of(encoded) == InfCLLoss()(encoded.queries, encoded.keys, encoded.scale)


def test_a_data_set_of_the_datasets_library(tmp_path):
    plain = trainer_for(*tiny("bert"), tmp_path, texts(), {"max_steps": 2})
    plain.train()
    table = datasets.Dataset.from_list([{"anchor": row["query"], "positive": row["key"]} for row in texts()])
    trainer = trainer_for(*tiny("bert"), tmp_path, table, {"max_steps": 2, "dataloader_num_workers": 1})
    trainer.train()
    assert rows_of(trainer) == rows_of(plain)


DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def resumable(folder, **keys):
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "optim": "adamw_torch", **keys}
    trainer = trainer_for(*tiny("bert", **DROPOUT), folder, texts(), {"learning_rate": 1e-3, "max_steps": 7, **options})
    return trainer


def test_resumed_it_ends_the_same_to_the_last_bit(tmp_path):
    whole = resumable(tmp_path / "whole")
    whole.train()
    for step in (6, 3):  # 3 is in the middle of a row of the log, and at the border of a pass; 6 too
        again = resumable(tmp_path / "cut")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert rows_of(again) == rows_of(whole)
        for (name, a), b in zip(again.encoder.state_dict().items(), whole.encoder.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    losses = [row["loss"] for row in rows_of(whole)]
    other = resumable(tmp_path / "other", seed=1, max_steps=2)
    other.train()
    assert rows_of(other)[0]["loss"] != losses[0]


def test_resumed_within_a_pass(tmp_path):
    keys = {"save_steps": 2, "max_steps": 5, "logging_steps": 1}
    whole, cut = resumable(tmp_path / "a", **keys), resumable(tmp_path / "b", **keys)
    whole.train()
    cut.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert rows_of(cut) == rows_of(whole)


@pytest.mark.parametrize("family", ["clip", "siglip", "bert"])
def test_a_checkpoint_is_an_ordinary_model_folder(family, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = trainer_for(*tiny(family), tmp_path, data_for(family), keys)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is type(trainer.encoder.model)
    for (name, a), b in zip(loaded.state_dict().items(), trainer.encoder.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    AutoTokenizer.from_pretrained(folder)
    fresh = pair_encoder(*tiny(family, seed=5))
    load_weights(fresh, folder)
    for (name, a), b in zip(fresh.state_dict().items(), trainer.encoder.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_epochs_are_passes_over_the_data(tmp_path):
    trainer = trainer_for(*tiny("bert"), tmp_path, texts(), {"max_steps": -1, "num_train_epochs": 2})
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.epoch == 2.0


def test_a_large_scale_comes_down_to_100(tmp_path):
    model, processor = tiny("clip")
    model.logit_scale.data.fill_(math.log(150))
    trainer = trainer_for(model, processor, tmp_path, pictures(), {"max_steps": 1, "learning_rate": 0.0})
    trainer.train()
    assert model.logit_scale.exp().item() == pytest.approx(100)


def test_decay_spares_scale_and_bias(tmp_path):
    trainer = trainer_for(*tiny("siglip"), tmp_path, pictures())
    decayed = set(trainer.get_decay_parameter_names(trainer.encoder))
    for name, parameter in trainer.encoder.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("probe", "bias"))
        assert (name in decayed) == matrix, name


def test_retrieval_while_it_trains_and_nothing_else_changes(tmp_path):
    plain = trainer_for(*tiny("bert", **DROPOUT), tmp_path, texts(), {"max_steps": 4})
    plain.train()
    keys = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 3}
    heldout = [*texts()[:7], {"query": "question 0 of 0", "key": "another answer", "negatives": []}]
    trainer = trainer_for(*tiny("bert", **DROPOUT), tmp_path, texts(), keys, eval_dataset=heldout)
    trainer.train()
    assert rows_of(trainer) == rows_of(plain)
    evaluations = [row for row in trainer.state.log_history if "eval_query_to_key_r1" in row]
    assert [row["step"] for row in evaluations] == [3, 4]
    assert evaluations[-1]["pairs"] == 4 * BATCH
    encoder = trainer.encoder.eval()
    found = encoder(encoder.collator(heldout))
    identities = [(row["query"], row["key"]) for row in heldout]
    expected = paired_metrics(found.queries, found.keys, identities)
    assert expected["queries"] == 7
    assert evaluations[-1]["eval_query_to_key_r1"] == expected["query_to_key_recall@1"]
    assert evaluations[-1]["eval_key_to_query_mrr"] == pytest.approx(expected["key_to_query_mrr"])
    assert trainer.evaluate()["eval_mean_r5"] == expected["mean_recall@5"]
    with pytest.raises(UserError, match="no held-out pairs"):
        plain.evaluate()


def test_embed_gives_all_rows_in_their_order(tmp_path):
    trainer = trainer_for(*tiny("bert", **DROPOUT), tmp_path, texts())
    found = trainer.embed(texts(13, negatives=2))
    encoder = trainer.encoder.eval()
    expected = encoder(encoder.collator(texts(13, negatives=2)))
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Record(InfCLLoss):
    """Keeps what it is given."""

    def forward(self, queries, keys, scale):
        self.seen = (queries.detach(), keys.detach())
        return super().forward(queries, keys, scale)


class Pick:
    """Takes given rows of the super-batch, after a disorderly look at all of them."""

    columns = ("ref", "missing")

    def __init__(self, factor, rows, disorderly=True):
        self.factor, self.rows, self.disorderly, self.steps, self.extras = factor, rows, disorderly, [], None

    def attach(self, learner):
        self.learner = learner

    def super_batch_size(self, batch_size):
        return self.factor * batch_size

    def choose(self, encode, super_batch, size, step, extras):
        self.steps.append(step)
        self.extras = extras
        assert not self.learner.training
        self.encoded, again = encode(super_batch), encode(super_batch)
        assert torch.equal(self.encoded.queries, again.queries)  # no dropout
        assert not self.encoded.queries.requires_grad
        if self.disorderly:
            torch.rand(3)
            np.random.rand(3)
        return Chosen(torch.tensor(self.rows[:size]), {"note": float(step)})


def test_a_selection_that_takes_everything_changes_nothing(tmp_path):
    keys = {"max_steps": 4, "logging_steps": 2}
    plain = trainer_for(*tiny("bert", **DROPOUT), tmp_path, texts(), keys)
    plain.train()
    pick = Pick(1, list(range(BATCH)))
    trainer = trainer_for(*tiny("bert", **DROPOUT), tmp_path, texts(), keys, selection=pick)
    trainer.train()
    assert [row["loss"] for row in rows_of(trainer)] == pytest.approx([r["loss"] for r in rows_of(plain)], rel=1e-6)
    for a, b in zip(trainer.encoder.parameters(), plain.encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert pick.steps == [0, 1, 2, 3]
    assert [row["note"] for row in rows_of(trainer)] == [0.5, 2.5]


@pytest.mark.parametrize("family", ["clip", "bert"])
def test_the_chosen_rows_are_trained_on(family, tmp_path):
    rows = list(np.random.default_rng(0).permutation(3 * BATCH)[:BATCH])
    model, processor = tiny(family)
    record, pick = Record(), Pick(3, rows)
    trainer = trainer_for(model, processor, tmp_path, data_for(family), {"max_steps": 1}, loss=record, selection=pick)
    trainer.train()
    taken = Order(40, 3 * BATCH, 42).of(0)[rows]
    encoder = pair_encoder(*tiny(family)).train()
    expected = encoder(encoder.collator([data_for(family)[i] for i in taken]))
    torch.testing.assert_close(record.seen[0], expected.queries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record.seen[1], expected.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pick.encoded.queries[rows], expected.queries, rtol=1e-4, atol=1e-5)
    assert rows_of(trainer)[0]["pairs"] == BATCH


def test_a_selection_sees_its_columns_of_the_super_batch(tmp_path):
    table = datasets.Dataset.from_list(
        [{"anchor": row["query"], "positive": row["key"], "ref": [float(i), 0.5]} for i, row in enumerate(texts())]
    )
    pick = Pick(2, list(range(BATCH)))
    trainer_for(*tiny("bert"), tmp_path, table, {"max_steps": 1}, selection=pick).train()
    assert list(pick.extras) == ["ref"]
    assert pick.extras["ref"][:, 0].tolist() == Order(40, 2 * BATCH, 42).of(0).tolist()


@pytest.mark.parametrize("rows", [[0] * BATCH, list(range(BATCH - 1)), [*range(BATCH - 1), 2 * BATCH]])
def test_a_faulty_selection_is_refused(rows, tmp_path):
    trainer = trainer_for(*tiny("bert"), tmp_path, texts(), selection=Pick(2, rows))
    with pytest.raises(ValueError, match="different rows of the super-batch"):
        trainer.train()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_share_out(processes, room, factor, seed):
    each = room * factor
    positions = np.random.default_rng(seed).permutation(each * processes)[: room * processes]
    shares = [share_out(positions, each, r, processes) for r in range(processes)]
    assert sorted(p for own, foreign in shares for p in [*own, *foreign]) == sorted(positions)
    for rank, (own, foreign) in enumerate(shares):
        assert len(own) + len(foreign) == room
        assert all(p // each == rank for p in own)
        assert all(p // each != rank for p in foreign)
        if len(foreign):
            assert set(own) == {p for p in positions if p // each == rank}  # nothing of its own is given away


def test_undisturbed_restores_modes_buffers_and_random_states():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    module[0].eval()
    module[1].train()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with undisturbed(module):
        assert not module[1].training
        module[0].running_mean += 1
        module[0].train()
        torch.rand(2)
        np.random.rand(2)
        random.random()
    assert (module[0].training, module[1].training) == (False, True)
    assert module[0].running_mean.tolist() == [0, 0, 0]
    assert torch.equal(torch.get_rng_state(), states[0])
    drawn, drawn_too = np.random.rand(), random.random()
    np.random.set_state(states[1])
    random.setstate(states[2])
    assert (drawn, drawn_too) == (np.random.rand(), random.random())


def test_diverged(tmp_path):
    model, processor = tiny("clip")
    model.visual_projection.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        trainer_for(model, processor, tmp_path, pictures()).train()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"per_device_train_batch_size": 41}, "hold 40 pairs, fewer than one batch of 41"),
        ({"mini_batch_size": 0}, "mini_batch_size"),
        ({"gradient_accumulation_steps": 2}, "raise per_device_train_batch_size"),
    ],
)
def test_bad_arguments(keys, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer_for(*tiny("bert"), tmp_path, texts(), keys).train()


def test_what_does_not_fit(tmp_path):
    model, processor = tiny("clip")
    with pytest.raises(UserError, match="processing_class"):
        ContrastiveTrainer(model, arguments(tmp_path), train_dataset=pictures())
    with pytest.raises(UserError, match="no mini_batch_size"):
        ContrastiveTrainer(model, TrainingArguments(output_dir=str(tmp_path)), processing_class=processor)
    table = datasets.Dataset.from_list([{"anchor": "a", "positive": "b"}] * 20)
    with pytest.raises(UserError, match="encoder of image and text, but the data are pairs of text and text"):
        trainer_for(model, processor, tmp_path, table)
    with pytest.raises(UserError, match="nothing to train on"):
        trainer_for(model, processor, tmp_path, None).train()
    encoder = pair_encoder(*tiny("bert"), objective="sigmoid")
    with pytest.raises(UserError, match="no hard negatives"):
        trainer_for(encoder, None, tmp_path, texts(negatives=1)).train()


def test_batch_norm_is_refused(tmp_path):
    model, processor = tiny("clip")
    model.vision_model.pre_layrnorm = torch.nn.Sequential(torch.nn.BatchNorm1d(17), model.vision_model.pre_layrnorm)
    assert isinstance(model, CLIPModel)
    with pytest.raises(UserError, match=r"vision_model.*BatchNorm1d"):
        trainer_for(model, processor, tmp_path, pictures()).train()


def test_the_checkpoint_says_what_it_needs_to_go_on(tmp_path):
    trainer = resumable(tmp_path, max_steps=3)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-3" / "modelwright.json").read_text())
    assert state.keys() == {"losses", "noted", "seconds"}
    assert len(state["losses"]) == 1  # rows of the log at 2 and 4
