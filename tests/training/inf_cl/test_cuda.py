"""The losses and the trainer on a card; skipped where there is none."""

import json

import pytest
import torch
import torch.nn.functional as F

from modelwright.training.inf_cl import tiled_contrastive_loss, tiled_info_nce_loss, tiled_sigmoid_loss
from modelwright.training.inf_cl.loss import _resolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="a card"))]


def features(b, d, dtype=torch.float32):
    """Pairs that have little in common: the gradient of the loss does not vanish, however large the scale."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(b, d, generator=generator)
    texts = images / 8 + torch.randn(b, d, generator=generator)
    return [F.normalize(t, dim=1).to("cuda", dtype).requires_grad_() for t in (images, texts)]


def exact(function, *inputs):
    """Loss and gradients in float64 on the CPU."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def full(images, texts, scale):
    x = scale * images @ texts.T
    labels = torch.arange(len(images))
    return (F.cross_entropy(x, labels) + F.cross_entropy(x.T, labels)) / 2


def full_sigmoid(images, texts, scale, bias):
    x = scale * images @ texts.T + bias
    return -F.logsigmoid((2 * torch.eye(len(x), dtype=x.dtype) - 1) * x).sum() / len(x)


def far(found, expected):
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())


@pytest.fixture(params=["highest", "high"])
def tolerance(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield {"highest": 1e-5, "high": 2e-3}[request.param]
    torch.set_float32_matmul_precision(before)


# With unit rows, 14.3 needs no shift of the exponents, 100 a common one, 300 one for each row and column.
@pytest.mark.parametrize("scale", [14.3, 100.0, 300.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients(backend, scale, tolerance):
    # An error of 2 ** -11 in x, which grows with the scale, is that of each weight.
    tolerance *= max(1.0, scale / 14.3)
    images, texts = features(777, 96)
    scale, bias = (torch.tensor(v, device="cuda", requires_grad=True) for v in (scale, -3.0))
    for loss, reference, inputs in (
        (tiled_contrastive_loss, full, (images, texts, scale)),
        (tiled_sigmoid_loss, full_sigmoid, (images, texts, scale, bias)),
    ):
        value = loss(*inputs, backend=backend)
        gradients = torch.autograd.grad(value, inputs)
        expected, expected_gradients = exact(reference, *inputs)
        assert abs(value.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
        for found, wanted in zip(gradients, expected_gradients):
            assert far(found, wanted) <= 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_of_sixteen_bits(backend, dtype):
    images, texts = features(777, 96, dtype)
    scale = torch.tensor(14.3, device="cuda", requires_grad=True)
    # The loss is multiplied, as a gradient scaler does: the gradients of a mean are small numbers for float16.
    value = tiled_contrastive_loss(images, texts, scale, backend=backend) * 1024
    gradients = torch.autograd.grad(value, (images, texts, scale))
    expected, wanted = exact(lambda *a: 1024 * full(*a), images, texts, scale)
    assert gradients[0].dtype == dtype
    assert abs(value.item() - expected.item()) <= 1e-3 * expected.item()
    for found, reference in zip(gradients, wanted):
        assert far(found, reference) <= 2.0**-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_and_with_hard_negatives(backend):
    images, texts = features(300, 64)
    keys = torch.cat([texts, features(50, 64)[0]]).detach().requires_grad_()
    labels = torch.randperm(350, generator=torch.Generator().manual_seed(1))[:300]
    with torch.autocast("cuda", torch.bfloat16):
        value = tiled_info_nce_loss(images, keys, 20.0, labels=labels.cuda(), backend=backend)
    gradients = torch.autograd.grad(value, (images, keys))
    expected, wanted = exact(lambda q, k: F.cross_entropy(20.0 * q @ k.T, labels), images, keys)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert max(far(*pair) for pair in zip(gradients, wanted)) <= 2e-5


def test_auto_takes_the_kernels_and_the_plain_tiles_for_float64():
    images, texts = features(100, 32)
    assert _resolve("auto", images.device, torch.float32, 10**9) == "triton"
    assert _resolve("auto", images.device, torch.float32, 10**4) == "torch"
    assert _resolve("auto", images.device, torch.float64, 10**9) == "torch"
    expected, _ = exact(full, images, texts, torch.tensor(10.0))
    value = tiled_contrastive_loss(images.double(), texts.double(), 10.0)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_grows_with_the_batch(backend):
    peaks = []
    for batch in (32_768, 65_536):
        images, texts = features(batch, 64)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tiled_contrastive_loss(images, texts, 14.3, backend=backend).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 65_536**2 * 4 / 30


def test_two_runs_agree_to_the_last_bit():
    images, texts = features(3000, 96)
    runs = []
    for _ in range(2):
        value = tiled_contrastive_loss(images, texts, 14.3, backend="triton")
        runs.append([value, *torch.autograd.grad(value, (images, texts))])
    assert all(torch.equal(*pair) for pair in zip(*runs))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_trainer(tmp_path, precision):
    """fp16 with its gradient scaler: the weights after some steps are near those of float32."""
    from modelwright.models.loading import save_model
    from modelwright.models.tiny_pairs import tiny_pair
    from modelwright.training.contrastive.arguments import ContrastiveTrainingArguments
    from modelwright.training.contrastive.encoders import load_pair_encoder
    from modelwright.training.contrastive.pairs import read_pairs
    from modelwright.training.contrastive.trainer import ContrastiveTrainer

    rows = [{"question": f"what is {i}?", "answer": f"it is {i * i % 41}"} for i in range(64)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(*tiny_pair("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), tmp_path / "bert")

    def train(**options):
        args = ContrastiveTrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=32, mini_batch_size=8, max_steps=8,
            logging_steps=1, save_strategy="no", optim="sgd", learning_rate=0.05, max_grad_norm=1.0, report_to="none",
            disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = ContrastiveTrainer(
            load_pair_encoder(tmp_path / "bert", device="cpu"), args, train_dataset=read_pairs(tmp_path / "texts.jsonl")
        )
        trainer.train()
        assert next(trainer.encoder.parameters()).device.type == "cuda"
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    losses = train(**({} if precision == "fp32" else {precision: True}))
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    if precision != "fp32":
        # A scaler leaves out its first steps until its factor fits, so only the course is compared.
        assert losses == pytest.approx(train(), rel=0.05)
