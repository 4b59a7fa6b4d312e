import math
import os

import pytest
import torch
import torch.nn.functional as F

from modelwright.errors import UserError
from modelwright.kernels.largest_tensor import LargestTensor
from modelwright.training.inf_cl import (
    InfCLLoss,
    InfoNCELoss,
    SigmoidLoss,
    tiled_contrastive_loss,
    tiled_info_nce_loss,
    tiled_sigmoid_loss,
)

SCALES = (1.0, 14.3, 100.0)
#: Batch and tile: not a multiple, a tile larger than the batch, one pair, tiles of one.
SIZES = [(301, 37), (64, 64), (5, 64), (1, 8), (12, 1), (40, None)]


def pairs(b, width=20, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, width, generator=generator, dtype=torch.float64)
    texts = images + torch.randn(b, width, generator=generator, dtype=torch.float64)
    return tuple(F.normalize(t, dim=1).to(dtype).requires_grad_() for t in (images, texts))


def number(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def full_softmax(images, texts, scale, labels=None, symmetric=True, reduction="mean"):
    x = scale * images @ texts.T
    labels = torch.arange(len(x)) if labels is None else labels
    loss = F.cross_entropy(x, labels, reduction=reduction)
    if symmetric:
        loss = (loss + F.cross_entropy(x[:, labels].T, torch.arange(len(x)), reduction=reduction)) / 2
    return loss


def full_sigmoid(images, texts, scale, bias):
    z = 2 * torch.eye(len(images), dtype=images.dtype) - 1
    return -F.logsigmoid(z * (scale * images @ texts.T + bias)).sum() / len(images)


def assert_same(found, expected, inputs, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize(("b", "block"), SIZES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_softmax_loss_and_gradients_equal_the_full_matrix(b, block, scale, symmetric):
    images, texts = pairs(b)
    s = number(scale)
    found = tiled_contrastive_loss(images, texts, s, block_size=block, symmetric=symmetric)
    assert_same(found, full_softmax(images, texts, s, symmetric=symmetric), (images, texts, s))


@pytest.mark.parametrize(("b", "block"), SIZES)
@pytest.mark.parametrize("scale", SCALES)
def test_sigmoid_loss_and_gradients_equal_the_full_matrix(b, block, scale):
    images, texts = pairs(b)
    s, bias = number(scale), number(-10.0)
    found = tiled_sigmoid_loss(images, texts, s, bias, block_size=block)
    assert_same(found, full_sigmoid(images, texts, s, bias), (images, texts, s, bias))
    total = tiled_sigmoid_loss(images, texts, s, bias, block_size=block, reduction="sum")
    torch.testing.assert_close(total, found * b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_float32(scale):
    images, texts = pairs(301, dtype=torch.float32)
    s, bias = number(scale, torch.float32), number(-10.0, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (images, texts, s, bias)]
    for found, expected, count in (
        (tiled_contrastive_loss(images, texts, s, block_size=37), full_softmax(*wide[:3]), 3),
        (tiled_sigmoid_loss(images, texts, s, bias, block_size=37), full_sigmoid(*wide), 4),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        own = torch.autograd.grad(found, (images, texts, s, bias)[:count])
        for one, other in zip(own, torch.autograd.grad(expected, wide[:count])):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_gradcheck():
    images, texts = pairs(7, width=3)
    s, bias = number(5.0), number(-1.0)
    labels = torch.tensor([6, 0, 1, 2, 2])
    for function, inputs in (
        (lambda i, t, s: tiled_contrastive_loss(i, t, s, block_size=3), (images, texts, s)),
        (lambda i, t, s: tiled_contrastive_loss(i, t, s, block_size=3, reduction="none"), (images, texts, s)),
        (lambda i, t, s, b: tiled_sigmoid_loss(i, t, s, b, block_size=3), (images, texts, s, bias)),
        (
            lambda q, k, s: tiled_info_nce_loss(q[:5], k, s, labels=labels, symmetric=True, block_size=3),
            (images, texts, s),
        ),
    ):
        assert torch.autograd.gradcheck(function, inputs)


def test_a_second_derivative_is_refused_not_wrong():
    images, texts = pairs(4)
    for loss in (tiled_contrastive_loss(images, texts, 2.0), tiled_sigmoid_loss(images, texts, 2.0, -1.0)):
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, images)[0], rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="differentiated once"):
            gradient.sum().backward()


@pytest.mark.parametrize("symmetric", [True, False])
def test_hard_negatives_and_labels(symmetric):
    queries, _ = pairs(10)
    _, keys = pairs(37, seed=1)
    s = number(14.3)
    inputs = (queries, keys, s)
    for labels in (None, torch.randperm(37, generator=torch.Generator().manual_seed(0))[:10], torch.tensor([36] * 10)):
        found = tiled_info_nce_loss(*inputs, labels=labels, symmetric=symmetric, block_size=8)
        assert_same(found, full_softmax(*inputs, labels=labels, symmetric=symmetric), inputs)
    few = keys[:3].detach().requires_grad_()
    labels = torch.arange(10) % 3  # fewer keys than queries
    found = tiled_info_nce_loss(queries, few, s, labels=labels, symmetric=symmetric)
    assert_same(found, full_softmax(queries, few, s, labels=labels, symmetric=symmetric), (queries, few, s))
    module = InfoNCELoss(symmetric=symmetric, block_size=8)
    torch.testing.assert_close(module(queries, few, s, labels), found, rtol=1e-13, atol=0)
    doubled = torch.cat([keys[:10], keys[:10]])
    plain = tiled_info_nce_loss(queries, keys[:10], s)
    # Every negative and the positive twice: log 2 more.
    torch.testing.assert_close(tiled_info_nce_loss(queries, doubled, s), plain + math.log(2), rtol=1e-12, atol=0)


def test_reductions():
    images, texts = pairs(23)
    expected = full_softmax(images, texts, 14.3, reduction="none")
    found = {r: tiled_contrastive_loss(images, texts, 14.3, block_size=7, reduction=r) for r in ("none", "sum", "mean")}
    torch.testing.assert_close(found["none"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["sum"], expected.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["mean"], expected.mean(), rtol=1e-12, atol=0)
    weights = torch.rand(23).double()
    assert_same((found["none"] * weights).sum(), (expected * weights).sum(), (images, texts))


def test_the_side_of_a_tile_does_not_matter():
    images, texts = pairs(53)
    losses = [tiled_contrastive_loss(images, texts, 30.0, block_size=block) for block in (None, 1, 7, 52, 53, 54, 500)]
    gradients = [torch.autograd.grad(loss, (images, texts)) for loss in losses]
    for loss, gradient in zip(losses[1:], gradients[1:]):
        torch.testing.assert_close(loss, losses[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=1e-14)


def test_permuting_pairs_permutes_gradients():
    images, texts = pairs(31)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(3))
    moved = [t.detach()[order].requires_grad_() for t in (images, texts)]
    for function in (
        lambda i, t: tiled_contrastive_loss(i, t, 14.3, block_size=7),
        lambda i, t: tiled_sigmoid_loss(i, t, 14.3, -5.0, block_size=7),
    ):
        here, there = function(images, texts), function(*moved)
        torch.testing.assert_close(here, there, rtol=1e-13, atol=0)
        gradients = torch.autograd.grad(here, (images, texts))
        for one, other in zip(gradients, torch.autograd.grad(there, moved)):
            torch.testing.assert_close(one[order], other, rtol=1e-12, atol=1e-14)


def test_one_pair_costs_nothing_and_teaches_nothing():
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
        images, texts = pairs(1, dtype=dtype)
        loss = tiled_contrastive_loss(images, texts, 100.0)
        assert abs(loss.item()) <= tolerance
        for gradient in torch.autograd.grad(loss, (images, texts)):
            assert gradient.abs().max() <= tolerance * 100


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_identical_rows_cost_log_b(scale):
    row = F.normalize(torch.randn(1, 9, dtype=torch.float64), dim=1)
    loss = tiled_contrastive_loss(row.expand(77, 9), row.expand(77, 9), scale, block_size=10)
    assert loss.item() == pytest.approx(math.log(77), rel=1e-13)


def test_nothing_overflows():
    images, texts = pairs(64, dtype=torch.float32)
    far = -texts.detach()  # each positive the worst of its row
    for keys in (texts, far):
        for scale in (1e2, 1e4):
            s, bias = number(scale, torch.float32), number(-10.0, torch.float32)
            for loss in (
                tiled_contrastive_loss(images, keys, s, block_size=10),
                tiled_sigmoid_loss(images, keys, s, bias, block_size=10),
            ):
                gradients = torch.autograd.grad(loss, (images, s))
                assert all(torch.isfinite(t).all() for t in (loss, *gradients))
            expected = full_softmax(images.detach().double(), keys.detach().double(), scale)
            found = tiled_contrastive_loss(images, keys, s, block_size=10)
            assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_summed_in_float32(dtype):
    images, texts = (t.detach().to(dtype).requires_grad_() for t in pairs(70))
    s = torch.tensor([14.3], requires_grad=True)
    wide = [t.detach().float().requires_grad_() for t in (images, texts)]
    expected = torch.autograd.grad(full_softmax(*wide, 14.3), wide)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = tiled_contrastive_loss(images, texts, s, block_size=16)
            sigmoid = tiled_sigmoid_loss(images, texts, s, -10.0, block_size=16)
            gradients = torch.autograd.grad(loss, (images, texts, s))
        assert (loss.dtype, sigmoid.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(loss, full_softmax(*wide, 14.3).detach(), rtol=1e-5, atol=1e-6)
        assert [g.dtype for g in gradients] == [dtype, dtype, torch.float32]
        assert gradients[2].shape == (1,)
        for found, wanted in zip(gradients, expected):
            torch.testing.assert_close(found, wanted.to(dtype), rtol=2e-2, atol=1e-5)
    mixed = tiled_contrastive_loss(images, wide[1], s)
    torch.testing.assert_close(mixed, loss, rtol=1e-5, atol=1e-6)


def open_clip_clip_loss(image_features, text_features, logit_scale):
    """What open_clip's ``ClipLoss`` computes on one device."""
    logits_per_image = logit_scale * image_features @ text_features.T
    logits_per_text = logit_scale * text_features @ image_features.T
    labels = torch.arange(len(logits_per_image))
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def open_clip_siglip_loss(image_features, text_features, logit_scale, logit_bias):
    """What open_clip's ``SigLipLoss`` computes on one device."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(labels * logits).sum() / len(image_features)


def test_drop_in_for_open_clip():
    images, texts = pairs(50)
    s, bias = number(math.log(14.3)), number(-10.0)
    found = InfCLLoss(block_size=16)(images, texts, s.exp())
    assert_same(found, open_clip_clip_loss(images, texts, s.exp()), (images, texts, s))
    output = {"image_features": images, "text_features": texts, "logit_scale": s.exp(), "logit_bias": bias}
    assert InfCLLoss()(**output, output_dict=True).keys() == {"contrastive_loss"}
    torch.testing.assert_close(InfCLLoss()(**output), found, rtol=1e-13, atol=0)  # a bias does not matter
    found = SigmoidLoss(block_size=16)(images, texts, s.exp(), bias)
    assert_same(found, open_clip_siglip_loss(images, texts, s.exp(), bias), (images, texts, s, bias))
    torch.testing.assert_close(SigmoidLoss()(**output, output_dict=True)["contrastive_loss"], found, rtol=1e-13, atol=0)


def test_equals_what_transformers_computes():
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "projection_size": 16,
        "eos_token_id": 49,
    }
    vision = {k: v for k, v in text.items() if k.startswith(("hidden", "inter", "num"))} | {
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(1, 49, (6, 8)), "pixel_values": torch.randn(6, 3, 8, 8)}
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).double()
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).double()
    for model in (siglip, clip):
        model.eval()
        with torch.no_grad():
            model.logit_scale.fill_(2.0)
        out = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, return_loss=True)
        out.image_embeds.retain_grad(), out.text_embeds.retain_grad()
        features = [F.normalize(t.detach(), dim=1).requires_grad_() for t in (out.image_embeds, out.text_embeds)]
        scale = model.logit_scale.detach().exp()
        if model is siglip:
            loss = tiled_sigmoid_loss(*features, scale, model.logit_bias.detach(), block_size=4)
        else:
            loss = tiled_contrastive_loss(*features, scale, block_size=4)
        torch.testing.assert_close(loss.detach(), out.loss.detach().double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "one direction", "hard negatives", "sigmoid"])
@pytest.mark.parametrize("scale", [14.3, 100.0, 5000.0])
def test_no_matrix_of_all_pairs_exists_forward_or_backward(loss, scale):
    b, width, block = 512, 8, 32
    images, texts = pairs(b, width, torch.float32)
    images.grad = texts.grad = None
    s, bias = number(scale, torch.float32), number(-1.0, torch.float32)
    with LargestTensor() as seen:
        if loss == "sigmoid":
            tiled_sigmoid_loss(images, texts, s, bias, block_size=block).backward()
        elif loss == "hard negatives":
            tiled_info_nce_loss(images[:256], texts, s, symmetric=True, block_size=block).backward()
        else:
            tiled_contrastive_loss(images, texts, s, block_size=block, symmetric=loss == "softmax").backward()
    assert images.grad is not None
    assert seen.elements <= b * width, seen.name
    # q, k's products, both gradients twice, and vectors; two tiles and what they are reduced to.
    assert seen.peak_bytes < 4 * (8 * b * width + 3 * block * block), seen.peak_bytes
    with LargestTensor() as matrix:
        full_softmax(images, texts, s).backward()
    assert matrix.elements >= b * b
    assert matrix.peak_bytes > 4 * b * b


def test_memory_grows_with_the_batch_not_with_its_square():
    peaks = []
    for b in (256, 512, 1024):
        images, texts = pairs(b, 8, torch.float32)
        with LargestTensor() as seen:
            tiled_contrastive_loss(images, texts, 14.3, block_size=32).backward()
        peaks.append(seen.peak_bytes)
    assert peaks[1] < 2.05 * peaks[0]
    assert peaks[2] < 2.05 * peaks[1]


def test_without_a_gradient_none_is_made():
    images, texts = pairs(60, dtype=torch.float32)
    with torch.no_grad(), LargestTensor() as seen:
        loss = tiled_sigmoid_loss(images, texts, 10.0, -10.0, block_size=8)
    assert not loss.requires_grad
    assert seen.peak_bytes < 4 * (3 * 60 * 20 + 3 * 64)
    with torch.no_grad():
        assert not tiled_contrastive_loss(images, texts, 10.0).requires_grad
    (only,) = torch.autograd.grad(tiled_contrastive_loss(images.detach(), texts, 10.0), texts)
    (wanted,) = torch.autograd.grad(full_softmax(images.detach(), texts, 10.0), texts)
    torch.testing.assert_close(only, wanted, rtol=1e-4, atol=1e-6)


def with_nan(matrix, row, value=math.nan):
    matrix = matrix.detach().clone()
    matrix[row, 1] = value
    return matrix


def bad_inputs():
    images, texts = (t.detach() for t in pairs(6))
    clip, nce, sigmoid = tiled_contrastive_loss, tiled_info_nce_loss, tiled_sigmoid_loss
    narrow = texts[:, :7]
    yield "widths", lambda: clip(images, narrow, 1.0), "image_embeds are 20 wide and text_embeds 7"
    yield "widths, sigmoid", lambda: sigmoid(images, narrow, 1.0, 0.0), "image_embeds are 20 wide"
    yield "rows", lambda: clip(images, texts[:4], 1.0), "6 rows and text_embeds 4"
    yield "rows, sigmoid", lambda: sigmoid(images, texts[:4], 1.0, 0.0), "6 rows and text_embeds 4"
    yield "empty", lambda: clip(images[:0], texts[:0], 1.0), "no rows"
    yield "empty, sigmoid", lambda: sigmoid(images[:0], texts[:0], 1.0, 0.0), "no rows"
    yield "shape", lambda: clip(images[0], texts[0], 1.0), r"image_embeds must be a matrix"
    yield "scalar", lambda: clip(images.sum(), texts, 1.0), r"image_embeds must be a matrix"
    yield "NaN images", lambda: clip(with_nan(images, 3), texts, 1.0), "image_embeds hold NaN.* 1 of 6 rows.* row 3"
    yield "infinite texts", lambda: clip(images, with_nan(texts, 2, math.inf), 1.0), "text_embeds hold NaN.*row 2"
    far = "image_embeds hold numbers up to .* and text_embeds up to .*, too large for the products' float32"
    yield "overflow", lambda: clip(1e30 * images.float(), 1e30 * texts.float(), 1.0), far
    yield "overflow, sigmoid", lambda: sigmoid(1e30 * images.float(), 1e30 * texts.float(), 1.0, 0.0), far
    zeros = torch.zeros(6, dtype=torch.int64)
    yield "-inf negative", lambda: nce(images, with_nan(images, 5, -math.inf), 1.0, labels=zeros), "keys hold"
    yield "NaN, sigmoid", lambda: sigmoid(with_nan(images, 3), texts, 1.0, 0.0), "image_embeds hold NaN"
    yield "labels high", lambda: nce(images, texts, 1.0, labels=torch.tensor([0, 1, 6, 3, 4, 5])), r"labels\[2\] is 6"
    yield "labels low", lambda: nce(images, texts, 1.0, labels=torch.tensor([0, -1, 2, 3, 4, 5])), r"labels\[1\] is -1"
    yield "labels short", lambda: nce(images, texts, 1.0, labels=torch.tensor([0])), "labels must be 6 int64"
    yield "labels float", lambda: nce(images, texts, 1.0, labels=torch.zeros(6)), "labels must be 6 int64"
    yield "few keys", lambda: nce(images, texts[:5], 1.0), "6 queries but only 5 keys: give labels"
    yield "infinite scale", lambda: clip(images, texts, math.inf), "logit_scale is inf"
    yield "NaN scale tensor", lambda: clip(images, texts, torch.tensor(math.nan)), "logit_scale is nan"
    yield "NaN scale", lambda: nce(images, texts, math.nan), "scale is nan"
    yield "two scales", lambda: clip(images, texts, torch.ones(2)), r"one number, not a tensor of shape \(2,\)"
    yield "NaN bias", lambda: sigmoid(images, texts, 1.0, torch.tensor(math.nan)), "logit_bias is nan"
    yield "two biases", lambda: sigmoid(images, texts, 1.0, torch.ones(2)), "logit_bias must be one number"
    yield "integers", lambda: clip(images.long(), texts, 1.0), "dtype torch.int64"
    yield "integer texts", lambda: clip(images, texts.int(), 1.0), "text_embeds are of dtype torch.int32"
    yield "complex", lambda: clip(images, texts.cfloat(), 1.0), "dtype torch.complex64"
    yield "devices", lambda: clip(images, texts.to("meta"), 1.0), "one device"
    yield "block 0", lambda: clip(images, texts, 1.0, block_size=0), "block_size=0"
    yield "block 1.5", lambda: sigmoid(images, texts, 1.0, 0.0, block_size=1.5), "block_size=1.5"
    yield "backend", lambda: clip(images, texts, 1.0, backend="cuda"), "backend='cuda' is not known"
    yield "reduction", lambda: clip(images, texts, 1.0, reduction="max"), "reduction='max'"
    yield "reduction, sigmoid", lambda: sigmoid(images, texts, 1.0, 0.0, reduction="none"), "use 'mean' or 'sum'"


@pytest.mark.parametrize(("call", "message"), [pytest.param(c, m, id=name) for name, c, m in bad_inputs()])
def test_a_mistake_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_triton_on_the_cpu_is_refused_unless_interpreted(monkeypatch):
    images, texts = pairs(4, dtype=torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="triton' cannot run on CPU|triton', which is not installed"):
        tiled_contrastive_loss(images, texts, 1.0, backend="triton")
    assert "TRITON_INTERPRET" not in os.environ


def test_large_but_finite_features_are_not_mistaken_for_infinite():
    """The sum of the features overflows, the features and their products do not."""
    images = torch.full((4, 2), 2e38)
    texts = torch.full((4, 2), 1e-38, requires_grad=True)
    loss = tiled_contrastive_loss(images, texts, 1.0)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)
