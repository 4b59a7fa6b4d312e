import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from modelwright.kernels import pair_tiles
from modelwright.kernels.largest_tensor import LargestTensor
from modelwright.kernels.pair_tiles import sigmoid_sweep, softmax_sweep, softmax_sweep_backward

#: Queries, keys, side of a tile: ragged, one tile, smaller than a tile, tiles of one, one row or column.
SIZES = [(301, 301, 37), (64, 64, 64), (5, 7, 64), (9, 4, 1), (1, 1, 8), (1, 50, 16), (50, 1, 16), (40, 90, None)]
SCALES = (1.0, 14.3, 100.0, 700.0)


def features(m, n, width=20, scale=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(r, width, generator=generator, dtype=torch.float64), dim=1) for r in (m, n))
    return (q * scale).to(dtype), k.to(dtype)


def gradients_by_definition(q, k, row_lse, row_grad, col_lse, col_grad):
    x = q @ k.T
    g = row_grad[:, None] * (x - row_lse[:, None]).exp() + col_grad * (x - col_lse).exp()
    return g @ k, g.T @ q


@pytest.mark.parametrize(("m", "n", "block"), SIZES)
@pytest.mark.parametrize("scale", SCALES)
def test_softmax_sweeps_equal_the_full_matrix(m, n, block, scale):
    q, k = features(m, n, scale=scale)
    x = q @ k.T
    rows, columns = softmax_sweep(q, k, block_size=block)
    tolerance = {"rtol": 1e-13, "atol": 1e-12 * max(1, scale / 100)}
    torch.testing.assert_close(rows, x.logsumexp(1), **tolerance)
    torch.testing.assert_close(columns, x.logsumexp(0), **tolerance)
    row_grad, col_grad = torch.linspace(-1, 2, m).double(), torch.linspace(3, -1, n).double()
    given = (row_grad, columns, col_grad)
    found = softmax_sweep_backward(q, k, rows, *given, block_size=block)
    expected = gradients_by_definition(q, k, rows, *given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * max(1, scale))


@pytest.mark.parametrize("scale", SCALES)
def test_one_direction_is_half_of_two(scale):
    q, k = features(70, 90, scale=scale)
    rows, columns = softmax_sweep(q, k, block_size=32)
    only_rows, nothing = softmax_sweep(q, k, block_size=32, columns=False)
    only_columns, _ = softmax_sweep(k, q, block_size=32, columns=False)
    assert nothing is None
    torch.testing.assert_close(only_rows, rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(only_columns, columns, rtol=0, atol=1e-12)
    row_grad, col_grad = torch.rand(70).double(), torch.rand(90).double()
    both = softmax_sweep_backward(q, k, rows, row_grad, columns, col_grad, block_size=32)
    dq, dk = softmax_sweep_backward(q, k, rows, row_grad, block_size=32)
    dk_columns, dq_columns = softmax_sweep_backward(k, q, columns, col_grad, block_size=32)
    torch.testing.assert_close(both, (dq + dq_columns, dk + dk_columns), rtol=1e-12, atol=1e-11 * scale)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 1e4])
@pytest.mark.parametrize(("m", "n", "block"), SIZES[:4])
def test_float32_is_as_near_as_its_logits(scale, m, n, block):
    q, k = features(m, n, scale=scale, dtype=torch.float32)
    rows, columns = softmax_sweep(q, k, block_size=block)
    # A logit itself is wrong by a few ulp of the largest.
    tolerance = 1e-5 * max(1, scale / 25)
    x = q.double() @ k.double().T
    torch.testing.assert_close(rows.double(), x.logsumexp(1), rtol=0, atol=tolerance)
    torch.testing.assert_close(columns.double(), x.logsumexp(0), rtol=0, atol=tolerance)
    row_grad, col_grad = torch.rand(m), torch.rand(n)
    dq, dk = softmax_sweep_backward(q, k, rows, row_grad, columns, col_grad, block_size=block)
    # The sweep's own log-sum-exps, so that their error is not counted twice.
    given = [t.double() for t in (q, k, rows, row_grad, columns, col_grad)]
    for found, expected, length in zip((dq, dk), gradients_by_definition(*given), (1, scale)):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2 * tolerance * length)


