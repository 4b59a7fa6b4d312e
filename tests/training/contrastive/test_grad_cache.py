"""GradCache against one backward pass through the whole batch."""

import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modelwright.errors import UserError
from modelwright.training.contrastive.encoded import Encoded
from modelwright.training.contrastive.grad_cache import cached

ROWS, WIDTH = 11, 6


class Towers(nn.Module):
    """Two towers, one tied layer in both, hard negatives, a scale and a bias."""

    def __init__(self, *, dropout=0.0, checkpointed=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.tied = nn.Linear(8, 5)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(-0.5))
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed
        self.calls, self.autocast = [], []
        self.to(dtype)

    def tower(self, layer, x):
        hidden = self.dropout(torch.tanh(layer(x)))
        return nn.functional.normalize(self.tied(hidden), dim=-1)

    def embed(self, layer, x):
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.tower, layer, x, use_reentrant=self.checkpointed == "reentrant")
        return self.tower(layer, x)

    def forward(self, batch):
        self.calls.append((len(batch["x"]), torch.is_grad_enabled()))
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return Encoded(
            self.embed(self.first, batch["x"]),
            self.embed(self.second, batch["y"]),
            self.embed(self.second, batch["z"].flatten(0, 1)),
            self.logit_scale.exp(),
            self.logit_bias,
        )


def batch(dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return {"x": draw(ROWS, WIDTH), "y": draw(ROWS, WIDTH), "z": draw(ROWS, 2, WIDTH)}


def parts(whole, size):
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, ROWS, size)]


def loss_of(encoded):
    keys = torch.cat([encoded.keys, encoded.negatives])
    logits = encoded.scale * encoded.queries @ keys.T + encoded.bias * torch.linspace(0, 1, len(keys)).to(keys)
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def plain(model, whole=None):
    model.zero_grad()
    loss = loss_of(model(whole or batch(next(model.parameters()).dtype)))
    loss.backward()
    return loss.detach(), gradients(model)


def assert_close(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name in expected:
        if expected[name] is None:
            assert actual[name] is None, name
        else:
            assert (actual[name] - expected[name]).abs().max() <= tolerance, name
            assert expected[name].abs().max() > 1e-4, name  # a gradient of nothing would prove nothing


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 11, 50])
def test_equals_the_plain_backward_pass(size):
    model = Towers()
    loss, expected = plain(model)
    model.zero_grad()
    model.calls.clear()
    result = cached(model, parts(batch(), size))
    assert type(result) is Encoded
    assert result.negatives.shape == (2 * ROWS, 5)
    assert result.scale.ndim == result.bias.ndim == 0
    found = loss_of(result)
    assert abs(found - loss) < 1e-12
    found.backward()
    assert_close(gradients(model), expected)
    sizes = [len(p["x"]) for p in parts(batch(), size)]
    if size >= ROWS:
        assert model.calls == [(ROWS, True)]  # nothing to save, so nothing is done twice
    else:
        assert model.calls == [*((n, False) for n in sizes), *((n, True) for n in sizes)]


@pytest.mark.parametrize("kind", [True, "reentrant"])
def test_checkpointed_encoder(kind):
    _, expected = plain(Towers(dropout=0.0))
    model = Towers(checkpointed=kind)
    sub = [{k: v.requires_grad_() for k, v in p.items()} for p in parts(batch(), 4)]  # reentrant needs an input with it
    loss_of(cached(model, sub)).backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("kind", [False, True])
def test_dropout_draws_the_same_in_both_passes(kind):
    model = Towers(dropout=0.4, checkpointed=kind).train()
    torch.manual_seed(7)
    outputs = [model(p) for p in parts(batch(), 4)]  # one graph over all sub-batches, each in its own random state
    whole = Encoded(*(torch.cat(c) if c[0].ndim else c[0] for c in zip(*outputs, strict=True)))
    expected_loss = loss_of(whole)
    expected_loss.backward()
    expected, after = gradients(model), torch.get_rng_state()

    model.zero_grad()
    torch.manual_seed(7)
    loss = loss_of(cached(model, parts(batch(), 4)))
    drawn = torch.get_rng_state()
    assert torch.equal(drawn, after)  # the first pass draws as a plain one
    torch.rand(5)
    drawn = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), drawn)  # and the second leaves no trace
    assert loss == expected_loss
    assert_close(gradients(model), expected)
    other = loss_of(cached(model, parts(batch(), 4)))
    assert abs(other - loss) > 1e-6


@pytest.mark.parametrize("frozen", ["first", "second", "tied", "logit_scale"])
def test_frozen_parts(frozen):
    model = Towers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    _, expected = plain(model)
    model.zero_grad()
    loss_of(cached(model, parts(batch(), 4))).backward()
    assert_close(gradients(model), expected)


def test_everything_frozen_changes_nothing():
    model = Towers().requires_grad_(False)
    loss_of(cached(model, parts(batch(), 4))).backward()
    assert all(g is None for g in gradients(model).values())


