import pytest
import torch

from editing.small_facts import TOKENIZER, requests, trained
from modelwright.editing import EditRequest, KeyStatistics
from modelwright.editing.contexts import sample_contexts
from modelwright.editing.hooks import changed_output, seen_output
from modelwright.editing.subject import encode_pair, locate
from modelwright.editing.target import Optimisation, optimise_targets
from modelwright.editing.trace import causal_trace
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

BYTES = byte_tokenizer()
MIXED = [
    EditRequest("The capital of {} is", "Rome", "Gaul"),
    EditRequest("The capital of {} is", "Freedonia", "Z"),
    EditRequest("Does {} live?", "Ürgs x", "abc d"),
    EditRequest("{} was born in", "Al", "Spain"),
]
CONTEXTS = ["", "I think so. ", "The rest of it is long. "]


def modules_of(model, layer, where):
    part = roles(model).layers[layer]
    return {
        "mlp": [part.down.module],
        "block": [part.block],
        "attention and mlp": [part.output.module, part.down.module],
    }[where]


def three_layers(family):
    return tiny_model(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))


def slow_targets(model, tokenizer, request, modules, options, contexts, fact_token="subject_last"):
    """One request, one prompt at a time, the whole model at every step: the definition."""
    prompts = []
    for context in contexts:
        text = context + request.text
        head, tail = encode_pair(tokenizer, text, request.target)
        prompts.append((head + tail[:-1], locate(tokenizer, text, request.subject, fact_token).position, head, tail))
    kl = locate(tokenizer, f"{request.subject} is a", request.subject, fact_token)
    seen = []
    for module in modules:
        with torch.no_grad(), seen_output(module, lambda t: seen.append(t[0, prompts[0][1]])):
            model(torch.tensor([prompts[0][0]]))
    with torch.no_grad():
        before = model(torch.tensor([kl.ids])).logits[0, kl.position].log_softmax(-1)
    deltas = [torch.zeros_like(m, requires_grad=True) for m in seen]
    adam = torch.optim.Adam(deltas, lr=options.lr)
    losses = []

    def run(ids, position):
        import contextlib

        with contextlib.ExitStack() as stack:
            for module, delta in zip(modules, deltas):
                place = torch.zeros(1, len(ids), 1, dtype=delta.dtype)
                place[0, position] = 1
                stack.enter_context(changed_output(module, lambda t, p=place, d=delta: t + p * d))
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    for step in range(options.steps + 1):
        nll = 0
        for ids, position, head, tail in prompts:
            log_p = run(ids, position)
            nll = nll - sum(log_p[len(head) - 1 + i, t] for i, t in enumerate(tail)) / len(tail) / len(prompts)
        after = run(kl.ids, kl.position)[kl.position]
        divergence = (before.exp() * (before - after)).sum()
        decay = sum(d.norm() / m.norm() ** 2 for d, m in zip(deltas, seen))
        loss = options.nll_factor * nll + options.kl_factor * divergence + options.decay * decay
        losses.append(float(loss.detach()))
        if loss < options.stop_loss or step == options.steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for delta, m in zip(deltas, seen):
                delta *= min(1.0, float(options.clamp * m.norm() / delta.norm()))
    model.zero_grad()
    return seen, [d.detach() for d in deltas], losses


@pytest.mark.parametrize("where", ["mlp", "block", "attention and mlp"])
@pytest.mark.parametrize("fact_token", ["subject_last", "last"])
def test_the_batch_is_the_definition_one_by_one(where, fact_token):
    model = three_layers("llama").double()
    modules = modules_of(model, 1, where)
    options = Optimisation(steps=5, nll_factor=1.5, decay=1e-5, lr=0.05, stop_loss=0)
    found = optimise_targets(
        model, BYTES, MIXED, modules, 1, options, contexts=CONTEXTS, fact_token=fact_token, batch_size=3
    )
    for n, request in enumerate(MIXED):
        seen, deltas, losses = slow_targets(model, BYTES, request, modules, options, CONTEXTS, fact_token)
        assert found.losses[n] == pytest.approx(losses, abs=1e-9)
        for s in range(len(modules)):
            assert torch.allclose(found.initial[s][n], seen[s], atol=1e-10)
            assert torch.allclose(found.deltas[s][n], deltas[s], atol=1e-8)
            assert float(deltas[s].norm()) > 0


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba2"])
def test_starting_in_the_middle_of_the_model_changes_nothing(family):
    model = three_layers(family)
    # Gemma 2's own eager attention overflows in float64 on padding.
    wide = family != "gemma2"
    model = model.double() if wide else model
    for where in ("mlp", "block", "attention and mlp"):
        for layer in (0, 1):
            one, other = (
                optimise_targets(
                    model, BYTES, MIXED, modules_of(model, layer, where), layer,
                    Optimisation(steps=2, decay=0, lr=0.01), contexts=CONTEXTS, resume=resume,
                )
                for resume in (True, False)
            )  # fmt: skip
            for a, b in zip(one.losses, other.losses):
                assert a == pytest.approx(b, abs=1e-8 if wide else 1e-3)
            assert torch.allclose(one.initial[0], other.initial[0], atol=1e-10 if wide else 1e-6)