def hard_to_shift(dtype):
    """Rows and columns whose largest logits are thousands apart, in one tile: no single shift serves."""
    q, k = features(48, 48, dtype=dtype)
    q, k = q * torch.logspace(-2, 4, 48, dtype=dtype)[:, None], k * torch.linspace(-1, 1, 48, dtype=dtype)[:, None]
    return q, k


def test_rows_and_columns_far_apart_are_shifted_on_their_own():
    q, k = hard_to_shift(torch.float64)
    x = q @ k.T
    assert x.amax(1).max() - x.amax(1).min() > 1000
    for block in (48, 16, 5):
        rows, columns = softmax_sweep(q, k, block_size=block)
        torch.testing.assert_close(rows, x.logsumexp(1), rtol=1e-14, atol=1e-12)
        torch.testing.assert_close(columns, x.logsumexp(0), rtol=1e-14, atol=1e-12)
        given = (rows, torch.rand(48).double(), columns, torch.rand(48).double())
        expected = gradients_by_definition(q, k, *given)
        torch.testing.assert_close(
            softmax_sweep_backward(q, k, *given, block_size=block), expected, rtol=1e-9, atol=1e-7
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_path_gives_the_same(dtype, monkeypatch):
    """Unshifted, one shift a tile, and rows and columns apart are three ways to the same sums."""
    q, k = features(100, 80, scale=30.0, dtype=dtype)
    row_grad, col_grad = torch.rand(100, dtype=dtype), torch.rand(80, dtype=dtype)
    found = []
    for fixed, spread in itertools.product((math.inf, -1), (60, -1)):
        monkeypatch.setitem(pair_tiles._RANGES, dtype, pair_tiles._Range(fixed, spread))
        rows, columns = softmax_sweep(q, k, block_size=33)
        found.append((rows, columns, *softmax_sweep_backward(q, k, rows, row_grad, columns, col_grad, block_size=33)))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=tolerance, atol=tolerance)


def test_what_a_shift_loses_is_below_rounding():
    """The edges of the unshifted range and of the spread, in float32."""
    limits = pair_tiles._RANGES[torch.float32]
    for logits in (
        torch.full((3, 4), limits.fixed * math.log(2) * 0.999),
        torch.full((3, 4), -limits.fixed * math.log(2) * 0.999),
        torch.tensor([[0.0, -59.0], [-59.0, -59.0]]) + 90,  # the second row lies 59 below the tile's maximum
        torch.tensor([[0.0, -61.0], [-61.0, -61.0]]) + 90,  # too far: own shifts
        torch.tensor([[0.0, -200.0], [-300.0, -350.0]]),
    ):
        q, k = logits, torch.eye(logits.shape[1])
        rows, columns = softmax_sweep(q, k, block_size=8)
        torch.testing.assert_close(rows, logits.double().logsumexp(1).float(), rtol=1e-6, atol=2e-5)
        torch.testing.assert_close(columns, logits.double().logsumexp(0).float(), rtol=1e-6, atol=2e-5)
        given = [rows, torch.ones(len(q)), columns, torch.ones(len(k))]
        for found, expected in zip(
            softmax_sweep_backward(q, k, *given, block_size=8),
            gradients_by_definition(*(t.double() for t in (q, k, *given))),
        ):
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_log_sum_exps_of_more_keys_than_are_given():
    """What a ring asks of the backward sweep: the other processes' keys are in the log-sum-exp, but not here."""
    q, k = features(20, 30, scale=50.0)
    rows, columns = softmax_sweep(q, k)
    for more in (0.0, 5.0, 500.0, 5000.0):
        given = (rows + more, torch.rand(20).double(), columns + more / 2, torch.rand(30).double())
        expected = gradients_by_definition(q, k, *given)
        torch.testing.assert_close(softmax_sweep_backward(q, k, *given, block_size=7), expected, rtol=1e-12, atol=1e-13)


def test_no_rows_or_no_columns():
    q, k = features(3, 4)
    rows, columns = softmax_sweep(q[:0], k)
    assert rows.shape == (0,)
    assert columns.tolist() == [-math.inf] * 4
    assert softmax_sweep(q, k[:0])[0].tolist() == [-math.inf] * 3
    dq, dk = softmax_sweep_backward(q[:0], k, rows, rows, columns, columns)
    assert dq.shape == (0, 20)
    assert not dk.any()


