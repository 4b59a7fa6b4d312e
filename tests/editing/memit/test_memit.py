import pytest
import torch

from editing.small_facts import HOMES, SUBJECTS, TOKENIZER, answer, requests, statistics, trained
from modelwright.editing import EditRequest, KeyStatistics
from modelwright.editing.capture import Site, capture
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.locate_and_edit import key_rows, keys_at
from modelwright.editing.memit import MEMIT
from modelwright.editing.target import optimise_targets
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

BYTES = byte_tokenizer()
ASKED = [
    EditRequest("The capital of {} is", "Rome", "Gaul"),
    EditRequest("{} lives in", "Ürgs", "Oz"),
    EditRequest("{} was born in", "Al", "Spain"),
]
CONTEXTS = ["So it is. ", "And then. "]


def three_layers(family):
    return tiny_model(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))


def stats(model):
    texts = ["The capital of Rome is Italy. " * 3, "Al was born in Spain", "Bob was born in Freedonia " * 9] * 9
    return KeyStatistics.collect(model, BYTES, texts, [0, 1, 2])


def options(model, **others):
    return {"statistics": stats(model), "ridge": 0.01, "contexts": CONTEXTS, "steps": 3, "weight": 0.1, **others}


def plain_memit(model, editor, asked):
    """Layer by layer, one prompt at a time, full matrices and an explicit inverse: the definition."""
    contexts = ["", *CONTEXTS]
    parts = roles(model)
    block = parts.layers[editor.layers[-1]].block
    z = optimise_targets(
        model, BYTES, asked, [block], editor.layers[-1], editor._optimisation(), contexts=contexts
    ).values()
    deltas = []
    originals = [parts.layers[n].down.base.weight.detach().clone() for n in editor.layers]
    for number, layer in enumerate(editor.layers):
        keys, now = [], []
        for request in asked:
            rows = key_rows(BYTES, [request], contexts, "subject_last")
            k = torch.cat([keys_at(model, parts, layer, [row]) for row in rows])
            keys.append(0.5 * k[0] + 0.5 * k[1:].mean(0))
            now.append(capture(model, rows[:1], [Site(block, "output")], last_block=block)[0][0])
        k = torch.stack(keys, 1)
        r = (z - torch.stack(now)).T / (len(editor.layers) - number)
        c = editor.statistics.covariance(layer).double()
        c += editor.ridge * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
        delta = r @ k.T @ torch.linalg.inv(editor.weight * c + k @ k.T)
        deltas.append(delta)
        down = parts.layers[layer].down
        down.set_weight(down.weight() + delta)
    for layer, weight in zip(editor.layers, originals):
        parts.layers[layer].down.base.weight.data.copy_(weight)
    return deltas


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_it_is_the_definition(family):
    model = three_layers(family).double()
    editor = MEMIT(layers=[0, 1], **options(model))
    edit = editor.fit(model, BYTES, ASKED)
    for delta, wanted in zip(edit.deltas.values(), plain_memit(model, editor, ASKED), strict=True):
        found = delta.dense().T if family == "gpt2" else delta.dense()
        assert delta.rank == 3
        assert torch.allclose(found, wanted, atol=1e-8 * float(wanted.abs().max()) + 1e-10)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba2"])
def test_without_weight_one_layer_gives_the_targets(family):
    """W K = W₀ K + R through the whole model, in float64; with λ > 0 what is missing is of λ's order."""
    # Gemma 2's softmax is in float32, where float64's mask is minus infinity: padding would be no number.
    model = three_layers(family) if family == "gemma2" else three_layers(family).double()
    before = model_fingerprint(model)
    block, down = roles(model).layers[1].block, roles(model).layers[1].down.module
    sites = [Site(block, "output"), Site(down, "output")]
    rows = key_rows(BYTES, ASKED, [""], "subject_last")
    stream, given = capture(model, rows, sites, last_block=block)
    for weight, limit in ((0.0, 1e-4 if family == "gemma2" else 1e-12), (1e-6, 1e-4 if family == "gemma2" else 1e-6)):
        editor = MEMIT(layers=[1], **options(model, weight=weight, contexts=[]))
        z = optimise_targets(model, BYTES, ASKED, [block], 1, editor._optimisation()).values()
        edit = editor.fit(model, BYTES, ASKED)
        assert model_fingerprint(model) == before
        with edit.applied(model):
            now, gives = capture(model, rows, sites, last_block=block)
        scale = float((z - stream).abs().max())
        assert torch.allclose(gives, given + (z - stream), rtol=0, atol=limit * scale)
        if family not in ("gemma2", "gemma3"):  # there a norm stands between the projection and the residual stream
            assert torch.allclose(now, z, rtol=0, atol=limit * scale)


