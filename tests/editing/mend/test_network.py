import numpy as np
import pytest
import torch

from modelwright.editing.mend.network import EPSILON, GradientTransform, IdentityBlock, RunningMoments, nonzero_rows


@pytest.mark.parametrize("sizes", [[50], [1, 49], [7, 0, 13, 30]])
def test_the_moments_are_numpys(sizes):
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100
    moments = RunningMoments(6)
    for part in rows.split(sizes):
        moments.update(part)
    values = rows.double().numpy()
    assert np.allclose(moments.mean, values.mean(0), rtol=1e-6)
    assert np.allclose(moments.deviation(), values.std(0, ddof=1), rtol=1e-5)
    wanted = (values - values.mean(0)) / (values.std(0, ddof=1) + EPSILON)
    assert np.allclose(moments(rows), wanted, atol=1e-4)


def test_it_starts_as_the_identity():
    torch.manual_seed(0)
    transform = GradientTransform(5, 3, modes=2, normalise=False)
    x, delta = torch.randn(4, 5), torch.randn(4, 3)
    for mode in range(2):
        found = transform(x, delta, mode)
        assert torch.equal(found[0], x)
        assert torch.equal(found[1], delta)


def test_the_block_is_the_formula():
    torch.manual_seed(0)
    block = IdentityBlock(4, 3, modes=2)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    z = torch.randn(6, 4)
    for mode in range(2):
        wanted = torch.stack(
            [
                row + (block.scale[mode] * (block.up @ (block.down @ row) + block.bias) + block.shift[mode]).relu()
                for row in z
            ]
        )
        assert torch.allclose(block(z, mode), wanted, atol=1e-5)
    assert not torch.allclose(block(z, 0), block(z, 1))


def test_at_the_start_every_part_has_a_gradient_that_needs_one():
    # With relu instead of clamp, nothing would ever move.
    torch.manual_seed(0)
    transform = GradientTransform(5, 3, modes=1, normalise=False)
    x, delta = transform(torch.randn(4, 5), torch.randn(4, 3), 0)
    (x.sum() + delta.square().sum()).backward()
    for block in transform.blocks:
        assert block.up.grad.abs().sum() > 0
        assert block.bias.grad.abs().sum() > 0
        assert block.shift.grad.abs().sum() > 0


def test_a_large_rank_is_cut_to_what_it_can_do():
    assert GradientTransform(5, 3, 1).blocks[0].down.shape == (8, 8)
    assert GradientTransform(5, 3, 1, rank=2).blocks[0].down.shape == (2, 8)
    assert len(GradientTransform(5, 3, 1).blocks) == 2


def test_rows_without_gradient_are_left_out():
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [3.0, 1.0]]])
    delta = torch.tensor([[[1.0], [2.0], [0.0]]])
    found = nonzero_rows(x, delta)
    assert found[0].tolist() == [[1, 0]]
    assert found[1].tolist() == [[1]]