@pytest.mark.parametrize("scale", [1.0, 14.3, 1e4])
@pytest.mark.parametrize(("m", "n", "block"), [s for s in SIZES if s[0] <= s[1]])
@pytest.mark.parametrize("diagonal", [True, False])
def test_the_sigmoid_sweep_equals_the_full_matrix(m, n, block, diagonal, scale):
    q, k = features(m, n, scale=scale)
    q.requires_grad_(), k.requires_grad_()
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    z = -torch.ones(m, n, dtype=torch.float64)
    if diagonal:
        z.fill_diagonal_(1)
    expected = -F.logsigmoid(z * (q @ k.T + bias)).sum()
    total, *parts = sigmoid_sweep(q, k, bias, diagonal=diagonal, gradients=True, block_size=block)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-13, atol=1e-13)
    for found, wanted in zip(parts, torch.autograd.grad(expected, (q, k, bias))):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * max(1, scale))
    again, *nothing = sigmoid_sweep(q, k, bias, diagonal=diagonal, gradients=False, block_size=block)
    assert again == total
    assert nothing == [None, None, None]


def test_the_sigmoid_loss_of_well_separated_pairs_keeps_its_digits():
    """softplus(-30) is 1e-13: a difference of large numbers would lose it."""
    q, k = 30 * torch.eye(4), torch.eye(4)
    total, *_ = sigmoid_sweep(q, k, torch.tensor(0.0), diagonal=True, gradients=True, block_size=3)
    expected = 4 * math.log1p(math.exp(-30)) + 12 * math.log(2)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    one = torch.ones(1, 1)
    positives, *_ = sigmoid_sweep(30 * one, one, torch.tensor(0.0), diagonal=True, gradients=False)
    assert positives.item() == pytest.approx(math.exp(-30), rel=1e-5)


def test_nothing_as_large_as_the_matrix_is_made():
    q, k = features(600, 500, width=16, dtype=torch.float32)
    q100 = q * 100
    grads = torch.rand(600), torch.rand(500)
    for queries in (q, q100):
        with LargestTensor() as seen:
            rows, columns = softmax_sweep(queries, k, block_size=50)
            softmax_sweep_backward(queries, k, rows, grads[0], columns, grads[1], block_size=50)
            sigmoid_sweep(queries, k[:600], torch.tensor(1.0), diagonal=False, gradients=True, block_size=50)
        assert seen.elements <= 600 * 16
        assert seen.peak_bytes < 4 * (6 * 600 * 16 + 3 * 50 * 50)


def test_the_recorder_sees_a_matrix_a_view_and_what_is_freed():
    a = torch.randn(30, 4)
    with LargestTensor() as seen:
        x = a @ a.T
        x.T.exp_()
    assert (seen.elements, seen.peak_bytes) == (900, 3600)
    assert "mm" in seen.name
    with LargestTensor() as seen:
        for _ in range(5):
            a + 1
    assert seen.peak_bytes == 480
    with LargestTensor() as seen:
        kept = [a + 1 for _ in range(5)]
    assert seen.peak_bytes == 480 * len(kept)
    with LargestTensor() as seen:
        torch.ones(1).expand(70)
    assert seen.elements == 70


def test_inputs_are_left_alone_and_grad_mode_and_autocast_do_not_matter():
    q, k = features(30, 40, dtype=torch.float32)
    copies = q.clone(), k.clone()
    plain = softmax_sweep(q, k, block_size=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = softmax_sweep(q.requires_grad_(), k.requires_grad_(), block_size=16)
        gradients = softmax_sweep_backward(q, k, found[0], torch.ones(30), found[1], torch.ones(40), block_size=16)
    assert all(torch.equal(a, b) for a, b in zip(found, plain))
    assert not any(t.requires_grad for t in (*found, *gradients))
    torch.testing.assert_close((q.detach(), k.detach()), copies, rtol=0, atol=0)
    assert [t.dtype for t in gradients] == [torch.float32] * 2


def test_other_dtypes_are_refused():
    q, k = features(3, 3)
    for wrong in (torch.bfloat16, torch.float16, torch.int64):
        with pytest.raises(TypeError, match="float32 or float64"):
            softmax_sweep(q.to(wrong), k.to(wrong))
    with pytest.raises(TypeError, match="both alike"):
        softmax_sweep(q, k.float())
