"""One process of the group in test_ring.py: compares what the ring gives with what one process computes from all rows.

Every process runs :func:`main` and writes FOLDER/RANK.json: for each case, by how much each
quantity differs (NaN and infinities included: they are compared as numbers and fail), or the message of an error.
"""

import datetime
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from modelwright.errors import UserError
from modelwright.kernels.largest_tensor import LargestTensor
from modelwright.training.inf_cl import ring, tiled_contrastive_loss, tiled_info_nce_loss, tiled_sigmoid_loss

ROWS, WIDTH = 13, 7


def rows(size, seed=0, width=WIDTH, negatives=0, dtype=torch.float64):
    """All ranks' queries and keys, of length 1, and this loss's scale: the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(size, ROWS, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(size, ROWS + negatives, width, generator=generator, dtype=torch.float64)
    return F.normalize(queries, dim=-1).to(dtype), F.normalize(keys, dim=-1).to(dtype)


def whole_softmax(queries, keys, scale, symmetric, reduction="mean"):
    """Cross entropies of the whole matrix; row i's positive is key i of its own rank."""
    size, n = keys.shape[:2]
    x = scale * queries.flatten(0, 1) @ keys.flatten(0, 1).T
    labels = (torch.arange(size)[:, None] * n + torch.arange(ROWS)).flatten()
    loss = F.cross_entropy(x, labels, reduction=reduction)
    return (loss + F.cross_entropy(x.T, labels, reduction=reduction)) / 2 if symmetric else loss


def whole_sigmoid(queries, keys, scale, bias):
    q, k = queries.flatten(0, 1), keys.flatten(0, 1)
    x = scale * q @ k.T + bias
    return -F.logsigmoid(x * (2 * torch.eye(len(q), dtype=q.dtype) - 1)).sum() / len(q)


def ring_loss(queries, keys, scale, group, symmetric, reduction="mean", block_size=5):
    q = ring.average_gradient(scale, group) * queries
    row_lse, col_lse = ring.ring_softmax(q, keys, group, block_size=block_size, backend="torch", columns=symmetric)
    positive = (q * keys[: len(q)]).sum(1)
    loss = row_lse - positive
    if symmetric:
        loss = (loss + col_lse - positive) / 2
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def ring_sigmoid_loss(queries, keys, scale, bias, group, block_size=5):
    q = ring.average_gradient(scale, group) * queries
    bias = ring.average_gradient(bias, group)
    return ring.ring_sigmoid(q, keys, bias, group, block_size=block_size, backend="torch") / len(q)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def averaged(value, group):
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def difference(a, b):
    return float((a.detach().double() - b.detach().double()).abs().max())


def compare(group, local, whole, more, negatives=0, dtype=torch.float64):
    """Loss and gradients by the ring in ``group``, against the whole matrix in this process."""
    size, me = dist.get_world_size(group), dist.get_rank(group)
    all_queries, all_keys = rows(size, negatives=negatives, dtype=dtype)
    mine = leaves(all_queries[me], all_keys[me], *more)
    loss = local(*mine, group)
    loss.backward()
    reference = leaves(all_queries.double(), all_keys.double(), *more)
    expected = whole(*reference)
    expected.backward()
    found = {"loss": difference(averaged(loss, group), expected)}
    for name, ours, theirs in zip(("queries", "keys"), mine, reference):
        assert ours.grad.dtype == dtype
        # What one rank holds is size times the gradient of the group's loss: data parallelism divides.
        found[name] = difference(ours.grad / size, theirs.grad[me])
    for name, ours, theirs in zip(("scale", "bias"), mine[2:], reference[2:]):
        found[name] = difference(ours.grad, theirs.grad)
    return found


def no_large_tensor(group):
    b, width, block = 96, 4, 16
    q, k = leaves(*torch.randn(2, b, width, dtype=torch.float64))
    with LargestTensor() as largest:
        ring_loss(q, k, torch.tensor(10.0, dtype=torch.float64), group, True, block_size=block).backward()
        seen = largest.elements
        ring_sigmoid_loss(q, k, torch.tensor(10.0), torch.tensor(0.0), group, block_size=block).backward()
    assert seen >= block * block  # the hook sees the backward pass and the tiles
    return {"largest": largest.elements, "matrix": b * b}


