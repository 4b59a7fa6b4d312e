"""Patches of another size: what they must keep, and that nothing of the model is changed."""

import copy

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from modelwright.curation.jest.flexi import (
    check_patch_size,
    patch_size,
    relative_cost,
    resize_kernel,
    resize_positions,
    vision_embeddings,
)
from modelwright.errors import UserError
from modelwright.models.tiny_pairs import tiny_pair


def features(model, pixels):
    return model.get_image_features(pixel_values=pixels).pooler_output


@pytest.fixture(params=["clip", "siglip"])
def model(request):
    return tiny_pair(request.param).model


def test_resizing_to_the_same_size_is_the_identity(model):
    kernel = torch.randn(3, 2, 8, 8)
    assert resize_kernel(kernel, 8) is kernel
    positions = torch.randn(17, 4)
    assert resize_positions(positions, 4, 4, 1) is positions
    pixels = torch.randn(2, 3, 32, 32)
    with patch_size(model, 8):
        assert "forward" not in vision_embeddings(model).__dict__
        inside = features(model, pixels)
    with patch_size(model, None):
        assert torch.equal(inside, features(model, pixels))


def test_enlarged_patches_have_the_tokens_of_the_small_ones():
    kernel = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    patches = torch.randn(20, 3, 4, 4, dtype=torch.float64)
    enlarged = interpolate(patches, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        conv2d(enlarged, resize_kernel(kernel, 8)), conv2d(patches, kernel), rtol=1e-10, atol=1e-10
    )


def test_an_even_picture_has_even_tokens_at_every_size():
    kernel = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for size in (12, 16, 32):
        even = conv2d(torch.ones(1, 3, size, size, dtype=torch.float64), resize_kernel(kernel, size))
        torch.testing.assert_close(even.flatten(), kernel.sum((1, 2, 3)), rtol=1e-9, atol=1e-9)


def test_positions_are_those_of_transformers(model):
    embeddings = vision_embeddings(model)
    positions, special = embeddings.position_embedding.weight, embeddings.num_positions - embeddings.num_patches
    tokens = torch.zeros(1, special + 36, 32)
    expected = embeddings.interpolate_pos_encoding(tokens, 48, 48)
    torch.testing.assert_close(resize_positions(positions, 6, 6, special)[None], expected)


def test_a_tower_with_larger_patches_equals_its_parts_and_leaves_nothing_behind(model):
    before = copy.deepcopy(model.state_dict())
    embeddings = vision_embeddings(model)
    pixels = torch.randn(2, 3, 32, 32)
    plain = features(model, pixels)
    with patch_size(model, 16):
        tokens = embeddings(pixels)
        special = embeddings.num_positions - 16
        assert tokens.shape == (2, special + 4, 32)
        coarse = features(model, pixels)
        with patch_size(model, 32):
            assert embeddings(pixels).shape == (2, special + 1, 32)
        assert torch.equal(features(model, pixels), coarse)
    patches = conv2d(
        pixels, resize_kernel(embeddings.patch_embedding.weight, 16), embeddings.patch_embedding.bias, stride=16
    )
    expected = patches.flatten(2).transpose(1, 2) + resize_positions(
        embeddings.position_embedding.weight[special:], 2, 2
    )
    torch.testing.assert_close(tokens[:, special:], expected)
    assert not torch.allclose(coarse, plain)
    assert torch.equal(features(model, pixels), plain)
    assert "forward" not in embeddings.__dict__
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_tower_is_itself_again_after_an_exception(model):
    with pytest.raises(RuntimeError, match="out"), patch_size(model, 16):
        raise RuntimeError("out")
    assert "forward" not in vision_embeddings(model).__dict__


def test_gradient_flows_to_kernel_and_positions(model):
    embeddings = vision_embeddings(model)
    with patch_size(model, 16):
        features(model, torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert embeddings.position_embedding.weight.grad.abs().sum() > 0


def test_the_cost_falls_with_the_tokens():
    model = tiny_pair("clip", image_size=64).model
    assert relative_cost(model, None) == relative_cost(model, 8) == 1
    assert relative_cost(model, 32) < relative_cost(model, 16) < relative_cost(model, 16, text_tokens=20) < 1


def test_the_cost_is_that_of_the_products_that_are_made():
    from torch.utils.flop_counter import FlopCounterMode

    pair = tiny_pair("siglip", image_size=64)
    pair.model.set_attn_implementation("eager")
    pixels = torch.randn(200, 3, 64, 64)  # so many that resizing the kernel does not count
    counted = {}
    for size in (8, 16):
        with patch_size(pair.model, size), FlopCounterMode(display=False) as counter, torch.no_grad():
            features(pair.model, pixels)
        counted[size] = counter.get_total_flops()
    assert relative_cost(pair.model, 16) == pytest.approx(counted[16] / counted[8], rel=0.05)


def test_the_papers_vision_tower_at_twice_the_patch_size():
    from types import SimpleNamespace

    from transformers import SiglipVisionConfig

    config = SiglipVisionConfig(image_size=256, patch_size=16)  # ViT-B/16
    embeddings = torch.nn.Module()
    embeddings.config, embeddings.patch_size, embeddings.num_patches = config, 16, 256
    embeddings.patch_embedding = torch.nn.Conv2d(3, 1, 16)
    embeddings.position_embedding = torch.nn.Embedding(256, 1)
    text = SimpleNamespace(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    embeddings.get_submodule("").config = config
    model = torch.nn.Sequential(embeddings)
    model.config = SimpleNamespace(text_config=text)
    assert relative_cost(model, 32) == pytest.approx(0.25, abs=0.02)
    assert relative_cost(model, 32, text_tokens=64) == pytest.approx(0.40, abs=0.02)


def test_bad_sizes_and_models(model):
    for size in (5, 64, 0):
        with pytest.raises(UserError, match="cannot be cut into patches"):
            check_patch_size(model, size)
    with pytest.raises(UserError, match="leave scoring_patch_size out"), patch_size(tiny_pair("bert").model, 16):
        pass
