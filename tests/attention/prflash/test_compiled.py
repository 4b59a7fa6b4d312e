"""The compiled kernel computes what the torch blocks do: on a GPU forward and backward, on a CPU forward."""

import shutil

import pytest
import torch

from modelwright.attention.prflash import ProbFlashConfig, block_attention
from modelwright.attention.prflash.kernel import flex_blocks
from modelwright.models.tiny import tiny_model


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="a C++ compiler is needed to compile for the CPU")
@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_on_a_cpu(mode):
    torch.compiler.reset()  # else torch takes sizes for dynamic, for which its C++ is wrong (2.13)
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 256, 32, generator=g) for h in (4, 2, 2))
    config = ProbFlashConfig(block_size=32, mode=mode, correction=True, per_head=mode == "independent")
    kept = config.kept(torch.arange(8), 8, 4, True, 3)
    expected = block_attention(query, key, value, kept, 32, scaling=0.2, correction=config.bias(8))
    found = flex_blocks(query, key, value, kept, 32, scaling=0.2, correction=config.bias(8))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("tokens", [512, 1000])
def test_on_a_gpu(mode, per_head, tokens):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, h, tokens, 64, generator=g).cuda().requires_grad_() for h in (4, 2, 2)]
    config = ProbFlashConfig(block_size=128, mode=mode, correction=True, per_head=per_head)
    blocks = -(-tokens // 128)
    kept = config.kept(torch.arange(blocks), blocks, 4, True, 3)
    weight = torch.randn(2, 4, tokens, 64, generator=g).cuda()
    results = []
    for attend in (flex_blocks, block_attention):
        out = attend(*leaves, kept, 128, scaling=0.125, correction=config.bias(blocks))
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for found, expected in zip(*results, strict=True):  # TF32 in the kernel's products
        assert float((found - expected).norm() / expected.norm()) < 5e-3


@gpu
def test_a_model_trains_on_a_gpu_as_on_a_cpu():
    def gradients(device):
        model = tiny_model("llama", initializer_range=0.3, hidden_size=128, head_dim=32).train().to(device)
        ids = torch.randint(3, 250, (2, 512), generator=torch.Generator().manual_seed(0)).to(device)
        with ProbFlashConfig(law="uniform", share=0.5).apply(model):
            torch.manual_seed(0)
            model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.cpu() for p in model.parameters()]

    for found, expected in zip(gradients("cuda"), gradients("cpu"), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 2e-2