class Encoders(torch.nn.Module):
    """Two tiny encoders and a learnable scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.query, self.key = (torch.nn.Sequential(torch.nn.Linear(9, 6), torch.nn.Tanh()) for _ in range(2))
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.2))
        self.double()

    def forward(self, a, b):
        return F.normalize(self.query(a), dim=-1), F.normalize(self.key(b), dim=-1), self.logit_scale.exp()


def data_parallel(group):
    size, me = dist.get_world_size(group), dist.get_rank(group)
    a, b = torch.randn(2, size, ROWS, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    alone, wrapped = Encoders(), torch.nn.parallel.DistributedDataParallel(Encoders(), process_group=group)
    queries, keys, scale = alone(a.flatten(0, 1), b.flatten(0, 1))
    whole_softmax(queries.view(size, ROWS, -1), keys.view(size, ROWS, -1), scale, True).backward()
    ring_loss(*wrapped(a[me], b[me]), group, True).backward()
    expected = dict(alone.named_parameters())
    return {name: difference(p.grad, expected[name].grad) for name, p in wrapped.module.named_parameters()}


def message(action):
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


def cases(group):
    me, size = dist.get_rank(group), dist.get_world_size(group)
    scale, bias = torch.tensor(14.3, dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)

    def softmax(symmetric, reduction="mean"):
        return (
            lambda q, k, s, g: ring_loss(q, k, s, g, symmetric, reduction),
            lambda q, k, s: whole_softmax(q, k, s, symmetric, reduction),
        )

    yield "symmetric", lambda: compare(group, *softmax(True), [scale])
    yield "one direction", lambda: compare(group, *softmax(False), [scale])
    yield "hard negatives", lambda: compare(group, *softmax(False), [scale], negatives=9)
    yield "scale of 100", lambda: compare(group, *softmax(True), [torch.tensor(100.0, dtype=torch.float64)])
    yield "sigmoid", lambda: compare(group, ring_sigmoid_loss, whole_sigmoid, [scale, bias])

    # A rank's loss is the sum over its rows; what data parallelism averages is the group's sum divided by its size.
    rank_sum, whole_sum = softmax(True, "sum")
    yield "sum", lambda: compare(group, rank_sum, lambda *a: whole_sum(*a) / size, [scale])

    # The same through the public functions.
    def public(function, **options):
        return lambda *a: function(*a[:-1], block_size=5, backend="torch", process_group=a[-1], **options)

    yield "tiled_contrastive_loss", lambda: compare(group, public(tiled_contrastive_loss), softmax(True)[1], [scale])
    yield (
        "tiled_contrastive_loss, sum",
        lambda: compare(
            group, public(tiled_contrastive_loss, reduction="sum"), lambda *a: whole_sum(*a) / size, [scale]
        ),
    )
    yield (
        "tiled_info_nce_loss",
        lambda: compare(group, public(tiled_info_nce_loss), softmax(False)[1], [scale], negatives=9),
    )
    yield "tiled_sigmoid_loss", lambda: compare(group, public(tiled_sigmoid_loss), whole_sigmoid, [scale, bias])

    def each():
        q, k = rows(size)
        here = ring_loss(q[me], k[me], scale, group, True, "none")
        return {"rows": difference(here, whole_softmax(q, k, scale, True, "none").view(size, ROWS)[me])}

    yield "none", each

    def narrow(gathered):
        # As the loss does: rows arrive in bfloat16 and are widened; or the keys travel as they are.
        return lambda q, k, s, g: ring_loss(q.float(), k.float() if gathered else k, s.float(), g, True)

    for widened in (True, False):
        yield (
            f"bfloat16 keys travel {'wide' if widened else 'as they are'}",
            lambda widened=widened: compare(group, narrow(widened), softmax(True)[1], [scale], dtype=torch.bfloat16),
        )
    yield (
        "bfloat16 keys travel as the function decides",
        lambda: compare(group, public(tiled_contrastive_loss), softmax(True)[1], [scale], dtype=torch.bfloat16),
    )
    yield "data parallel", lambda: data_parallel(group)
    yield "memory", lambda: no_large_tensor(group)

    q, k = rows(size)
    ours = {"block_size": 5, "backend": "torch"}

    def refused(name, q, k, columns=True):
        return f"refused: {name}", lambda: message(lambda: ring.ring_softmax(q, k, group, **ours, columns=columns))

    odd = me == size - 1
    yield refused("rows", q[me, : ROWS - odd], k[me, : ROWS - odd])
    yield refused("width", q[me, :, : WIDTH - odd], k[me, :, : WIDTH - odd])
    yield refused("dtype", q[me].to(torch.float32 if odd else None), k[me].to(torch.float32 if odd else None))
    yield refused("direction", q[me], k[me], columns=odd)
    yield refused("gradient", q[me].clone().requires_grad_(odd), k[me])
    yield (
        "refused: weights",
        lambda: message(lambda: (ring.ring_sigmoid(*leaves(q[me], k[me]), bias, group, **ours) * (1 + me)).backward()),
    )
    mine = q[me, : 0 if odd else ROWS], k[me, : 0 if odd else ROWS]
    yield "empty", lambda: message(lambda: tiled_contrastive_loss(*mine, scale, process_group=group))
    # And after all these refusals nothing is left over in the group.
    yield "afterwards", lambda: compare(group, *softmax(True), [scale])


def main(rank, size, mode, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    report = {}
    if mode == "cases":
        groups = {"world": dist.group.WORLD}
        if size == 3:
            groups |= {f"group {i} {j}": dist.new_group([i, j]) for i, j in ((0, 1), (1, 2))}
        for label, group in groups.items():
            if dist.get_rank(group) >= 0:
                for name, case in cases(group):
                    report[f"{label}: {name}"] = case()
        if size == 3 and rank == 2:
            report["not a member"] = message(lambda: ring.average_gradient(torch.ones(1), groups["group 0 1"]))
    else:
        ring.PATIENCE = 6.0  # far more than a living neighbour takes on a busy machine
        # Large enough to be under way when the neighbour goes: that is when gloo itself may wait for ever.
        q, k = leaves(*F.normalize(torch.randn(2, 1024, 512), dim=-1))
        original = ring.dist.batch_isend_irecv
        posted = 0

        def dying(operations):
            nonlocal posted
            works = original(operations)
            posted += 1
            if rank == 0 and posted == 10 and mode in ("killed", "stopped"):
                os.kill(os.getpid(), signal.SIGKILL if mode == "killed" else signal.SIGSTOP)
            return works

        def losses():
            for step in range(5):
                if rank == 0 and step == 2 and mode == "absent":
                    os.kill(os.getpid(), signal.SIGKILL)  # between two losses: the others wait for it to join
                ring_loss(q, k, torch.tensor(10.0), dist.group.WORLD, True, block_size=512).backward()

        ring.dist.batch_isend_irecv = dying
        start = datetime.datetime.now()
        report["message"] = message(losses)
        report["seconds"] = (datetime.datetime.now() - start).total_seconds()
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    if mode == "cases":
        dist.barrier()
