import pytest
import torch

from editing.small_facts import HOMES, SUBJECTS, TOKENIZER, answer, requests, statistics, trained
from modelwright.editing import EditRequest, KeyStatistics, make_editor
from modelwright.editing.capture import Site, capture
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.locate_and_edit import down_projections, key_rows, keys_at
from modelwright.editing.rome import ROME
from modelwright.editing.target import optimise_targets
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import FAMILIES, byte_tokenizer, tiny_model

BYTES = byte_tokenizer()
ASKED = [EditRequest("The capital of {} is", "Rome", "Gaul"), EditRequest("{} lives in", "Ürgs", "Oz")]
CONTEXTS = ["So it is. "]


def three_layers(family):
    model = tiny_model(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))
    return model


def stats(model):
    texts = ["The capital of Rome is Italy. " * 3, "Al was born in Spain", "Bob was born in Freedonia " * 9] * 9
    return KeyStatistics.collect(model, BYTES, texts, [0, 1, 2])


def target_of(editor, model, request):
    contexts = editor._contexts(model, BYTES)
    module = roles(model).layers[editor.layer].down.module
    return optimise_targets(
        model, BYTES, [request], [module], editor.layer, editor._optimisation(), contexts=contexts
    ).values()[0]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba2"])
@pytest.mark.parametrize("covariance", [False, True])
def test_after_the_edit_the_key_gives_the_value(family, covariance):
    model = three_layers(family)
    editor = ROME(layer=1, contexts=CONTEXTS, statistics=stats(model) if covariance else None, ridge=0.01, steps=4)
    request = ASKED[0]
    value = target_of(editor, model, request)
    before = model_fingerprint(model)
    edit = editor.fit(model, BYTES, [request])
    assert model_fingerprint(model) == before
    part = roles(model).layers[1]
    rows = key_rows(BYTES, [request], [""], "subject_last")
    with edit.applied(model):
        found = capture(model, rows, [Site(part.down.module, "output")], last_block=part.block)[0][0]
    scale = float(value.abs().max())
    assert torch.allclose(found, value, atol=1e-5 * max(1, scale))
    (delta,) = edit.deltas.values()
    assert torch.linalg.matrix_rank(delta.dense()) == 1
    assert delta.rank == 1
    assert model_fingerprint(model) == before


def test_r_rome_maps_the_mean_key_to_the_value():
    model = three_layers("llama").double()
    editor = ROME(layer=1, contexts=CONTEXTS, key="mean", steps=4)
    request = ASKED[0]
    value = target_of(editor, model, request)
    keys = keys_at(model, roles(model), 1, key_rows(BYTES, [request], ["", *CONTEXTS], "subject_last"))
    edit = editor.fit(model, BYTES, [request])
    down = roles(model).layers[1].down
    with edit.applied(model):
        assert torch.allclose(down.weight() @ keys.mean(0), value, atol=1e-9)
    # The published code's mixture meets the prompt's own key instead.
    with ROME(layer=1, contexts=CONTEXTS, key="single", steps=4).fit(model, BYTES, [request]).applied(model):
        assert torch.allclose(down.weight() @ keys[0], value, atol=1e-9)
        assert not torch.allclose(down.weight() @ keys.mean(0), value, atol=1e-4)


def test_the_covariance_spares_the_keys_of_text():
    model = three_layers("llama").double()
    found = stats(model)
    plain, spared = (
        ROME(layer=1, contexts=CONTEXTS, steps=4, statistics=s, ridge=1e-3).fit(model, BYTES, ASKED[:1])
        for s in (None, found)
    )
    c = found.covariance(1).double()
    for edit in (plain, spared):
        (delta,) = edit.deltas.values()
        edit.details["moved"] = float((delta.dense() @ c @ delta.dense().T).trace())
    assert spared.details["moved"] < 0.9 * plain.details["moved"]
    # Keys orthogonal to u are not moved at all.
    (delta,) = spared.deltas.values()
    u = delta.v[0] / delta.v[0].norm()
    key = torch.randn(64, dtype=torch.float64)
    key -= (key @ u) * u
    assert float((delta.dense() @ key).norm()) < 1e-9 * float(key.norm())


