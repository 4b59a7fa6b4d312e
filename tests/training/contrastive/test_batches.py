"""The order of pairs: whole, without repetition, the same for any number of processes and from any step."""

import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.training.contrastive.batches import Batches, Order, prepared, take


class Numbers:
    """Row i is {"query": i}; reading a row that is in ``bad`` fails."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def rows(self, indices):
        for i in indices:
            if i in self.bad:
                raise UserError(f"Row {i} is bad.")
        return [{"query": int(i)} for i in indices]


def collate(rows):
    return {"x": torch.tensor([r["query"] for r in rows])}


def broken(rows):
    raise ZeroDivisionError("not the user's fault")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_each_pass_is_a_permutation_shared_out_by_rank(rows, processes, each, seed):
    size = processes * each
    if rows < size:
        with pytest.raises(UserError, match="fewer than one batch"):
            Order(rows, size, seed, 0, processes)
        return
    ranks = [Order(rows, size, seed, r, processes) for r in range(processes)]
    steps = rows // size
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            whole = Order(rows, size, seed).of(step)
            assert np.concatenate([o.share(step) for o in ranks]).tolist() == whole.tolist()
            seen += whole.tolist()
        assert len(set(seen)) == len(seen) == steps * size
        assert set(seen) <= set(range(rows))


def test_passes_and_seeds_differ():
    a, b = Order(100, 10, 0), Order(100, 10, 1)
    first = [a.of(s).tolist() for s in range(10)]
    assert first != [a.of(s).tolist() for s in range(10, 20)]
    assert first != [b.of(s).tolist() for s in range(10)]
    assert first == [Order(100, 10, 0).of(s).tolist() for s in reversed(range(10))][::-1]


def everything(batches):
    found = []
    while part := [(b.step, b.rows.tolist(), [p["x"].tolist() for p in b]) for b in batches]:
        found.append(part)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_sub_batches_hold_the_rows_of_the_order(workers):
    order = Order(23, 7, 3)
    keys = {"mini_batch_size": 3, "steps": 8, "workers": workers}
    passes = everything(Batches(Numbers(23), collate, order, **keys))
    assert [[f[0] for f in part] for part in passes] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    found = [f for part in passes for f in part]
    for step, rows, parts in found:
        assert rows == order.of(step).tolist()
        assert [len(p) for p in parts] == [3, 3, 1]
        assert [i for p in parts for i in p] == rows
    batches = Batches(Numbers(23), collate, order, **keys)
    next(iter(batches))
    for start in (1, 3, 4):
        batches.begin(start, 8)
        rest = everything(batches)
        assert [f for part in rest for f in part] == found[start:]
        assert rest[-1] == passes[-1]


def test_what_a_step_leaves_is_not_taken_for_the_next():
    order = Order(12, 6)
    stream = iter(Batches(Numbers(12), collate, order, mini_batch_size=2, steps=2))
    first = next(stream)
    next(iter(first))
    second = next(stream)
    assert torch.cat([p["x"] for p in second]).tolist() == second.rows.tolist() == order.of(1).tolist()


def test_a_ranks_batch_knows_everyones_rows():
    batch = next(iter(Batches(Numbers(12), collate, Order(12, 6, 0, 1, 2), mini_batch_size=2, steps=1)))
    assert (len(batch), batch.sizes) == (2, [2, 1])
    assert batch.everyone.tolist() == Order(12, 6).of(0).tolist()
    assert batch.rows.tolist() == batch.everyone[3:].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_nothing_from_the_generator_of_dropout(workers):
    before = torch.get_rng_state()
    list(prepared(Numbers(4), collate, [[0, 1], [2]], workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_said_in_one_sentence(workers):
    with pytest.raises(UserError) as caught:
        list(prepared(Numbers(4, bad=[2]), collate, [[0, 1], [2]], workers=workers))
    assert str(caught.value) == "Row 2 is bad."
    with pytest.raises(ZeroDivisionError, match="not the user's fault"):
        list(prepared(Numbers(4), broken, [[0]], workers=workers))


def interrupted(rows):
    os.kill(os.getpid(), signal.SIGINT)
    return collate(rows)


def test_workers_outlive_an_interrupt():
    found = list(prepared(Numbers(4), interrupted, [[0, 1], [2]], workers=1))
    assert [f["x"].tolist() for f in found] == [[0, 1], [2]]


@pytest.mark.parametrize("left", [False, True])
def test_take_gathers_pairs_and_pads_to_the_longest(left):
    parts = [
        {
            "input_ids": torch.tensor([[1, 2], [3, 4]]),
            "attention_mask": torch.ones(2, 2, dtype=torch.long),
            "pixel_values": torch.arange(2.0).view(2, 1, 1, 1),
            "negative_input_ids": torch.tensor([[10], [11], [20], [21]]),
        },
        {
            "input_ids": torch.tensor([[5, 6, 7]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.long),
            "pixel_values": torch.full((1, 1, 1, 1), 2.0),
            "negative_input_ids": torch.tensor([[30, 1], [31, 1]]),
        },
    ]
    found = take(parts, [2, 1], [2, 1], {"input_ids": 9}, left=left)
    assert found["input_ids"].tolist() == [[5, 6, 7], [9, 3, 4] if left else [3, 4, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1] if left else [1, 1, 0]]
    assert found["pixel_values"].flatten().tolist() == [2.0, 1.0]
    filled = [[9, 20], [9, 21]] if left else [[20, 9], [21, 9]]
    assert found["negative_input_ids"].tolist() == [[30, 1], [31, 1], *filled]
    assert take(parts, [2, 1], [0], {})["input_ids"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Order(5, 6), "hold 5 pairs, fewer than one batch of 6"),
        (lambda: Order(50, 6, processes=4), "cannot be shared evenly by 4 processes"),
        (lambda: Order(5, 0), "at least 1 pair"),
        (lambda: Batches(Numbers(5), collate, Order(5, 5), mini_batch_size=0, steps=1), "mini_batch_size must be"),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(UserError, match=message):
        make()
