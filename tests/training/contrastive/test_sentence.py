"""The loss for sentence-transformers: that of its own classes, in one process and in two."""

import copy
import gc
import os

import datasets
import pytest
import torch

from modelwright.errors import UserError
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.training.contrastive.encoders import pair_encoder
from modelwright.training.contrastive.sentence import InfCLSentenceLoss

library = pytest.importorskip("sentence_transformers")
losses = library.sentence_transformer.losses

ANCHORS = [f"question {i} " + "with more words " * (i % 4) for i in range(7)]
COLUMNS = [ANCHORS, [f"answer {a}" for a in ANCHORS], ["no"] * 7, [f"nor {a[::-1]}" for a in ANCHORS]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("st")
    pair_encoder(*tiny_pair("bert")).save(folder)
    return folder


@pytest.fixture
def model(folder):
    return library.SentenceTransformer(str(folder), device="cpu").double()


def features(model, columns):
    return [model.preprocess(texts) for texts in columns]


def loss_and_gradients(loss, columns):
    model = loss.model
    model.zero_grad()
    value = loss([dict(f) for f in features(model, columns)], None)
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert torch.allclose(ours[1][name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("mini_batch_size", [2, 100])
def test_equals_multiple_negatives_ranking_loss(model, columns, mini_batch_size):
    model.eval()  # dropout is another test
    ours = loss_and_gradients(InfCLSentenceLoss(model, mini_batch_size=mini_batch_size), COLUMNS[:columns])
    theirs = loss_and_gradients(losses.MultipleNegativesRankingLoss(model), COLUMNS[:columns])
    assert len(theirs[1]) > 10
    assert_same(ours, theirs)


def test_equals_it_in_both_directions_at_another_scale(model):
    model.eval()
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    ours = loss_and_gradients(InfCLSentenceLoss(model, scale=50.0, mini_batch_size=3, symmetric=True), COLUMNS[:3])
    assert_same(ours, loss_and_gradients(losses.MultipleNegativesRankingLoss(model, scale=50.0, **both), COLUMNS[:3]))


def test_a_share_of_the_loss_has_that_share_of_the_gradient(model):
    """As under gradient accumulation, or a gradient scaler."""
    model.eval()
    loss = InfCLSentenceLoss(model, mini_batch_size=3)
    _, whole = loss_and_gradients(loss, COLUMNS[:3])
    model.zero_grad()
    (loss(features(model, COLUMNS[:3]), None) / 4).backward()
    for name, gradient in whole.items():
        assert torch.allclose(model.get_parameter(name).grad * 4, gradient, rtol=1e-12), name


class Table(torch.nn.Module):
    """Long embeddings, whose gradients are small, in a dtype."""

    def __init__(self, dtype):
        super().__init__()
        weights = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).half().float()
        self.weight = torch.nn.Parameter(256 * weights)
        self.dtype = dtype

    def forward(self, features):
        return {"sentence_embedding": self.weight[features["input_ids"][:, 0]].to(self.dtype)}


def test_small_gradients_survive_float16_until_the_scaler_has_scaled_them():
    columns = [{"input_ids": torch.arange(start, start + 20)[:, None]} for start in (0, 20)]
    gradients = []
    for dtype in (torch.float16, torch.float32):
        loss = InfCLSentenceLoss(Table(dtype), mini_batch_size=7)
        (loss(columns) * 2**16).backward()
        gradients.append(loss.model.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().mean().item())


def test_dropout_is_the_same_in_both_passes(model):
    """Against the library's cached class, with the same mini-batches and thus the same random numbers."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    found = []
    for loss in (
        InfCLSentenceLoss(model, mini_batch_size=3),
        losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    ):
        torch.manual_seed(5)
        found.append(loss_and_gradients(loss, COLUMNS[:2]))
    assert_same(*found)


def test_matryoshka_loss_around_it(model):
    model.eval()
    found = [
        loss_and_gradients(losses.MatryoshkaLoss(model, loss, [32, 16, 8]), COLUMNS[:3])
        for loss in (InfCLSentenceLoss(model, mini_batch_size=2), losses.MultipleNegativesRankingLoss(model))
    ]
    assert_same(*found)


def test_evaluation_needs_no_graph(model):
    model.eval()
    with torch.no_grad():
        found = InfCLSentenceLoss(model, mini_batch_size=2)(features(model, COLUMNS[:2]), None)
        expected = losses.MultipleNegativesRankingLoss(model)(features(model, COLUMNS[:2]), None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not found.requires_grad


def test_trainer(model, tmp_path):
    """Three steps with it end where three steps with the library's loss end."""
    data = datasets.Dataset.from_dict({"anchor": COLUMNS[0], "positive": COLUMNS[1], "negative": COLUMNS[3]})
    found = []
    for kind in (InfCLSentenceLoss, losses.MultipleNegativesRankingLoss):
        trained = copy.deepcopy(model)
        args = library.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / kind.__name__),
            per_device_train_batch_size=7,
            max_steps=3,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )
        for module in trained.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        options = {"mini_batch_size": 2} if kind is InfCLSentenceLoss else {}
        trainer = library.SentenceTransformerTrainer(
            model=trained, args=args, train_dataset=data, loss=kind(trained, **options)
        )
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize(("columns", "message"), [(1, r"\[7\] rows"), (0, r"\[\] rows")])
def test_too_few_columns(model, columns, message):
    with pytest.raises(UserError, match=message):
        InfCLSentenceLoss(model)(features(model, COLUMNS[:columns]), None)


