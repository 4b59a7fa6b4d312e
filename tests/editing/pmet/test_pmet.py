import pytest
import torch

from editing.small_facts import TOKENIZER, answer, requests, statistics, trained
from modelwright.editing import EditRequest, KeyStatistics
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.least_squares import least_squares
from modelwright.editing.locate_and_edit import key_rows, keys_at
from modelwright.editing.memit import MEMIT
from modelwright.editing.pmet import PMET
from modelwright.editing.target import Targets, optimise_targets
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import byte_tokenizer, tiny_model

BYTES = byte_tokenizer()
ASKED = [EditRequest("The capital of {} is", "Rome", "Gaul"), EditRequest("{} lives in", "Ürgs", "Oz")]


def stats(model):
    texts = ["The capital of Rome is Italy. " * 3, "Al was born in Spain", "Bob was born in Freedonia " * 9] * 9
    return KeyStatistics.collect(model, BYTES, texts, [0, 1, 2])


def options(model, **others):
    return {"statistics": stats(model), "ridge": 0.01, "contexts": [], "steps": 3, "weight": 0.1, **others}


def test_in_one_layer_it_is_the_least_squares_of_the_mlps_output():
    model = tiny_model("llama", num_hidden_layers=3).double()
    editor = PMET(layers=[1], **options(model))
    part = roles(model).layers[1]
    found = optimise_targets(model, BYTES, ASKED, [part.output.module, part.down.module], 1, editor._optimisation())
    keys = keys_at(model, roles(model), 1, key_rows(BYTES, ASKED, [""], "subject_last"))
    u, v = least_squares(editor.statistics, 1, keys.T, found.deltas[1].T, weight=0.1, ridge=0.01)
    (delta,) = editor.fit(model, BYTES, ASKED).deltas.values()
    assert torch.allclose(delta.dense(), u @ v, atol=1e-9)
    assert float(found.deltas[0].norm()) > 0  # what attention should have given, thrown away


def test_with_the_same_targets_one_layer_is_memits(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=3).double()
    z = torch.randn(2, 32, dtype=torch.float64)

    def given(model, tokenizer, asked, modules, *_, **__):
        # As if the attention's part were frozen at 0, and MEMIT's targets were those of the MLP.
        at = [keys_at(model, roles(model), 1, key_rows(BYTES, asked, [""], "subject_last")) for _ in modules]
        outputs = [roles(model).layers[1].down.weight() @ k.T for k in at]
        return Targets(tuple(o.T for o in outputs), tuple(z for _ in modules), [[0.0]] * len(asked))

    from modelwright.editing import spread_editor

    monkeypatch.setattr(spread_editor, "optimise_targets", given)
    down = roles(model).layers[1].down.module
    monkeypatch.setattr(MEMIT, "_learnt_at", lambda self, last: [down])
    (one,) = MEMIT(layers=[1], **options(model)).fit(model, BYTES, ASKED).deltas.values()
    (other,) = PMET(layers=[1], **options(model)).fit(model, BYTES, ASKED).deltas.values()
    assert torch.allclose(one.dense(), other.dense(), atol=1e-10)


def test_the_share_is_the_root_of_the_layers_left():
    model = tiny_model("llama", num_hidden_layers=3).double()
    (first, _) = PMET(layers=[0, 1], **options(model)).fit(model, BYTES, ASKED[:1]).deltas.values()
    editor = PMET(layers=[0, 1], **options(model))
    part = roles(model).layers[1]
    found = optimise_targets(model, BYTES, ASKED[:1], [part.output.module, part.down.module], 1, editor._optimisation())
    keys = keys_at(model, roles(model), 0, key_rows(BYTES, ASKED[:1], [""], "subject_last"))
    u, v = least_squares(editor.statistics, 0, keys.T, found.deltas[1].T / 2**0.5, weight=0.1, ridge=0.01)
    assert torch.allclose(first.dense(), u @ v, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_fitted_together_each_alone_is_fitted_alone(family):
    model = tiny_model(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3})).double()
    before = model_fingerprint(model)
    editor = PMET(layers=[0, 1], **options(model, ridge=0.1, contexts=["So. "], decay=0))
    for request, edit in zip(ASKED, editor.fit_each(model, BYTES, ASKED)):
        alone = editor.fit(model, BYTES, [request])
        for name in alone.deltas:
            wanted = alone.deltas[name].dense()
            assert torch.allclose(edit.deltas[name].dense(), wanted, atol=1e-9 * float(wanted.abs().max()))
    assert model_fingerprint(model) == before


def test_facts_are_learnt():
    model = trained()
    editor = PMET(
        layers=[0, 1], fact_token="last", statistics=statistics(), ridge=0.01, weight=0.1, clamp=4.0, decay=1e-3
    )
    told = 0
    for request, edit in zip(requests(), editor.fit_each(model, TOKENIZER, requests())):
        with edit.applied(model):
            told += answer(model, request.text) == request.target
    assert told >= 5


def test_errors():
    with pytest.raises(UserError, match="PMET needs key statistics"):
        PMET().fit(tiny_model("llama"), BYTES, ASKED)
    assert (PMET().steps, PMET().clamp, PMET().decay, PMET().weight) == (20, 1.0, 0.5, 15_000.0)
    constants = PMET()._optimisation()
    assert (constants.settled_nll_factor, constants.settled_kl) == (0.1, 0.01)
    assert (constants.nll_factor, PMET(nll_factor=0.5)._optimisation().nll_factor) == (1.0, 0.5)
