"""The Triton kernels against the plain sweeps. test_pair_tiles_triton.py runs this file in a process of its own.

Triton decides at its import whether kernels are interpreted (on the CPU) or compiled: one process cannot have both.
"""

import os

import pytest
import torch

from modelwright.errors import UserError
from modelwright.kernels import pair_tiles
from modelwright.kernels import pair_tiles_triton as kernels
from modelwright.kernels.largest_tensor import LargestTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# Rows, columns, width: ragged against blocks of 64 and 128; narrow and wide of what a gradient may keep on the chip.
SIZES = [(200, 150, 40), (130, 300, 7), (64, 128, 64), (1, 1, 1), (3, 140, 17), (70, 40, 200)]
TOLERANCE = {"fp16x3": 1e-5, "fp16": 2e-3}
# Both operands rounded to 11 bits move a product x by up to 2 ** -11 |x|, and |x| is up to 10: by as much, relatively,
# does a weight exp(x - lse) move.
GRADIENT_TOLERANCE = {"fp16x3": 1e-5, "fp16": 10 * 2.0**-11}


def inputs(m, n, d, seed=0, scale=10.0):
    """Products of a few tens, as the scale of a contrastive loss makes them."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(m, d, generator=generator), torch.randn(n, d, generator=generator)
    q, k = scale * torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(k, dim=1)
    return q.to(DEVICE), k.to(DEVICE)


def weights(m, n):
    return torch.randn(m + n, generator=torch.Generator().manual_seed(1)).to(DEVICE).split([m, n])


def close(ours, expected, tolerance):
    """Within ``tolerance`` of the largest expected number."""
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    assert torch.isfinite(ours).all()
    worst = (ours.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert worst <= tolerance, float(worst)


@pytest.mark.parametrize("precision", ["fp16x3", "fp16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_log_sum_exps_and_their_gradients(size, precision):
    q, k = inputs(*size)
    row_grad, col_grad = weights(*size[:2])
    rows, cols = pair_tiles.softmax_sweep(q.double(), k.double())
    ours = kernels.softmax_sweep(q, k, precision=precision)
    close(ours[0], rows, TOLERANCE[precision])
    close(ours[1], cols, TOLERANCE[precision])
    expected = pair_tiles.softmax_sweep_backward(
        q.double(), k.double(), rows, row_grad.double(), cols, col_grad.double()
    )
    found = kernels.softmax_sweep_backward(q, k, rows.float(), row_grad, cols.float(), col_grad, precision=precision)
    for one, other in zip(found, expected):
        close(one, other, GRADIENT_TOLERANCE[precision])


def test_the_rows_own_logits_have_their_part():
    q, k = inputs(200, 150, 40)
    row_grad, col_grad = weights(200, 150)
    label_grad, labels = -2 * row_grad.abs(), torch.randperm(200, generator=torch.Generator().manual_seed(3)) % 150
    more = {"labels": labels.to(DEVICE), "label_grad": label_grad}
    rows, cols = pair_tiles.softmax_sweep(q.double(), k.double())
    x = (q.double() @ k.double().T).requires_grad_()
    parts = (row_grad * x.logsumexp(1)).sum() + (col_grad * x.logsumexp(0)).sum()
    (wanted,) = torch.autograd.grad(parts + (label_grad * x[torch.arange(200), labels]).sum(), x)
    wide = {"labels": more["labels"], "label_grad": label_grad.double(), "block_size": 70}
    plain = pair_tiles.softmax_sweep_backward(
        q.double(), k.double(), rows, row_grad.double(), cols, col_grad.double(), **wide
    )
    found = kernels.softmax_sweep_backward(
        q, k, rows.float(), row_grad, cols.float(), col_grad, precision="fp16x3", **more
    )
    for one, other, expected in zip(found, plain, (wanted @ k.double(), wanted.T @ q.double())):
        close(one, expected, 1e-5)
        torch.testing.assert_close(other, expected, rtol=1e-9, atol=1e-9)


def test_one_direction_gives_the_same_rows():
    q, k = inputs(200, 150, 40)
    row_grad, _ = weights(200, 150)
    both, (rows, none) = kernels.softmax_sweep(q, k), kernels.softmax_sweep(q, k, columns=False)
    assert none is None
    assert torch.equal(both[0], rows)
    expected = pair_tiles.softmax_sweep_backward(q.double(), k.double(), rows.double(), row_grad.double())
    for one, other in zip(kernels.softmax_sweep_backward(q, k, rows, row_grad), expected):
        close(one, other, 1e-5)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("size", "diagonal"), [((200, 150, 40), False), ((70, 130, 200), True), ((1, 1, 1), True)])
def test_sigmoid(size, diagonal, gradients):
    q, k = inputs(*size)
    bias = torch.tensor([-3.0], device=DEVICE)
    options = {"diagonal": diagonal, "gradients": gradients}
    expected = pair_tiles.sigmoid_sweep(q.double(), k.double(), bias.double(), **options)
    found = kernels.sigmoid_sweep(q, k, bias, **options, precision="fp16x3")
    for one, other in zip(found, expected):
        if one is None:
            assert other is None
        else:
            close(one, other, 1e-5)
    assert (found[1] is None) == (not gradients)


def test_sigmoid_counts_what_is_smaller_than_the_last_digit_of_one():
    """softplus(-20) is 2e-9: log(1 + 2e-9) is 0 in float32, and there are b * b of them."""
    q, k = inputs(130, 130, 8, scale=1.0)
    bias = torch.tensor(-20.0, device=DEVICE)
    expected = pair_tiles.sigmoid_sweep(q.double(), k.double(), bias.double(), diagonal=False, gradients=False)[0]
    close(kernels.sigmoid_sweep(q, k, bias, diagonal=False, gradients=False)[0], expected, 1e-5)


def test_products_of_ten_thousand():
    """Whole numbers: exact products. A log-sum-exp of 1e4 has steps of 1e-3: its exponential is as exact as that."""
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randint(-30, 31, (n, 12), generator=generator).float().to(DEVICE) for n in (130, 70))
    q[0], k[0], k[1] = 30, 28, -28  # 10080 and its negative
    x = q.double() @ k.double().T
    assert x.max() == 10080
    assert x.min() == -10080
    rows, cols = kernels.softmax_sweep(q, k, precision="fp16x3")
    close(rows, x.logsumexp(1), 1e-6)
    close(cols, x.logsumexp(0), 1e-6)
    row_grad, col_grad = weights(130, 70)
    expected = pair_tiles.softmax_sweep_backward(
        q.double(), k.double(), x.logsumexp(1), row_grad.double(), x.logsumexp(0), col_grad.double()
    )
    for one, other in zip(kernels.softmax_sweep_backward(q, k, rows, row_grad, cols, col_grad), expected):
        close(one, other, 1e-3)
    bias = torch.tensor(0.0, device=DEVICE)
    expected = pair_tiles.sigmoid_sweep(q.double(), k.double(), bias.double(), diagonal=False, gradients=True)
    for one, other in zip(
        kernels.sigmoid_sweep(q, k, bias, diagonal=False, gradients=True, precision="fp16x3"), expected
    ):
        close(one, other, 1e-5)


def test_two_runs_agree_to_the_last_bit():
    q, k = inputs(130, 70, 140)
    row_grad, col_grad = weights(130, 70)
    runs = []
    for _ in range(2):
        lse = kernels.softmax_sweep(q, k)
        gradients = kernels.softmax_sweep_backward(q, k, lse[0], row_grad, lse[1], col_grad)
        sums = kernels.sigmoid_sweep(q, k, torch.zeros(1, device=DEVICE), diagonal=False, gradients=True)
        runs.append([*lse, *gradients, *sums])
    assert all(torch.equal(*pair) for pair in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_stored_in_sixteen_bits_are_added_up_in_float32(dtype):
    q, k = (t.to(dtype) for t in inputs(130, 70, 40))
    rows, cols = pair_tiles.softmax_sweep(q.double(), k.double())
    ours = kernels.softmax_sweep(q, k)
    close(ours[0], rows, 1e-5)
    close(ours[1], cols, 1e-5)
    mixed = kernels.softmax_sweep(q.float(), k)  # as keys that travelled in bfloat16
    close(mixed[1], cols, 1e-5)
    expected = pair_tiles.sigmoid_sweep(
        q.double(), k.double(), torch.tensor(-1.0).double(), diagonal=False, gradients=True
    )
    for one, other in zip(
        kernels.sigmoid_sweep(q, k, torch.tensor(-1.0, device=DEVICE), diagonal=False, gradients=True), expected
    ):
        close(one, other, TOLERANCE["fp16"])


@pytest.mark.parametrize("block_size", [1, 16, 40, 512])
def test_any_block_size_gives_the_same(block_size):
    q, k = inputs(70, 50, 20)
    expected = pair_tiles.softmax_sweep(q.double(), k.double())
    for one, other in zip(kernels.softmax_sweep(q, k, block_size=block_size), expected):
        close(one, other, 1e-5)


def test_rows_that_do_not_lie_one_after_the_other():
    q, k = inputs(70, 50, 20)
    wide, turned = torch.cat([q, q], 1)[:, :20], k.T.contiguous().T
    assert not wide.is_contiguous()
    assert not turned.is_contiguous()
    assert torch.equal(kernels.softmax_sweep(wide, turned)[0], kernels.softmax_sweep(q, k)[0])


def test_no_tensor_is_as_large_as_the_matrix():
    q, k = inputs(400, 400, 4)  # large enough that the interpreter, which copies storages as bytes, stays below, too
    with LargestTensor() as largest:
        rows, cols = kernels.softmax_sweep(q, k)
        kernels.softmax_sweep_backward(q, k, rows, rows, cols, cols)
        kernels.sigmoid_sweep(q, k, torch.zeros(1, device=DEVICE), diagonal=True, gradients=True)
    assert 400 * 4 <= largest.elements < 400 * 400 / 10


def test_what_the_kernels_do_not_take_is_refused():
    q, k = inputs(4, 4, 4)
    with pytest.raises(UserError, match=r"not torch\.float64: use backend='torch'"):
        kernels.softmax_sweep(q.double(), k.double())
    with pytest.raises(UserError, match="'fast' is not known"):
        kernels.softmax_sweep(q, k, precision="fast")


@pytest.mark.parametrize("allowed", [True, False])
def test_the_default_precision_is_torchs(monkeypatch, allowed):
    q, k = inputs(4, 4, 4)
    monkeypatch.setattr(kernels, "_tf32_allowed", lambda: allowed)
    assert kernels._check(q, k, None) == ("fp16" if allowed else "fp16x3")
    assert kernels._check(q.half(), k.half(), None) == "fp16"
    assert kernels._check(q.half(), k, None) == ("fp16" if allowed else "fp16x3")
    assert kernels._check(q, k, "fp16") == "fp16"


@pytest.mark.parametrize(
    ("rows", "cols", "programs"), [(1, 1, 4), (5, 3, 4), (512, 512, 264), (7, 900, 264), (8192, 1, 264)]
)
def test_programs_share_the_blocks(rows, cols, programs):
    row_groups, rows_each, col_groups, cols_each = kernels._groups(rows, cols, programs)
    assert row_groups * col_groups <= programs
    for blocks, groups, each in ((rows, row_groups, rows_each), (cols, col_groups, cols_each)):
        assert (groups - 1) * each < blocks <= groups * each
