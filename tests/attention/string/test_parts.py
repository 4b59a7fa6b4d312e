"""The attention itself: plain definition, fused passes and masked chunks against brute force, in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from modelwright.attention.string.masked import masked_attention
from modelwright.attention.string.reference import string_attention_reference, string_positions
from modelwright.attention.string.rotation import Rotation, match, rotate
from modelwright.attention.string.two_pass import can_two_pass, two_pass_attention

SIZE = 8
SCALING = 0.35


def frequencies(base=50.0, pairs=SIZE // 2):
    return base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)


def at(x, positions, freq=None):
    """Rotates (…, rows, size) row by row."""
    angles = positions.double()[:, None] * (frequencies() if freq is None else freq)
    return rotate(x, angles.cos(), angles.sin())


def far(shift, window):
    return lambda x: at(x, torch.full((x.shape[2],), window - shift))


def tensors(rows, keys, *, batch=2, heads=4, kept=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, SIZE, generator=generator, dtype=torch.float64).to(dtype)

    query, key, value = draw(batch, heads, rows), draw(batch, kept, keys), draw(batch, kept, keys)
    place = torch.arange(keys)
    return at(query, place[keys - rows :]), at(key, place), value


def test_positions_are_the_papers():
    assert string_positions(6, 3, 1).tolist() == [
        [0, -1, -1, -1, -1, -1],
        [1, 0, -1, -1, -1, -1],
        [2, 1, 0, -1, -1, -1],
        [1, 2, 1, 0, -1, -1],
        [2, 1, 2, 1, 0, -1],
        [3, 2, 1, 2, 1, 0],
    ]
    # The example of section 4.2: the last row of Llama 3.1, in thousands scaled down by 1,000.
    last = string_positions(128, 42, 5)[-1].tolist()
    assert last == [*range(85 + 5, 4, -1), *range(41, -1, -1)]


@pytest.mark.parametrize(("shift", "window"), [(5, 2), (5, 5), (9, 0), (1, 0), (1, 1), (30, 3)])
def test_the_definition_is_every_pair_rotated_by_its_own_position(shift, window):
    rows = 12
    generator = torch.Generator().manual_seed(1)
    raw_query, raw_key, value = torch.randn(3, 1, 1, rows, SIZE, generator=generator, dtype=torch.float64)
    place = torch.arange(rows)
    query, key = at(raw_query, place), at(raw_key, place)
    out, weights = string_attention_reference(query, far(shift, window)(query), key, value, shift, scaling=SCALING)
    position = string_positions(rows, shift, window)
    scores = torch.full((rows, rows), -torch.inf, dtype=torch.float64)
    for m, n in itertools.product(range(rows), repeat=2):
        if n <= m:
            turned = at(raw_query[0, 0, m : m + 1], position[m, n][None])[0]
            scores[m, n] = SCALING * turned @ raw_key[0, 0, n]
    torch.testing.assert_close(weights[0, 0], scores.softmax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(out[0, 0], scores.softmax(-1) @ value[0, 0], rtol=0, atol=1e-12)


@settings(max_examples=150)
@given(
    keys=st.integers(1, 40),
    share=st.floats(0, 1),
    shift=st.integers(0, 41),
    window=st.integers(0, 41),
    kept=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 3),
    at_once=st.sampled_from([1, 500, 2**24]),
)
def test_two_passes_and_chunks_are_one_softmax(keys, share, shift, window, kept, seed, at_once):
    rows, window = max(1, round(share * keys)), min(window, shift)
    query, key, value = tensors(rows, keys, kept=kept, seed=seed)
    to_far = far(shift, window)
    expected, weights = string_attention_reference(query, to_far(query), key, value, shift, scaling=SCALING)
    found = two_pass_attention(query, key, value, to_far, shift, scaling=SCALING)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    chunked, none = masked_attention(query, key, value, to_far, shift, scaling=SCALING, scores_at_once=at_once)
    assert none is None
    torch.testing.assert_close(chunked, expected, rtol=0, atol=1e-12)
    _, whole = masked_attention(query, key, value, to_far, shift, scaling=SCALING, weights=True)
    torch.testing.assert_close(whole, weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    query, key, value = tensors(300, 300)
    to_far = far(100, 16)
    expected, _ = string_attention_reference(query, to_far(query), key, value, 100, scaling=SCALING)
    found = two_pass_attention(*(t.to(dtype) for t in (query, key, value)), to_far, 100, scaling=SCALING)
    assert found.dtype == dtype
    bound = {torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("attend", ["reference", "two_pass", "masked"])
def test_without_shift_and_with_window_equal_to_shift_it_is_plain_attention(attend):
    query, key, value = tensors(17, 23)
    plain, _ = string_attention_reference(query, query, key, value, 99, scaling=SCALING)
    for shift in (0, 1, 6, 22, 23, 40):
        to_far = far(shift, shift)
        if attend == "reference":
            found = string_attention_reference(query, to_far(query), key, value, shift, scaling=SCALING)[0]
        elif attend == "two_pass":
            found = two_pass_attention(query, key, value, to_far, shift, scaling=SCALING)
        else:
            found = masked_attention(query, key, value, to_far, shift, scaling=SCALING)[0]
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_no_distance_is_counted_twice():
    """With a one-hot value for each key, the output is the weights: they sum to one and each is there once."""
    keys, shift = SIZE, 3
    query, key, _ = tensors(keys, keys, kept=4)
    value = torch.eye(keys, dtype=torch.float64).expand(2, 4, keys, keys).contiguous()
    to_far = far(shift, 1)
    _, weights = string_attention_reference(query, to_far(query), key, value, shift, scaling=SCALING)
    found = two_pass_attention(query, key, value, to_far, shift, scaling=SCALING)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, keys, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-12)


def test_the_first_far_row_sees_one_far_key_at_position_window():
    shift, window = 5, 2
    position = string_positions(9, shift, window)
    assert position[shift].tolist()[:6] == [window, 4, 3, 2, 1, 0]
    assert int((torch.arange(9)[:, None] - torch.arange(9) >= shift)[shift].sum()) == 1
    query, key, value = tensors(shift + 1, shift + 1, kept=4)
    zero = two_pass_attention(query, key, value, lambda q: q * 0 - 1e9 * key[:, :, :1].sign(), shift, scaling=SCALING)
    # A far query that hates key 0 removes it from the last row, and from no other.
    last = query[:, :, -1:]
    without = string_attention_reference(last, last, key[:, :, 1:], value[:, :, 1:], 99, scaling=SCALING)
    torch.testing.assert_close(zero[:, :, -1:], without[0], rtol=0, atol=1e-12)
    plain, _ = string_attention_reference(query, query, key, value, 99, scaling=SCALING)
    torch.testing.assert_close(zero[:, :, :-1], plain[:, :, :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masks_of_both_kinds(softcap):
    query, key, value = tensors(10, 14)
    to_far = far(4, 2)
    real = torch.ones(2, 14, dtype=torch.bool)
    real[0, :3] = False
    real[1, 6] = False
    expected, _ = string_attention_reference(
        query, to_far(query), key, value, 4, scaling=SCALING, mask=real, softcap=softcap
    )
    options = {"scaling": SCALING, "softcap": softcap}
    for at_once in (1, 300, 2**24):
        found, _ = masked_attention(query, key, value, to_far, 4, mask=real, scores_at_once=at_once, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    full = torch.rand(2, 1, 10, 14, generator=generator) < 0.5
    full[..., 0] = True
    expected, _ = string_attention_reference(
        query, to_far(query), key, value, 4, scaling=SCALING, mask=full, softcap=softcap
    )
    added = torch.zeros(full.shape, dtype=torch.float64).masked_fill(~full, torch.finfo(torch.float64).min)
    for mask in (full, added):
        found, _ = masked_attention(query, key, value, to_far, 4, mask=mask, scores_at_once=200, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_places_decide_what_is_far():
    query, key, value = tensors(6, 9)
    to_far = far(4, 2)
    order = torch.tensor([[0, 1, 2, 3, 4, 5, 5, 6, 6]]).expand(2, -1)
    full = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    found, _ = masked_attention(
        query, key, value, to_far, 4, scaling=SCALING, mask=full, places=(order[:, 3:], order), scores_at_once=100
    )
    scores = torch.where(
        (order[0, 3:, None] - order[0] >= 4),
        to_far(query) @ key.repeat_interleave(2, 1).mT,
        query @ key.repeat_interleave(2, 1).mT,
    )
    expected = (SCALING * scores).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_go_through_the_chunks_and_are_refused_by_the_kernels():
    query, key, value = (t.requires_grad_() for t in tensors(7, 7, batch=1, heads=2, kept=1))
    assert not can_two_pass(query, value, "cpu")
    with torch.no_grad():
        assert can_two_pass(query, value, "cpu")
    to_far = far(3, 1)

    def attend(q, k, v):
        return masked_attention(q, k, v, to_far, 3, scaling=SCALING, scores_at_once=20)[0]

    assert torch.autograd.gradcheck(attend, (query, key, value))


def test_no_square_tensor_is_made():
    """The largest tensor of a long prompt is far below rows × keys."""
    from modelwright.kernels.largest_tensor import LargestTensor

    query, key, value = tensors(2048, 2048, batch=1, heads=1, kept=1, dtype=torch.float32)
    with LargestTensor() as largest:
        two_pass_attention(query, key, value, far(700, 16), 700, scaling=SCALING)
    assert 0 < largest.elements <= 3 * 2048 * SIZE


class Frequencies(torch.nn.Module):
    def __init__(self, values):
        super().__init__()
        self.register_buffer("inv_freq", values)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_rotation_of_the_rotated_query_is_the_rotation_of_the_sum(dtype, bound):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(1, 3, 40, SIZE, generator=generator, dtype=torch.float64)
    place = torch.arange(40)
    shift, window = 17, 4
    rotation = Rotation(Frequencies(frequencies().to(dtype)), "inv_freq")
    freq = rotation.frequencies.double()
    turned = rotation.by(at(raw, place, freq).to(dtype), window - shift)
    expected = at(raw, place - shift + window, freq)
    assert float((turned.double() - expected).abs().max()) < bound * raw.abs().max()
    torch.testing.assert_close(rotation.at(raw, place), at(raw, place, freq), rtol=0, atol=1e-12)


def test_at_128_thousand_positions_float32_angles_are_enough_and_bfloat16_ones_are_not():
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, max_position_embeddings=131072, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    module = LlamaRotaryEmbedding(config)
    raw = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    place = torch.arange(131072 - 64, 131072)
    shift, window = 131072 // 3, 128
    near, _ = apply_rotary_pos_emb(raw, raw, *module(raw, place[None]))
    rotation = Rotation(module, "inv_freq")
    expected = at(raw.double(), place - shift + window, module.inv_freq.double())
    length = raw.norm(dim=-1)
    missed = (rotation.by(near, window - shift) - expected).norm(dim=-1) / length
    assert float(missed.max()) < 0.01
    coarse = (torch.tensor(float(window - shift)).bfloat16() * module.inv_freq.bfloat16()).double()
    wrong = rotate(near, coarse.cos().float(), coarse.sin().float())
    assert float(((wrong - expected).norm(dim=-1) / length).min()) > 0.3


@pytest.mark.parametrize(("interleaved", "start", "pairs"), [(False, 0, 4), (True, 0, 4), (False, 0, 2), (True, 4, 2)])
def test_the_layout_is_found_from_two_queries(interleaved, start, pairs):
    freq = frequencies(pairs=pairs)
    modules = [Frequencies(frequencies(7.0)), Frequencies(freq)]
    raw = torch.randn(4, 3, 1, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angle = 11 * freq
    there = rotate(raw, angle.cos(), angle.sin(), interleaved=interleaved, start=start)
    found = match({0: torch.cat((raw, there)), 1: torch.cat((raw, raw)), 2: torch.cat((raw, -raw))}, 11, modules)
    assert (found[0].module, found[0].interleaved, found[0].start) == (modules[1], interleaved, start)
    assert found[1] is None
    assert 2 not in found


@pytest.mark.parametrize(("interleaved", "start", "pairs"), [(False, 0, 4), (True, 0, 4), (False, 0, 2), (True, 4, 2)])
def test_the_tables_for_a_kernel_are_the_rotation(interleaved, start, pairs):
    rotation = Rotation(Frequencies(frequencies(pairs=pairs)), "inv_freq", interleaved, start)
    x = torch.randn(2, 3, 5, SIZE, generator=torch.Generator().manual_seed(0))
    turn = rotation.turn(-11, SIZE, x.device)
    assert {table.dtype for table in turn} == {torch.float32, torch.int32}
    torch.testing.assert_close(turn.of(x), rotation.by(x, -11), rtol=0, atol=1e-6)
    torch.testing.assert_close(turn.of(x.double()), rotation.at(x.double(), torch.full((5,), -11)), rtol=0, atol=1e-6)


def test_frequencies_that_the_model_changes_are_followed():
    module = Frequencies(frequencies())
    rotation = Rotation(module, "inv_freq")
    x = torch.randn(1, 1, 2, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = rotation.by(x, -5)
    assert torch.equal(first, rotation.by(x, -5))
    module.inv_freq.mul_(0.5)
    second = rotation.by(x, -5)
    torch.testing.assert_close(second, at(x, torch.full((2,), -5), module.inv_freq), rtol=0, atol=1e-14)
    module.inv_freq = frequencies(7.0)
    torch.testing.assert_close(rotation.by(x, -5), at(x, torch.full((2,), -5), frequencies(7.0)), rtol=0, atol=1e-14)