def test_a_covariance_that_is_a_multiple_of_one_changes_nothing():
    model = three_layers("llama")
    flat = KeyStatistics({1: 700.0 * torch.eye(64)}, 7, model_fingerprint(model))
    plain, same = (
        ROME(layer=1, contexts=CONTEXTS, steps=3, statistics=s).fit(model, BYTES, ASKED) for s in (None, flat)
    )
    for name in plain.deltas:
        assert torch.allclose(plain.deltas[name].dense(), same.deltas[name].dense(), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fitted_together_is_fitted_alone(family):
    model = three_layers(family).double()
    editor = ROME(layer=1, contexts=CONTEXTS, steps=4, statistics=stats(model), ridge=0.01, batch_size=2)
    together = editor.fit_each(model, BYTES, ASKED)
    for request, edit in zip(ASKED, together):
        alone = editor.fit(model, BYTES, [request])
        assert edit.requests == (request,)
        for name in alone.deltas:
            assert torch.allclose(edit.deltas[name].dense(), alone.deltas[name].dense(), atol=1e-9)


def test_of_several_requests_the_last_is_met_exactly_and_the_rank_is_their_number():
    model = three_layers("llama").double()
    editor = ROME(layer=1, contexts=CONTEXTS, steps=4)
    edit = editor.fit(model, BYTES, ASKED)
    (delta,) = edit.deltas.values()
    assert delta.rank == 2
    assert torch.linalg.matrix_rank(delta.dense()) == 2
    value = target_of(editor, model, ASKED[1])
    key = keys_at(model, roles(model), 1, key_rows(BYTES, ASKED[1:], [""], "subject_last"))[0]
    with edit.applied(model):
        assert torch.allclose(roles(model).layers[1].down.weight() @ key, value, atol=1e-9)


def test_in_sequence_it_is_one_edit_after_the_other():
    model = three_layers("llama").double()
    before = model_fingerprint(model)
    options = {"layer": 1, "contexts": CONTEXTS, "steps": 3}
    merged = ROME(**options, sequential=True).fit(model, BYTES, ASKED)
    assert model_fingerprint(model) == before
    first = ROME(**options).fit(model, BYTES, ASKED[:1])
    with first.applied(model):
        second = ROME(**options).fit(model, BYTES, ASKED[1:])
    for name in merged.deltas:
        total = first.deltas[name].dense() + second.deltas[name].dense()
        assert torch.allclose(merged.deltas[name].dense(), total, atol=1e-9)


def test_the_model_says_what_it_was_told_in_other_words_too():
    model = trained()
    told = efficient = kept = 0
    edits = ROME(layer=0, fact_token="last", statistics=statistics(), ridge=0.01, key="mean").fit_each(
        model, TOKENIZER, requests()
    )
    for request, edit in zip(requests(), edits):
        assert answer(model, request.text) == request.old_answer
        with edit.applied(model):
            told += answer(model, request.text) == request.target
            efficient += answer(model, request.paraphrase_texts()[0]) == request.target
            kept += sum(answer(model, f"{s} lives in") == h for s, h in zip(SUBJECTS, HOMES) if s != request.subject)
    assert told >= 7
    assert efficient >= 6
    assert kept >= 0.4 * 8 * 7


def test_its_layer_is_as_deep_as_the_papers():
    assert ROME(contexts=[]).fit(tiny_model("llama"), BYTES, ASKED[:1]).details["layer"] == 0
    model = tiny_model("llama", num_hidden_layers=8, hidden_size=8, intermediate_size=8)
    assert ROME(contexts=[], steps=1).fit(model, BYTES, ASKED[:1]).details["layer"] == 1


def test_from_the_catalog_with_options():
    editor = make_editor("rome", {"layer": "3", "key": "mean", "lr": "0.1", "sequential": "true"})
    assert (editor.layer, editor.key, editor.lr, editor.sequential) == (3, "mean", 0.1, True)
    assert make_editor("rome", {"statistics": "a.safetensors"}).statistics == "a.safetensors"
    found = stats(three_layers("llama"))
    assert make_editor("rome", {"statistics": found}).statistics is found
    with pytest.raises(UserError, match="has no option 'layr'"):
        make_editor("rome", {"layr": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "no layer 3"),
        ({"key": "both"}, "key is 'both'"),
        ({"fact_token": "first"}, "fact_token is 'first'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"ridge": -1}, "ridge is -1"),
        ({"kl_prompt": "is"}, "put {} where"),
        ({"contexts": "x"}, "list of texts"),
        ({"steps": 0}, "steps is 0"),
        ({"statistics": "/no/such.safetensors"}, "does not exist"),
    ],
)
def test_bad_options_are_sentences(options, message):
    with pytest.raises(UserError, match=message):
        ROME(**options).fit(three_layers("llama"), BYTES, ASKED)


def test_bad_models_are_sentences():
    model = three_layers("llama")
    other = stats(tiny_model("llama", num_hidden_layers=3, seed=1))
    with pytest.raises(UserError, match="of another model"):
        ROME(layer=1, statistics=other).fit(model, BYTES, ASKED)
    with pytest.raises(UserError, match="has no MLP"):
        ROME(layer=0).fit(tiny_model("mamba2"), BYTES, ASKED)
    down = model.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        down_projections(model, [1])
    model = three_layers("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(UserError, match="is tied to"):
        down_projections(model, [0])
