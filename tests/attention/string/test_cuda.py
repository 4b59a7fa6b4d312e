"""STRING on a card: every path against the definition in float64, and whole models against themselves on the CPU."""

import itertools

import pytest
import torch

from modelwright.attention.string import StringConfig, apply_string
from modelwright.attention.string.hook import Call
from modelwright.attention.string.reference import string_attention_reference
from modelwright.attention.string.rotation import Rotation
from modelwright.attention.string.serve import by_path, path_of, works
from modelwright.models.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
SHAPES = [(2, 4, 2, 900, 900, 64), (1, 8, 2, 500, 777, 128), (1, 4, 4, 1, 3000, 128), (2, 12, 3, 5, 640, 64)]
#: Largest error of an output of size 1, by the rounding of queries, weights and outputs.
BOUNDS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def rotation(size):
    module = torch.nn.Module()
    module.register_buffer("inv_freq", 10_000.0 ** -(torch.arange(0, size, 2, device="cuda") / size))
    return Rotation(module, "inv_freq")


def call(shape, dtype, lefts=()):
    batch, heads, kept, rows, keys, size = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, h, n, size, generator=generator).to("cuda", dtype)
        for h, n in ((heads, rows), (kept, keys), (kept, keys))
    )
    mask = None
    if any(lefts):
        mask = torch.arange(keys, device="cuda") >= torch.tensor(lefts, device="cuda")[:, None]
    return Call(
        query=query, key=key, value=value, mask=mask, lefts=tuple(lefts), places=None, rotation=rotation(size),
        scaling=size**-0.5, softcap=None, dropout=0.0, weights=False,
    )  # fmt: skip


def expected(made, shift, window):
    query, key, value = (t.double() for t in (made.query, made.key, made.value))
    far = made.rotation.by(query, window - shift)
    return string_attention_reference(query, far, key, value, shift, scaling=made.scaling, mask=made.mask)[0]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("path", ["triton", "flash", "cudnn"])
def test_every_path(path, dtype):
    if dtype == torch.float32 and path != "triton":
        pytest.skip("sixteen bits only")
    for shape, shift in itertools.product(SHAPES, (1, 100, 333, 639)):
        made = call(shape, dtype)
        if not works(path, made.query.device, dtype, shape[-1], shape[1] // shape[2]):
            assert path == "cudnn", f"{path} does not work here"
            pytest.skip("cuDNN gives no log-sum-exp here")
        found, _ = by_path(made, path, shift=shift, window=shift // 4)
        error = float((found.double() - expected(made, shift, shift // 4)).abs().max())
        assert error < BOUNDS[dtype], (shape, shift)


@pytest.mark.parametrize("path", ["triton", "flash"])
def test_padding(path):
    for shape, lefts in ((SHAPES[0], (0, 200)), (SHAPES[0], (850, 3)), (SHAPES[3], (600, 7))):
        made = call(shape, torch.float16, lefts)
        found, _ = by_path(made, path, shift=200, window=32)
        seen = made.mask[:, None, -shape[3] :, None]  # rows that are padding themselves may hold anything
        error = ((found.double() - expected(made, 200, 32)) * seen).abs().max()
        assert float(error) < BOUNDS[torch.float16]


def test_choice():
    assert path_of(call(SHAPES[0], torch.bfloat16)) is not None
    assert path_of(call(SHAPES[0], torch.float64)) is None


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt_neox", None)])
@torch.no_grad()
def test_models(family, dtype):
    """Prefill, chunks, decoding and padding on the card are the float64 model on the CPU."""
    options = {"max_position_embeddings": 512, "initializer_range": 0.1, "hidden_size": 128, "num_attention_heads": 4}
    model = tiny_model(family, **options)
    dtype = dtype or torch.float16
    ids = torch.randint(3, 259, (2, 400), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    config = StringConfig(shift=150, window=32)
    exact = model.to(dtype).double()  # the same weights
    with apply_string(exact, config):
        whole, padded = exact(ids).logits, exact(ids, attention_mask=mask).logits
    plain = exact(ids).logits
    model = exact.to("cuda", dtype)
    with apply_string(model, config):
        cache, parts = None, []
        for part in ids.cuda().split([149, 1, 1, 100, 148, 1], dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        found = [torch.cat(parts, 1), model(ids.cuda()).logits, model(ids.cuda(), attention_mask=mask.cuda()).logits]
        greedy = model.generate(ids.cuda(), max_new_tokens=4, do_sample=False)
        assert greedy.shape[0] == 2
    spread = float(whole.std())
    share = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 0.04}[dtype]
    for logits, wanted in zip(found, (whole, whole, padded), strict=True):
        missed = (logits.double().cpu() - wanted) * mask[..., None]
        assert float(missed.abs().mean()) < share * spread
    assert float((whole - plain).abs().mean()) > 2 * share * spread
