"""Compiled flex_attention computes what the bias does: on a GPU forward and backward, on a CPU forward."""

import shutil

import pytest
import torch
from transformers.masking_utils import causal_mask_function

from modelwright.attention.flex import compiled
from modelwright.attention.places import Places, places_mask
from modelwright.attention.rope_alibi import RopeAlibiConfig, head_slopes, rope_alibi_attention
from modelwright.attention.rope_alibi.attention import causal_blocks, score_mod
from modelwright.models.tiny import tiny_model


class Bare:
    training = False


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="a C++ compiler is needed to compile for the CPU")
@pytest.mark.parametrize("distance", ["linear", "harmonic"])
def test_on_a_cpu(distance):
    torch.compiler.reset()
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 128, 32, generator=g) for h in (4, 2, 2))
    real = torch.ones(2, 128, dtype=torch.bool)
    real[1, :9] = False
    mask = places_mask(q_length=128, kv_length=128, mask_function=causal_mask_function, attention_mask=real)
    places = Places.read(mask, 128)
    expected, _ = rope_alibi_attention(RopeAlibiConfig(distance=distance), Bare(), query, key, value, mask, scaling=0.2)
    change = score_mod(places, 2, head_slopes("harmonic", 4), distance, None)
    found = compiled(query, key, value, change, causal_blocks(places, 2, mask), 0.2)
    shown = real[:, None].expand(2, 4, -1)
    torch.testing.assert_close(found[shown], expected[shown], rtol=0, atol=1e-5)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
@pytest.mark.parametrize("distance", ["linear", "harmonic"])
@pytest.mark.parametrize("learnable", [False, True])
def test_a_model_trains_on_a_gpu_as_on_a_cpu(distance, learnable):
    def gradients(device):
        model = tiny_model("llama", initializer_range=0.3, hidden_size=128, head_dim=32).train().to(device)
        RopeAlibiConfig(distance=distance, learnable=learnable, lambda_a=0.5).install(model)
        ids = torch.randint(3, 250, (2, 300), generator=torch.Generator().manual_seed(0)).to(device)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.cpu() for name, p in model.named_parameters()}

    found, expected = gradients("cuda"), gradients("cpu")
    assert list(found) == list(expected)
    for name in expected:
        assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 2e-2, name


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_batch_is_generated_on_a_gpu_as_alone(dtype):
    model = tiny_model("llama", initializer_range=0.3, hidden_size=128, head_dim=32).to("cuda", dtype)
    ids = torch.randint(3, 250, (1, 150), generator=torch.Generator().manual_seed(0)).cuda()
    padded = torch.cat((torch.zeros_like(ids[:, :9]), ids), dim=1)
    with RopeAlibiConfig().apply(model), torch.no_grad():
        alone = model(ids).logits
        mask = (padded > 0).long()
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 9:]
        steps = [
            model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=c) for c in (None, "static")
        ]
    assert float((found - alone).float().norm() / alone.float().norm()) < (1e-3 if dtype == torch.float32 else 3e-2)
    if dtype == torch.float32:
        assert torch.equal(*steps)
