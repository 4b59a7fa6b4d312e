"""Several processes give what one gives. ring_process.py makes the comparisons; here is what they must come to."""

import functools
import json
import signal
import tempfile
from pathlib import Path

import pytest
import torch

import forked
from modelwright.errors import UserError
from modelwright.training.inf_cl import ring
from training.inf_cl import ring_process


def run(mode, size, answers):
    """Starts a group; returns the reports of the ranks in ``answers``, when these have ended."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [forked.start(ring_process.main, rank, size, mode, folder) for rank in range(size)]
        try:
            for rank in answers:
                processes[rank].join(forked.PATIENCE)
                assert processes[rank].exitcode == 0
        finally:
            codes = [p.exitcode for p in processes]
            for process in processes:
                process.kill()  # also ends one that was stopped
                process.join()
        return codes, [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in answers]


@functools.cache
def reports(size):
    """What every process of a group found, all cases in one start."""
    return run("cases", size, range(size))[1]


GROUPS = [(2, "world"), (3, "world"), (3, "group 0 1"), (3, "group 1 2")]


def found(size, group, case):
    values = [report[f"{group}: {case}"] for report in reports(size) if f"{group}: {case}" in report]
    assert len(values) == (size if group == "world" else 2)
    return values


@pytest.mark.parametrize(("size", "group"), GROUPS)
@pytest.mark.parametrize(
    "case",
    [
        "symmetric",
        "one direction",
        "hard negatives",
        "scale of 100",
        "sigmoid",
        "sum",
        "none",
        "tiled_contrastive_loss",
        "tiled_contrastive_loss, sum",
        "tiled_info_nce_loss",
        "tiled_sigmoid_loss",
        "data parallel",
        "afterwards",
    ],
)
def test_processes_give_the_loss_and_gradients_of_one(size, group, case):
    for differences in found(size, group, case):
        assert all(value <= 1e-12 for value in differences.values()), differences
    quantities = {
        "none": {"rows"},
        "sigmoid": {"loss", "queries", "keys", "scale", "bias"},
        "data parallel": {"logit_scale", "query.0.weight", "query.0.bias", "key.0.weight", "key.0.bias"},
    }
    quantities["tiled_sigmoid_loss"] = quantities["sigmoid"]
    assert set(differences) == quantities.get(case, {"loss", "queries", "keys", "scale"})


@pytest.mark.parametrize(("size", "group"), GROUPS)
@pytest.mark.parametrize("travel", ["wide", "as they are", "as the function decides"])
def test_bfloat16_rows_are_added_up_in_float32(size, group, travel):
    for differences in found(size, group, f"bfloat16 keys travel {travel}"):
        # The loss and the scale's gradient know no bfloat16; those of rows (below 1) are rounded to it at the end.
        assert differences["loss"] < 1e-5
        assert differences["scale"] < 1e-5
        assert differences["queries"] < 2**-8
        assert differences["keys"] < 2**-8


@pytest.mark.parametrize(("size", "group"), GROUPS)
def test_no_tensor_is_as_large_as_a_matrix_of_two_ranks_rows(size, group):
    for sizes in found(size, group, "memory"):
        assert sizes["largest"] < sizes["matrix"] / 10


@pytest.mark.parametrize(("size", "group"), GROUPS)
@pytest.mark.parametrize(
    ("what", "first", "last"),
    [
        ("rows", "has 13 × 7 queries", "has 12 × 7 queries"),
        ("width", "13 × 7 keys", "13 × 6 keys"),
        ("dtype", "float64", "float32"),
        ("direction", "softmax without", "softmax with columns without"),
        ("gradient", "without gradient", "with gradient"),
        ("weights", "[1.0, 2.0", ".0]"),
    ],
)
def test_processes_that_differ_are_refused_on_every_rank_and_not_hung(size, group, what, first, last):
    said = found(size, group, f"refused: {what}")
    assert len(set(said)) == 1  # the same sentence everywhere
    assert first in said[0]
    assert last in said[0]
    if what != "weights":
        members = size if group == "world" else 2
        assert [f"rank {i} has" in said[0] for i in range(members + 1)] == [True] * members + [False]


@pytest.mark.parametrize(("size", "group"), GROUPS)
def test_a_process_without_pairs_is_named_on_every_rank(size, group):
    members = size if group == "world" else 2
    wanted = f"at least one pair on every process, and rank {members - 1} of {members} has none"
    assert all(wanted in said for said in found(size, group, "empty"))


def test_a_process_outside_the_group_is_told_so():
    assert "not a member" in reports(3)[2]["not a member"]


@pytest.mark.parametrize(("mode", "size"), [("killed", 3), ("absent", 3), ("stopped", 2)])
def test_when_a_process_is_lost_the_others_stop_and_say_so(mode, size):
    codes, said = run(mode, size, range(1, size))
    assert codes[0] == (None if mode == "stopped" else -signal.SIGKILL)
    for rank, report in enumerate(said, start=1):
        assert f"has ended or does not answer, found rank {rank} of {size}" in report["message"]
        assert report["seconds"] < 60


def alone(**options):
    torch.manual_seed(0)
    q, k = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return q, k, {"group": None, "block_size": 4, "backend": "torch"} | options


def test_one_process_calls_no_collective_and_gives_the_whole_matrix(monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("a collective without a group")

    for name in ("batch_isend_irecv", "all_reduce", "all_gather"):
        monkeypatch.setattr(torch.distributed, name, forbidden)
    q, k, options = alone()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert ring.average_gradient(scale, None) is scale
    rows, columns = ring.ring_softmax(q, k, **options, columns=True)
    x = q @ k.T
    torch.testing.assert_close(rows, x.logsumexp(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(columns, x.logsumexp(0), rtol=0, atol=1e-12)
    assert ring.ring_softmax(q, k, **options, columns=False)[1] is None
    weights = torch.randn(2, 6, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((weights * torch.stack([rows, columns])).sum(), [q, k]),
        torch.autograd.grad((weights * torch.stack([x.logsumexp(1), x.logsumexp(0)])).sum(), [q, k]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", [True, False])
def test_the_gradient_is_that_of_finite_differences(columns):
    q, k, options = alone()
    torch.autograd.gradcheck(lambda q, k: ring.ring_softmax(q, k, **options, columns=columns)[: 1 + columns], (q, k))
    bias = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *a: ring.ring_sigmoid(*a, **options), (q, k, bias))


def test_sigmoid_without_gradients_makes_none(monkeypatch):
    q, k, options = alone()
    asked = []
    original = ring._sweeps("torch").sigmoid_sweep

    def sigmoid_sweep(*arguments, gradients, **more):
        asked.append(gradients)
        return original(*arguments, gradients=gradients, **more)

    monkeypatch.setattr(ring._sweeps("torch"), "sigmoid_sweep", sigmoid_sweep)
    with torch.no_grad():
        without = ring.ring_sigmoid(q, k, torch.tensor(0.5, dtype=torch.float64), **options)
    assert without == ring.ring_sigmoid(q, k, torch.tensor(0.5, dtype=torch.float64), **options)
    assert asked == [False, True]


def test_keys_in_float16_get_the_gradient_of_a_mean_over_a_large_batch():
    """The gradient of the sum, which is made first, is beyond 65,504 here."""
    rows = 1024
    q = torch.full((rows, 2), 100.0)
    k = torch.ones(rows, 2, dtype=torch.float16, requires_grad=True)
    loss = ring.ring_sigmoid(q, k, torch.tensor(0.0), None, block_size=None, backend="torch") / rows
    loss.backward()
    torch.testing.assert_close(k.grad, torch.full_like(k, 100.0 * (rows - 1) / rows))


def test_merging_running_logsumexps_is_exact_at_the_ends():
    """What the ring merges with: nothing yet (-inf), two of them, and numbers whose exponentials overflow."""
    nothing, large = torch.tensor(-torch.inf), torch.tensor(1e4)
    assert torch.logaddexp(nothing, nothing) == -torch.inf
    assert torch.logaddexp(nothing, large) == large
    assert torch.logaddexp(large, large) == large + torch.log(torch.tensor(2.0))


def test_the_order_of_merging_does_not_matter():
    parts = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3
    a, b, c, d = parts
    merge = torch.logaddexp
    for found in (merge(merge(merge(a, b), c), d), merge(merge(a, b), merge(c, d)), merge(d, merge(c, merge(b, a)))):
        torch.testing.assert_close(found, parts.logsumexp(0), rtol=1e-14, atol=1e-12)


def test_a_backend_error_becomes_one_sentence():
    with (
        pytest.raises(UserError, match=r"found rank 0 of 1 \(Connection closed by peer\): see"),
        ring._Ring(None, 1).answering(),
    ):
        raise RuntimeError("[/a/pair.cc:5] Connection closed by peer. More words.\nAnd lines.")
