"""The mixture: exact shares at every point, the same stream for the same seed, resumed and shared out without loss."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer
from modelwright.training.packing import PackedBlocks
from modelwright.training.stability_gap.mixture import Mixture, MixtureDataset, interleave, warn_of_repeats

# A token says which source and which block it is of: 1000 * source + block.
SOURCES = {
    name: np.repeat(1000 * i + np.arange(n), 4) for i, (name, n) in enumerate({"a": 40, "b": 30, "c": 3}.items())
}
RATES = {"a": 0.82, "b": 0.135, "c": 0.045}


def mixture(**keys):
    return Mixture(SOURCES, RATES, **{"tokens_per_epoch": 4 * 40, "block_size": 4, "resample": ["a"], **keys})


def blocks(stream, start, stop):
    return [int(stream[i]["input_ids"][0]) for i in range(start, stop)]


rates = st.lists(st.integers(1, 1000), min_size=1, max_size=7).map(lambda w: [x / sum(w) for x in w])


@given(rates, st.integers(1, 400))
def test_shares_are_less_than_one_block_off_at_every_point(rates, length):
    pattern = interleave(rates, length)
    taken = np.cumsum(pattern[:, None] == np.arange(len(rates)), axis=0)
    wanted = np.arange(1, length + 1)[:, None] * np.array(rates)
    assert (np.abs(taken - wanted) < 1 + 1e-3).all()  # rates are kept to a millionth


@pytest.mark.parametrize("rates", [[1.0], [0.82, 0.18], [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02], [1 / 3] * 3])
def test_shares_are_exact_where_they_come_out_even(rates):
    length = 200
    assert np.bincount(interleave(rates, length)).tolist() == pytest.approx([r * length for r in rates], abs=0.999)


def test_the_tokens_of_the_stream_have_the_rates_within_one_block():
    stream = mixture(tokens_per_epoch=4 * 400)
    seen = dict.fromkeys(RATES, 0)
    for i in range(3 * 400):
        ids = stream[i]["input_ids"]
        assert "abc"[int(ids[0]) // 1000] == stream.source(i)
        seen[stream.source(i)] += len(ids)
        for name, rate in RATES.items():
            # Epochs begin anew: what rounding leaves may add up from one to the next.
            assert abs(seen[name] - rate * 4 * (i + 1)) < 4 * (1 + i // 400)
    assert stream.counts == {"a": 328, "b": 54, "c": 18}


def test_one_source_alone_is_the_plain_run_bitwise():
    tokens = np.random.default_rng(0).integers(0, 99, 4 * 57 + 3)
    plain = PackedBlocks(tokens, 4, 300, seed=5)
    for resample in ([], ["domain"]):
        stream = Mixture(
            {"domain": tokens}, {"domain": 1.0}, tokens_per_epoch=len(tokens), block_size=4, resample=resample, seed=5
        )
        for i in range(300):
            assert torch.equal(stream[i]["input_ids"], plain[i]["input_ids"])


def test_fixed_sources_repeat_and_drawn_ones_change_inside_their_pool():
    stream = mixture()
    n = stream.blocks_per_epoch
    epochs = [blocks(stream, e * n, (e + 1) * n) for e in range(4)]
    of = [{s: sorted(b for b in epoch if b // 1000 == s) for s in range(3)} for epoch in epochs]
    assert all(one[1] == of[0][1] and one[2] == of[0][2] for one in of)
    assert all(one[0] != of[0][0] for one in of[1:])
    assert all(len(set(one[0])) == len(one[0]) and set(one[0]) <= set(range(40)) for one in of)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # the order changes in any case
    fixed = mixture(resample=[])
    kept = [sorted(blocks(fixed, e * n, (e + 1) * n)) for e in range(4)]
    assert kept == [kept[0]] * 4
    assert len({tuple(blocks(fixed, e * n, (e + 1) * n)) for e in range(4)}) == 4


def test_equal_seeds_give_equal_streams_and_others_do_not():
    assert blocks(mixture(seed=3), 0, 120) == blocks(mixture(seed=3), 0, 120)
    assert blocks(mixture(seed=3), 0, 120) != blocks(mixture(seed=4), 0, 120)


def test_any_item_can_be_had_without_those_before():
    stream, other = mixture(), mixture()
    whole = blocks(stream, 0, 160)
    for k in (0, 1, 39, 40, 77, 159):
        assert blocks(other, k, 160) == whole[k:]
    assert other.__getitems__([159, 3])["input_ids"][:, 0].tolist() == [whole[159], whole[3]]


def test_a_source_smaller_than_its_share_is_repeated_evenly_and_that_is_said():
    stream = mixture(tokens_per_epoch=4 * 400, resample=["a", "b", "c"])
    counts = np.bincount([b for b in blocks(stream, 0, 400) if b < 1000])
    assert counts.sum() == 328
    assert set(counts) == {8, 9}
    assert stream.report(2)["c"] == {"share": 0.045, "tokens": 72, "available": 12, "passes": 12.0}
    assert [line.split("'")[1] for line in warn_of_repeats(stream, 2)] == ["a", "c"]
    assert warn_of_repeats(mixture(), 1) == []


# The iterable


def dataset(**keys):
    options = {"tokens_per_epoch": 4 * 40, "block_size": 4, "resample": ["a"], **keys}
    return MixtureDataset(SOURCES, RATES, **options)


def firsts(items):
    return [int(item["input_ids"][0]) for item in items]


def test_epochs_are_those_of_the_stream():
    whole, data = mixture(), dataset()
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        assert firsts(data) == blocks(whole, 40 * epoch, 40 * epoch + 40)
        assert len(data) == 40
    assert firsts(data) == blocks(whole, 80, 120)  # again, from its beginning


@pytest.mark.parametrize("k", [0, 1, 17, 40])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_it_resumes_at_step_k(k, world):
    data = dataset().shard(world - 1, world)
    data.set_epoch(1)
    iterator, whole = iter(data), firsts(data)
    data.set_epoch(0)
    data.set_epoch(1)
    iterator = iter(data)
    done = firsts([next(iterator) for _ in range(min(k, len(data)))])
    state = data.state_dict()
    again = dataset().shard(world - 1, world)
    again.load_state_dict(state)
    again.set_epoch(1)  # as Trainer does when it resumes
    assert done + firsts(again) == whole


def test_ranks_and_workers_share_the_stream_out():
    whole = blocks(mixture(), 0, 40)
    parts = [firsts(dataset().shard(rank, 3)) for rank in range(3)]
    assert [len(p) for p in parts] == [len(dataset().shard(rank, 3)) for rank in range(3)]
    assert [parts[i % 3][i // 3] for i in range(40)] == whole
    loaded = DataLoader(dataset().shard(0, 2), batch_size=None, num_workers=2)
    assert sorted(firsts(loaded)) == sorted(whole[::2])


def test_texts_are_read_with_the_tokenizer():
    texts = {"domain": ["hello world"] * 5, "code": ["def f(): pass"] * 5}
    data = MixtureDataset(
        texts, {"domain": 0.5, "code": 0.5}, tokens_per_epoch=64, block_size=8, tokenizer=byte_tokenizer()
    )
    assert len(list(data)) == 8
    with pytest.raises(UserError, match="'domain' is text: give the tokenizer"):
        MixtureDataset(texts, {"domain": 1.0}, tokens_per_epoch=64, block_size=8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rates": {"a": 0.5, "b": 0.4}}, "must sum to 1, but a 0.5, b 0.4 sum to 0.9"),
        ({"rates": {"a": 0.5, "d": 0.5}}, "no source 'd': known: a, b, c"),
        ({"rates": {"a": 1.5, "b": -0.5}}, "rate of 'b' must be 0 or more, not -0.5"),
        ({"rates": {"a": math.nan}}, "rate of 'a'"),
        ({"sources": {**SOURCES, "b": np.empty(0, dtype=int)}}, "'b' has a rate, but no tokens"),
        ({"sources": {**SOURCES, "b": np.arange(3)}}, "'b' has a rate, but only 3 tokens, less than one block of 4"),
        ({"tokens_per_epoch": 3}, "less than one block of 4"),
        ({"resample": ["z"]}, "no source 'z' to draw anew"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(keys, message):
    options = {"sources": SOURCES, "rates": RATES, "tokens_per_epoch": 160, "block_size": 4, **keys}
    with pytest.raises(UserError, match=message):
        Mixture(options.pop("sources"), options.pop("rates"), **options)


def test_a_source_without_a_rate_is_not_used_and_may_be_empty():
    stream = Mixture(
        {"a": SOURCES["a"], "b": np.empty(0, dtype=int)}, {"a": 1.0, "b": 0.0}, tokens_per_epoch=40, block_size=4
    )
    assert stream.names == ["a"]
    with pytest.raises(UserError, match="rank must lie between 0 and 1"):
        dataset().shard(2, 2)
