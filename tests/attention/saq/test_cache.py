"""The staircase cache: every state it can be in follows from the tokens alone, and what it weighs from the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from modelwright.attention.saq import KiviCache, StaircaseQuantizedCache, memory_table, plot_memory, staircase_bytes
from modelwright.attention.saq.layer import StaircaseLayer
from modelwright.attention.saq.stored import StoredStates
from modelwright.errors import UserError
from modelwright.kernels.packed import quantise
from modelwright.models.tiny import FAMILIES, tiny_config

LEVELS = (16, 8, 4, 2)
SIZES = {"segment_length": 16, "group_size": 8}


def states(tokens, batch=2, heads=2, size=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, tokens, size, generator=generator).to(dtype)


def filled(tokens, levels=LEVELS, dtype=torch.float32, **options):
    layer = StaircaseLayer(levels, 16, 8)
    layer.update(*states(tokens, dtype=dtype, **options))
    return layer


def tensors(layer):
    return [t for pair in layer.segments for part in pair for t in (part.codes, part.scale, part.minimum)] + [
        layer.keys, layer.values,
    ]  # fmt: skip


def same(one, other):
    assert [[p.bits for p in pair] for pair in one.segments] == [[p.bits for p in pair] for pair in other.segments]
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def bits(layer):
    return [keys.bits for keys, _ in layer.segments for _ in range(keys.segments)]


def whole(layer):
    """All that is held, dequantised."""
    return layer.update(*(s[:, :, :0] for s in states(1, batch=len(layer.keys), dtype=layer.dtype)))


@pytest.mark.parametrize("levels", [LEVELS, (16, 2), (16, 8), (16, 4, 2), (16, 8, 4, 2, 1)], ids=str)
def test_each_segment_has_the_bits_of_its_age(levels):
    layer = StaircaseLayer(levels, 16, 8)
    for tokens in range(1, 150):
        layer.update(*(s[:, :, tokens - 1 : tokens] for s in states(150)))
        number = tokens // 16
        assert bits(layer) == [levels[min(number - i, len(levels) - 1)] for i in range(number)]
        assert layer.keys.shape[2] == tokens % 16
        assert layer.get_seq_length() == tokens
        assert layer.get_mask_sizes(3) == (tokens + 3, 0)
        # What has the last level stands together; above it there is a segment for each level.
        assert len(layer.young) == min(number, len(levels) - 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=25)
@given(data=st.data())
def test_however_tokens_come_the_state_is_the_same_bit_for_bit(dtype, data):
    levels = data.draw(st.sampled_from([LEVELS, (16, 2), (16, 4, 1), (16, 8, 4, 2, 1)]))
    tokens = data.draw(st.integers(1, 150))
    both = states(tokens, dtype=dtype)
    layer, begin = StaircaseLayer(levels, 16, 8), 0
    while begin < tokens:
        end = min(tokens, begin + data.draw(st.integers(1, 60)))
        layer.update(*(s[:, :, begin:end] for s in both))
        begin = end
    same(layer, filled(tokens, levels, dtype))


def test_token_by_token_equals_a_prompt_of_many_segments():
    """More than are quantised at a time."""
    layer, both = StaircaseLayer(LEVELS, 16, 8), states(16 * 40 + 3)
    for i in range(both.shape[3]):
        layer.update(*(s[:, :, i : i + 1] for s in both))
    same(layer, filled(both.shape[3]))


def test_old_segments_are_not_written_again():
    """Neither requantised nor, of a young segment that does not age, copied."""
    layer = filled(16 * 6)
    kept = [t.clone() for part in layer.old for t in (part.codes, part.scale, part.minimum)]
    layer.update(*states(16 * 2, seed=1))
    for before, after in zip(kept, (t for p in layer.old for t in (p.codes, p.scale, p.minimum)), strict=True):
        assert torch.equal(after[:, :, : before.shape[2]], before)
    young = list(layer.young)
    layer.update(*states(5, seed=2))
    assert all(a is b for a, b in zip(layer.young, young, strict=True))


def test_a_segment_goes_down_one_level_at_a_time():
    """From what it had become, through the level between.

    (From the original at once it would be nearly the same: 255, 15 and 3 steps are grids within each other.)
    """
    both = states(16 * 3)
    layer = filled(16 * 3)
    for x, pair, along in zip(both, zip(*layer.segments, strict=True), ("tokens", "channels"), strict=True):
        segments = [x[:, :, i * 16 : i * 16 + 16].unsqueeze(2) for i in range(3)]
        first, second, third = (quantise(segment, 8, 8, along) for segment in segments)
        for found, expected in zip(pair, (first.at(4).at(2), second.at(4), third), strict=True):
            for name in ("codes", "scale", "minimum"):
                assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_call_sees_its_own_tokens_and_the_rest_as_they_came():
    both = states(100)
    layer = StaircaseLayer(LEVELS, 16, 8)
    keys, values = layer.update(*(s[:, :, :50] for s in both))
    assert torch.equal(keys, both[0, :, :, :50])
    assert torch.equal(values, both[1, :, :, :50])
    held = [k.dequantised() for k, _ in layer.segments]
    keys, values = layer.update(*(s[:, :, 50:80] for s in both))
    assert isinstance(keys, StoredStates)
    assert keys.shape == values.shape == (2, 2, 80, 8)
    assert torch.equal(keys + 0, torch.cat((*held, both[0, :, :, 48:80]), 2))
    assert torch.equal(values[:, :, 48:], both[1, :, :, 48:80])
    assert not torch.equal(values[:, :, :48], both[1, :, :, :48])


def test_error_is_within_the_half_scales_of_the_levels_passed():
    """Ranges of groups bound the scales: each level adds half of range / (2**bits - 1) at most; and a little."""
    tokens = 16 * 5
    both = states(tokens)
    layer = filled(tokens)
    for x, found, axis in zip(both, whole(layer), (-2, -1), strict=True):
        groups = x.unflatten(axis, (-1, 8))
        spread = (groups.amax(axis, keepdim=True) - groups.amin(axis, keepdim=True)).expand_as(groups).reshape(x.shape)
        off = (found - x).abs()
        for segment, number in enumerate(bits(layer)):
            passed = [b for b in (8, 4, 2) if b >= number]
            # A group of later levels may be wider by the error of those before.
            half, wider = torch.zeros(()), 1.0
            for level in passed:
                half = half + wider / (2**level - 1) / 2
                wider += 1 / (2**level - 1)
            at = slice(segment * 16, segment * 16 + 16)
            assert bool((off[:, :, at] <= half * spread[:, :, at] * 1.01 + 1e-3).all())
            assert float(off[:, :, at].max()) > 0


@pytest.mark.parametrize("value", [0.0, -3.25])
def test_equal_states_stay_exact(value):
    x = torch.full((1, 1, 100, 8), value)
    layer = StaircaseLayer(LEVELS, 16, 8)
    layer.update(x, x)
    for found in layer.update(x[:, :, :1], x[:, :, :1]):
        assert torch.equal(found + 0, torch.full((1, 1, 101, 8), value))


@pytest.mark.parametrize(("levels", "tokens"), [((16,), 200), (LEVELS, 15), (LEVELS, 16)])
def test_without_quantised_segments_it_is_a_dynamic_cache(levels, tokens):
    config = tiny_config("llama")
    ours, plain = StaircaseQuantizedCache(config, levels, **SIZES), DynamicCache(config=config)
    both = states(tokens)
    for begin, end in ((0, 7), (7, 8), (8, tokens)):
        for layer in range(2):
            found = ours.update(*(s[:, :, begin:end] for s in both), layer)
            expected = plain.update(*(s[:, :, begin:end] for s in both), layer)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert not isinstance(found[0], StoredStates)
    assert ours.get_seq_length() == plain.get_seq_length() == tokens


@settings(max_examples=40)
@given(tokens=st.integers(1, 150), remove=st.integers(0, 150))
def test_cropping_keeps_what_is_left(tokens, remove):
    remove = min(tokens, remove)
    layer = filled(tokens)
    before = [t + 0 for t in whole(layer)]
    layer.crop(-remove)
    assert layer.get_seq_length() == tokens - remove
    for found, expected in zip(whole(layer), before, strict=True):
        assert torch.equal(found + 0, expected[:, :, : tokens - remove])
    # It goes on, and no segment has more bits than its age allows.
    layer.update(*states(40, seed=3))
    assert layer.get_seq_length() == tokens - remove + 40
    number = (tokens - remove + 40) // 16
    assert len(bits(layer)) == number
    assert all(b <= LEVELS[min(number - i, 3)] for i, b in enumerate(bits(layer)))
    layer.update(*states(16 * 4, seed=4))
    assert bits(layer)[-3:] == [2, 4, 8]
    assert set(bits(layer)[:-2]) == {2}


def test_cropping_within_the_rest_leaves_no_trace():
    layer = filled(16 * 5 + 10)
    layer.crop(-4)
    same_tokens = StaircaseLayer(LEVELS, 16, 8)
    same_tokens.update(*(s[:, :, : 16 * 5 + 6] for s in states(16 * 5 + 10)))
    same(layer, same_tokens)


def test_cropping_what_is_not_there():
    layer = filled(20)
    with pytest.raises(ValueError, match="negative number, not 3"):
        layer.crop(3)
    with pytest.raises(UserError, match="holds 20 tokens: 21 cannot be removed"):
        layer.crop(-21)
    layer.crop(0)
    assert layer.get_seq_length() == 20
    StaircaseLayer().crop(-3)


def test_rows_of_a_batch():
    layer = filled(70, batch=3)
    plain = [t + 0 for t in whole(layer)]
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    for found, expected in zip(whole(layer), plain, strict=True):
        assert torch.equal(found + 0, expected[[2, 0, 0]])
    layer = filled(70, batch=3)
    layer.batch_select_indices(torch.tensor([1]))
    one = StaircaseLayer(LEVELS, 16, 8)
    one.update(*(s[1:2] for s in states(70, batch=3)))
    same(layer, one)
    layer.batch_repeat_interleave(2)
    assert layer.keys.shape[0] == 2
    assert torch.equal(whole(layer)[0][0], whole(one)[0][0])
    layer = filled(70, batch=3)
    layer.batch_select_indices(torch.tensor([False, True, False]))
    same(layer, one)
    empty = StaircaseLayer()
    empty.reorder_cache(torch.tensor([0]))
    empty.batch_repeat_interleave(2)


def test_moving_away_and_back():
    layer, other = filled(70), filled(70)
    layer.offload()
    layer.prefetch()
    same(layer, other)


def test_reset():
    layer = filled(70)
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(*states(50))
    same(layer, filled(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [LEVELS, (16, 2), (16, 8, 1), (16,)], ids=str)
@pytest.mark.parametrize("tokens", [5, 16, 50, 150])
def test_bytes_are_those_of_the_formula(tokens, levels, dtype):
    cache = StaircaseQuantizedCache(tiny_config("llama"), levels, **SIZES)
    assert cache.memory_bytes() == cache.bits_per_element() == 0
    for layer in range(2):
        cache.update(*states(tokens, dtype=dtype), layer)
    elements = 2 * 2 * 2 * 2 * 8  # keys and values, layers, rows, heads, size
    width = dtype.itemsize
    assert cache.memory_by_level() == list(staircase_bytes(tokens, elements, levels, 16, 8, element_bytes=width))
    held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in tensors(layer))
    assert cache.memory_bytes() == held  # nothing is kept alive behind a view
    quantised = tokens // 16 * 16 if len(levels) > 1 else 0
    number = quantised // 16
    bare = sum(levels[min(number - i, len(levels) - 1)] for i in range(number)) * 16 + (tokens - quantised) * width * 8
    assert cache.bits_per_element(metadata=False) == pytest.approx(bare / tokens)
    assert cache.bits_per_element() == pytest.approx((bare + quantised * 2 * 16 / 8) / tokens)
    assert cache.segment_bits() == bits(cache.layers[0])


def test_a_long_cache_is_several_times_smaller():
    levels = staircase_bytes(32_768, 2 * 8 * 128)
    assert sum(level.plain_bytes for level in levels) / sum(level.bytes for level in levels) > 5
    assert [level.tokens for level in levels] == [0, 128, 128, 32_768 - 256]
    table = memory_table(levels).splitlines()
    assert len(table) == 6
    assert table[-1].split()[:2] == ["all", "32,768"]


def test_plot(tmp_path):
    path = plot_memory(staircase_bytes(1000, 64), tmp_path / "memory.svg")
    assert "2 bits" in path.read_text() or path.stat().st_size > 1000
    with pytest.raises(UserError, match="exists"):
        plot_memory(staircase_bytes(1000, 64), path)
    with pytest.raises(UserError, match="must end in"):
        plot_memory([], tmp_path / "memory.txt")


def test_kivi_is_the_staircase_of_two_levels():
    config = tiny_config("llama")
    kivi, ours = KiviCache(config, 4, 16, 8), StaircaseQuantizedCache(config, (16, 4), 16, 8)
    for cache in (kivi, ours):
        cache.update(*states(100), 0)
    same(kivi.layers[0], ours.layers[0])
    assert set(kivi.segment_bits()) == {4}
    assert "KiviCache(levels=(16, 4)" in repr(kivi)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_length": 100}, "100 tokens cannot be cut into groups of 32"),
        (
            {"group_size": 32},
            "have 8 channels, which groups of 32 do not divide: give a group_size that does, such as 8 "
            r"\(--cache 'NAME: {group_size: 8}'\)",
        ),
        ({"levels": (16, 2, 4)}, "must fall with age"),
        ({"levels": (16, 4, 4)}, "must fall with age"),
        ({"levels": (16, 3)}, "3 bits cannot be packed"),
        ({"levels": (16, 8.0)}, "8.0 bits cannot be packed"),
        ({"levels": (8, 4)}, "the first must be 16"),
        ({"levels": ()}, "the first must be 16"),
        ({"levels": (16, 1), "segment_length": 4, "group_size": 4}, "does not fill whole bytes"),
        ({"segment_length": 0}, "segment_length is 0"),
        ({"group_size": 2.5}, "group_size is 2.5"),
        ({"group_size": 8, "metadata": torch.int8}, "metadata is torch.int8"),
    ],
)
def test_what_makes_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        StaircaseQuantizedCache(tiny_config("llama"), **options)


def test_models_that_forget_by_themselves():
    refused = {
        "gemma2": "sliding window of 16 tokens",
        "gemma3": "sliding window of 16 tokens",
        "mamba2": "full attention in all layers",
    }
    for family in FAMILIES:
        if family in refused:
            with pytest.raises(UserError, match=refused[family]):
                StaircaseQuantizedCache(tiny_config(family), **SIZES)
        else:
            StaircaseQuantizedCache(tiny_config(family), **SIZES)
    with pytest.raises(UserError, match="mistral model with a sliding window of 64 tokens"):
        StaircaseQuantizedCache(tiny_config("mistral", sliding_window=64), **SIZES)
    StaircaseQuantizedCache(tiny_config("qwen2", sliding_window=64, use_sliding_window=False), **SIZES)


def test_values_of_another_size_than_keys():
    layer = StaircaseLayer(LEVELS, 16, 8)
    with pytest.raises(UserError, match="Values of this model have 12 channels"):
        layer.update(torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 4, 12))


def test_there_is_no_bound_by_either_name():
    """Of transformers before 5.16 the second is abstract: without it there would be no cache."""
    layer = StaircaseQuantizedCache(tiny_config("llama"), group_size=8).layers[0]
    assert (layer.get_max_length(), layer.get_max_cache_shape()) == (-1, -1)