def test_faults(model):
    with pytest.raises(UserError, match=r"\[7, 6\] rows"):
        InfCLSentenceLoss(model)(features(model, [COLUMNS[0], COLUMNS[1][:6]]), None)
    with pytest.raises(UserError, match="static embeddings"):
        InfCLSentenceLoss(model)([{"input_ids": torch.arange(5), "offsets": torch.tensor([0, 3])}] * 2, None)
    with pytest.raises(UserError, match="scale"):
        InfCLSentenceLoss(model, scale=0)
    with pytest.raises(UserError, match="mini_batch_size"):
        InfCLSentenceLoss(model, mini_batch_size=0)


def _process(rank, folder, output):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # They meet at a file: a port that was free a moment ago may be another test's by now, and joining that one hangs.
    torch.distributed.init_process_group("gloo", init_method=f"file://{output}/meet", rank=rank, world_size=2)
    model = library.SentenceTransformer(str(folder), device="cpu").double().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pooler" not in name)
    found = []
    for gather in (True, False):
        for loss in (
            InfCLSentenceLoss(model, mini_batch_size=2, gather_across_devices=gather),
            losses.MultipleNegativesRankingLoss(model, gather_across_devices=gather),
        ):
            model.zero_grad()
            loss.model = torch.nn.parallel.DistributedDataParallel(model)
            value = loss(features(model, [c[rank * 3 : rank * 3 + 3] for c in COLUMNS[:3]]), None)
            value.backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            found.append((value.item(), torch.cat(gradients)))
    torch.save(found, output / f"{rank}.pt")
    # The group must not end with the wrapper: torch then joins gloo's thread while it holds Python's lock, and that
    # thread may be waiting for this lock to drop the last of its work.
    del loss
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_the_librarys_loss_gives(folder, tmp_path):
    # Forked: to import everything again would take most of the test's time.
    torch.multiprocessing.start_processes(_process, (folder, tmp_path), nprocs=2, start_method="fork")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in results:
        for ours, theirs in (found[:2], found[2:]):
            assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
            assert torch.allclose(ours[1], theirs[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(results[0][0][1], results[1][0][1])  # DDP gave both the same gradient
    assert results[0][0][0] != pytest.approx(results[0][2][0], rel=1e-3)  # and gathering is another loss
