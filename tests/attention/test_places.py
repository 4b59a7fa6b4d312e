"""Where queries and keys stand: in a plain sequence, in a cache, with padding on either side."""

import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from modelwright.attention.places import Places, places_mask


def made(rows, keys, offset=0, first=0, real=None, function=causal_mask_function, **more):
    mask = places_mask(
        batch_size=1, q_length=rows, kv_length=keys, q_offset=offset, kv_offset=first, mask_function=function,
        attention_mask=None if real is None else torch.tensor(real), **more,
    )  # fmt: skip
    return mask, Places.read(mask, rows)


def test_a_plain_sequence():
    mask, places = made(3, 3)
    assert Places.are(mask)
    assert places.plain
    assert places.query.tolist() == places.key.tolist() == [[0, 1, 2]]
    assert places.distance(0, 3).tolist() == [[[0, -1, -1], [1, 0, -1], [2, 1, 0]]]
    last = Places.last(2, 3, torch.device("cpu"))
    assert torch.equal(last.distance(0, 2), places.distance(1, 3))


def test_in_a_cache_that_has_room():
    """A static cache shows places that are not yet written."""
    _, places = made(2, 6, offset=torch.tensor(2))
    assert places.query.tolist() == [[2, 3]]
    assert places.distance(0, 2).tolist() == [[[2, 1, 0, -1, -1, -1], [3, 2, 1, 0, -1, -1]]]


def test_with_padding():
    _, places = made(4, 4, real=[[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]])
    assert places.query.tolist() == [[-2, -1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert places.key.tolist() == [[-1, -1, 0, 1], [0, 1, 2, -1], [0, -1, 2, 3]]
    assert not places.plain
    assert places.distance(3, 4).tolist() == [[[-1, -1, 1, 0]], [[3, 2, 1, -1]], [[3, -1, 1, 0]]]
    # One sequence: padding at the end changes nothing for what stands before it, padding in between does.
    assert made(4, 4, real=[[1, 1, 1, 0]])[1].plain
    for real in ([0, 1, 1, 1], [1, 0, 1, 1]):
        assert not made(4, 4, real=[real])[1].plain
    # A mask that is shorter than the keys, as with a static cache, and one whose first keys are gone.
    _, places = made(1, 4, offset=1, real=[[0, 1]])
    assert places.distance(0, 1).tolist() == [[[-1, 0, -1, -1]]]
    _, places = made(1, 2, offset=3, first=2, real=[[0, 1, 1, 1]])
    assert places.distance(0, 1).tolist() == [[[1, 0]]]


def test_everything_else_is_a_matrix_of_distances():
    mask, _ = made(4, 4, function=sliding_window_causal_mask_function(2), local_size=2)
    assert not Places.are(mask)
    assert mask.dtype == torch.int32
    assert mask[0, 0].tolist() == [[0, -1, -1, -1], [1, 0, -1, -1], [-1, 1, 0, -1], [-1, -1, 1, 0]]