def test_the_loss_falls_and_the_distance_is_bounded():
    model = trained()
    asked = requests()
    for clamp in (0.5, 4.0):
        found = optimise_targets(
            model, TOKENIZER, asked, modules_of(model, 1, "mlp"), 1, Optimisation(clamp=clamp), fact_token="last"
        )
        assert all(losses[-1] < losses[0] for losses in found.losses)
        sizes, bound = found.deltas[0].norm(dim=1), clamp * found.initial[0].norm(dim=1)
        assert bool((sizes <= bound * (1 + 1e-5)).all())
    assert torch.allclose(found.values(), found.initial[0] + found.deltas[0])


def test_each_request_stops_by_itself():
    model = trained().double()
    asked = requests(4)
    options = Optimisation(stop_loss=1.5, steps=30)
    try:
        found = optimise_targets(model, TOKENIZER, asked, modules_of(model, 0, "block"), 0, options, fact_token="last")
        alone = [
            optimise_targets(model, TOKENIZER, [r], modules_of(model, 0, "block"), 0, options, fact_token="last")
            for r in asked
        ]
    finally:
        model.float()
    steps = [len(losses) for losses in found.losses]
    assert len(set(steps)) > 1
    for n, one in enumerate(alone):
        assert found.losses[n] == pytest.approx(one.losses[0], abs=1e-9)
        assert torch.allclose(found.deltas[0][n], one.deltas[0][0], atol=1e-8)
        assert found.losses[n][-1] < 1.5 or len(found.losses[n]) == 31
        assert all(loss >= 1.5 for loss in found.losses[n][:-1])


def test_only_the_facts_position_is_touched():
    model = tiny_model("llama")
    block = roles(model).layers[0].block
    from modelwright.editing.target import _adding

    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    seen = []
    with torch.no_grad():
        for delta in (torch.zeros(2, 32), torch.randn(2, 32)):
            adding = _adding(delta, torch.tensor([1, 0]), 2)
            with changed_output(block, adding), seen_output(block, seen.append):
                model(ids)
    others = [0, 1, 3]
    assert torch.equal(seen[0][:, others], seen[1][:, others])
    assert torch.allclose(seen[1][:, 2] - seen[0][:, 2], delta[[1, 0]], atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    optimise_targets(model, BYTES, MIXED, modules_of(model, 0, "mlp"), 0, Optimisation(steps=2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def test_settled_requests_end_early():
    model = trained()
    asked = [EditRequest("{} lives in", "Ada", "Rome")]  # the model says so already
    modules = modules_of(model, 1, "block")
    plain = optimise_targets(model, TOKENIZER, asked, modules, 1, Optimisation(stop_loss=0, steps=9))
    settled = Optimisation(stop_loss=0, steps=9, settled_nll_factor=0.1, settled_kl=10.0)
    assert len(plain.losses[0]) == 10
    assert len(optimise_targets(model, TOKENIZER, asked, modules, 1, settled).losses[0]) == 1


@pytest.mark.parametrize("field", ["steps", "lr", "clamp", "nll_factor", "decay"])
def test_bad_constants_are_sentences(field):
    with pytest.raises(UserError, match=f"{field} is -1"):
        Optimisation(**{field: -1})


def test_a_loss_that_is_not_finite_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="loss of the request 'The capital of Rome is' is not finite"):
        optimise_targets(model, BYTES, MIXED[:1], modules_of(model, 0, "mlp"), 0, Optimisation(steps=2))


def test_another_models_tokenizer_and_too_long_a_prompt_are_refused():
    few = tiny_model("llama", vocab_size=50)
    with pytest.raises(UserError, match="it is another model's"):
        optimise_targets(few, BYTES, MIXED, modules_of(few, 0, "mlp"), 0, Optimisation())
    with pytest.raises(UserError, match="it is another model's"):
        sample_contexts(few, BYTES, [(2, 1)])
    with pytest.raises(UserError, match="it is another model's"):
        KeyStatistics.collect(few, BYTES, ["abc"], [0])
    with pytest.raises(UserError, match="it is another model's"):
        causal_trace(few, BYTES, MIXED)
    short = tiny_model("llama", max_position_embeddings=20)
    with pytest.raises(UserError, match="but the model reads 20"):
        optimise_targets(short, BYTES, MIXED, modules_of(short, 0, "mlp"), 0, Optimisation())


def test_a_layer_that_nothing_reads_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="No layer above 1 reads .* fact_token=last"):
        optimise_targets(model, BYTES, MIXED, modules_of(model, 1, "mlp"), 1, Optimisation())
    optimise_targets(model, BYTES, MIXED, modules_of(model, 1, "mlp"), 1, Optimisation(steps=1), fact_token="last")