def test_with_much_weight_nothing_changes():
    model = three_layers("llama")
    edit = MEMIT(layers=[0, 1], **options(model, weight=1e9)).fit(model, BYTES, ASKED)
    assert all(norm < 1e-4 for norm in edit.norms().values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_fitted_together_each_alone_is_fitted_alone(family):
    model = three_layers(family)
    if family != "gemma2":
        model = model.double()
    editor = MEMIT(layers=[0, 1], **options(model, batch_size=2))
    for request, edit in zip(ASKED, editor.fit_each(model, BYTES, ASKED)):
        alone = editor.fit(model, BYTES, [request])
        for name in alone.deltas:
            wanted = alone.deltas[name].dense()
            limit = (1e-9 if family != "gemma2" else 1e-3) * float(wanted.abs().max())
            assert torch.allclose(edit.deltas[name].dense(), wanted, atol=limit)


def test_the_order_of_requests_does_not_matter():
    model = three_layers("llama").double()
    editor = MEMIT(layers=[0, 1], **options(model))
    one, other = editor.fit(model, BYTES, ASKED), editor.fit(model, BYTES, ASKED[::-1])
    for name in one.deltas:
        assert torch.allclose(one.deltas[name].dense(), other.deltas[name].dense(), atol=1e-9)


def test_in_sequence_and_in_a_batch_differ():
    model = three_layers("llama").double()
    before = model_fingerprint(model)
    batch = MEMIT(layers=[0, 1], **options(model)).fit(model, BYTES, ASKED)
    sequence = MEMIT(layers=[0, 1], **options(model, sequential=True)).fit(model, BYTES, ASKED)
    assert model_fingerprint(model) == before
    assert len(sequence.details["merged"]) == 3
    for name in batch.deltas:
        assert not torch.allclose(batch.deltas[name].dense(), sequence.deltas[name].dense(), atol=1e-3)


def test_a_batch_is_learnt_and_comes_off():
    model = trained()
    before = {n: p.clone() for n, p in model.named_parameters()}
    edit = MEMIT(layers=[0, 1], fact_token="last", statistics=statistics(), ridge=0.01, weight=1.0).fit(
        model, TOKENIZER, requests()
    )
    with edit.applied(model):
        told = sum(answer(model, r.text) == r.target for r in requests())
        reworded = sum(answer(model, r.paraphrase_texts()[0]) == r.target for r in requests())
    assert told >= 7
    assert reworded >= 5
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [answer(model, f"{s} lives in") for s in SUBJECTS] == HOMES


def test_interrupted_the_model_is_as_before(monkeypatch):
    from modelwright.editing import spread

    model = three_layers("llama")
    before = model_fingerprint(model)
    calls, solve = [], spread.least_squares

    def dies(*arguments, **others):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*arguments, **others)

    monkeypatch.setattr(spread, "least_squares", dies)
    with pytest.raises(KeyboardInterrupt):
        MEMIT(layers=[0, 1], **options(model)).fit(model, BYTES, ASKED)
    assert model_fingerprint(model) == before


def test_its_layers_are_as_deep_as_the_papers():
    model = tiny_model("llama", num_hidden_layers=8, hidden_size=8, intermediate_size=8)
    found = KeyStatistics.collect(model, BYTES, ["some text " * 20], [1, 2])
    edit = MEMIT(contexts=[], steps=1, statistics=found, ridge=0.1).fit(model, BYTES, ASKED[:1])
    assert edit.details["layers"] == [1, 2]


def test_errors():
    model = three_layers("llama")
    with pytest.raises(UserError, match="MEMIT needs key statistics"):
        MEMIT().fit(model, BYTES, ASKED)
    with pytest.raises(UserError, match="layers is"):
        MEMIT(layers=[2, 1])
    with pytest.raises(UserError, match="weight of the covariance is -1"):
        MEMIT(weight=-1)
    few = KeyStatistics.collect(model, BYTES, ["ab"], [0, 1])
    with pytest.raises(UserError, match="are singular"):
        MEMIT(layers=[0, 1], statistics=few, steps=1, contexts=[]).fit(model, BYTES, ASKED)
    with pytest.raises(UserError, match="no key statistics of layer 2"):
        MEMIT(layers=[1, 2], statistics=few).fit(model, BYTES, ASKED)