def test_gradients_add_up_over_calls():
    model = Towers()
    _, a = plain(model)
    _, b = plain(model, batch(seed=2))
    model.zero_grad()
    for seed in (1, 2):
        loss_of(cached(model, parts(batch(seed=seed), 4))).backward()
    assert_close(gradients(model), {k: a[k] + b[k] for k in a})


def test_what_the_loss_does_not_use():
    model = Towers()
    expected = torch.autograd.grad(model(batch()).queries.sum(), model.first.weight)[0]
    result = cached(model, parts(batch(), 4))
    result.queries.sum().backward()
    assert (model.first.weight.grad - expected).abs().max() < 1e-12
    assert model.second.weight.grad.abs().max() == 0


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor | None


def test_other_tuples_and_none():
    model = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    named = cached(lambda part: Pair(model(part), None), x.split(2))
    assert named.b is None
    assert torch.allclose(named.a, model(x))
    bare = cached(lambda part: (model(part), part.argmax(-1)), x.split(2))
    assert type(bare) is tuple
    assert torch.equal(bare[1], x.argmax(-1))
    assert not bare[1].requires_grad
    assert bare[0].requires_grad
    with pytest.raises(ValueError, match="None for one sub-batch"):
        cached(lambda part: Pair(model(part), None if len(part) == 2 else model(part)), x.split(2))


def test_sub_batches_may_come_one_by_one():
    model = Towers()
    _, expected = plain(model)
    model.zero_grad()
    loss_of(cached(model, iter(parts(batch(), 3)))).backward()
    assert_close(gradients(model), expected)


def test_without_gradients_it_only_joins():
    model, seen, alive = Towers(), [], []

    def one_by_one():
        for i in range(ROWS):
            alive.append(sum(ref() is not None for ref in seen))
            part = {k: v[i : i + 1].clone() for k, v in batch().items()}
            seen.append(weakref.ref(part["x"]))
            yield part

    with torch.no_grad():
        result = cached(model, one_by_one())
        expected = model(batch())
    assert max(alive) <= 3  # and keeps no inputs for a second pass
    assert not result.queries.requires_grad
    torch.testing.assert_close(result.queries, expected.queries)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_autocast_is_that_of_the_first_pass(outside, warm):
    """bfloat16 on the CPU; the backward pass runs after the region, or in it, where cast weights are kept."""

    def run(encode):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if warm:
                model(batch(torch.float32))
            outputs = encode()
            loss = loss_of(Encoded(*(o.float() for o in outputs)))
            if not outside:
                loss.backward()
        if outside:
            loss.backward()
        return loss.detach(), outputs.queries.dtype, gradients(model)

    model = Towers(dtype=torch.float32)

    def joined():
        outputs = [model(p) for p in parts(batch(torch.float32), 4)]
        return Encoded(*(torch.cat(c) if c[0].ndim else c[0] for c in zip(*outputs, strict=True)))

    expected = run(joined)
    model.autocast.clear()
    found = run(lambda: cached(model, parts(batch(torch.float32), 4)))
    assert all(model.autocast)
    assert found[:2] == expected[:2]
    # The plain pass adds up the gradients of a cast weight in bfloat16 (8 bits); here they are added in float32.
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, rtol=0.05, atol=0.01 * gradient.abs().max().item())
    exact = plain(model)[1]
    assert any((exact[n] - expected[2][n]).abs().max() > 1e-4 for n in exact)  # autocast was on


def test_a_scaled_loss_gives_scaled_gradients():
    model = Towers()
    _, expected = plain(model)
    model.zero_grad()
    (loss_of(cached(model, parts(batch(), 4))) * 1024).backward()
    assert_close({k: v / 1024 for k, v in gradients(model).items()}, expected)


def test_inputs_are_moved_for_their_turn_only():
    seen = []

    def encode(part):
        seen.append({v.device.type for v in part.values()})
        return (part["x"] * 2,)

    sub = parts(batch(torch.float32), 4)
    result = cached(encode, sub, device="meta")
    assert seen == [{"meta"}] * 3
    assert result[0].device.type == "meta"
    assert all(v.device.type == "cpu" for p in sub for v in p.values())


def test_no_graph_of_itself_and_no_chosen_gradients():
    model = Towers()
    loss = loss_of(cached(model, parts(batch(), 4)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss.backward(create_graph=True)
    loss = loss_of(cached(model, parts(batch(), 4)))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm_is_refused_where_it_would_be_wrong(norm):
    model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Linear(4, 2))

    def encode(x):
        return (model(x),)

    x = torch.randn(6, 3)
    with pytest.raises(UserError, match=f"'1' .{norm.__name__}.*mini_batch_size"):
        cached(encode, x.split(2), module=model)
    if norm is nn.BatchNorm1d:
        cached(encode, [x], module=model)  # one sub-batch is a plain pass
        model.eval()
        with torch.no_grad():
            expected = model(x)
        result = cached(encode, x.split(2), module=model)[0]
        torch.testing.assert_close(result.detach(), expected)


def test_nothing_to_encode():
    with pytest.raises(UserError, match="nothing to encode"):
        cached(Towers(), [])
