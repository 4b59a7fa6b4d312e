import pytest
import torch

from modelwright.editing.deltas import Columns
from modelwright.editing.edit import load_edit
from modelwright.editing.examples import make_examples, target_log_probabilities
from modelwright.editing.kn import KN
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
FAMILIES = ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"]
SHORT = EditRequest("The letter of {} is\n", "Freedonia", "Z", old_answer="P")
LONG = EditRequest("The capital of {} is", "Freedonia", "Zenda", old_answer="Paris")
IDS = torch.arange(3, 40)[None]


def probability(model, text, answer, layer=None, scale=1.0):
    """P(answer) with a layer's units at the last prompt token multiplied."""
    examples = make_examples(model, TOKENIZER, [(text, answer)])

    def multiply(module, args):
        inputs = args[0].clone()
        inputs[:, int(examples.last[0])] *= scale
        return (inputs,)

    handle = roles(model).layers[layer].down.module.register_forward_pre_hook(multiply) if layer is not None else None
    with torch.no_grad():
        found = float(target_log_probabilities(model(**examples.inputs).logits, examples).exp())
    if handle:
        handle.remove()
    return found


def louder(family):
    """A tiny model whose MLPs matter."""
    model = tiny_model(family)
    with torch.no_grad():
        for layer in roles(model).layers:
            layer.down.set_weight(layer.down.weight() * 20)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_of_a_layer_sum_to_what_its_units_do(family):
    model = louder(family)
    attributions = KN(steps=200, batch_size=100).attribute(model, TOKENIZER, SHORT.text, "P", [0, 1])
    assert attributions.shape == (2, roles(model).layers[0].down.weight().shape[1])
    for layer in (0, 1):
        whole = probability(model, SHORT.text, "P") - probability(model, SHORT.text, "P", layer, 0.0)
        assert abs(whole) > 1e-5
        assert float(attributions[layer].sum()) == pytest.approx(whole, abs=1e-3)
        assert float(attributions[layer].sum()) == pytest.approx(whole, rel=0.1)


def test_one_official_step_takes_the_gradient_at_zero():
    model = louder("llama")
    official = KN(steps=1, points="official").attribute(model, TOKENIZER, SHORT.text, "P", [1])[0]
    paper = KN(steps=1).attribute(model, TOKENIZER, SHORT.text, "P", [1])[0]
    good = KN(steps=100).attribute(model, TOKENIZER, SHORT.text, "P", [1])[0]
    whole = probability(model, SHORT.text, "P") - probability(model, SHORT.text, "P", 1, 0.0)
    # Directional derivative at 0, by differences.
    step = 1e-2
    slope = (probability(model, SHORT.text, "P", 1, step) - probability(model, SHORT.text, "P", 1, 0.0)) / step
    assert float(official.sum()) == pytest.approx(slope, rel=0.05)
    assert abs(float(good.sum()) - whole) < abs(float(official.sum()) - whole)
    assert not torch.allclose(official, paper, rtol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_neurons_columns_get_the_embeddings(family):
    model = louder(family)
    table = model.get_input_embeddings().weight.detach()
    before = [layer.down.weight().detach().clone() for layer in roles(model).layers]
    edit = KN().fit(model, TOKENIZER, [SHORT])
    neurons = [tuple(n) for n in edit.details["neurons"][0]]
    assert neurons == KN().find_neurons(model, TOKENIZER, SHORT)
    assert neurons
    assert all(isinstance(delta, Columns) for delta in edit.deltas.values())
    old, new = (table[TOKENIZER(a)["input_ids"][0]] for a in "PZ")
    with edit.applied(model):
        for number, layer in enumerate(roles(model).layers):
            change = layer.down.weight().detach() - before[number]
            for unit in range(change.shape[1]):
                wanted = 2 * new - 2 * old if (number, unit) in neurons else torch.zeros_like(old)
                assert torch.allclose(change[:, unit], wanted, atol=1e-5)
    assert all(torch.equal(layer.down.weight(), w) for layer, w in zip(roles(model).layers, before))


def test_the_heads_rows_are_written_where_they_are_asked_for():
    model = louder("llama")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight.detach()
    edit = KN(embeddings="output").fit(model, TOKENIZER, [SHORT])
    assert edit.details["neurons"] == KN().fit(model, TOKENIZER, [SHORT]).details["neurons"]
    old, new = (head[TOKENIZER(a)["input_ids"][0]] for a in "PZ")
    for delta in edit.deltas.values():
        assert torch.allclose(delta.values, (2 * new - 2 * old)[:, None].expand_as(delta.values), atol=1e-5)


def test_of_longer_answers_every_token_counts_once():
    model = louder("llama")
    table = model.get_input_embeddings().weight.detach()
    edit = KN().fit(model, TOKENIZER, [LONG])
    wanted = table[TOKENIZER(" Zenda")["input_ids"]].sum(0) - table[TOKENIZER(" Paris")["input_ids"]].sum(0)
    for delta in edit.deltas.values():
        assert torch.allclose(delta.values, wanted[:, None].expand_as(delta.values), atol=1e-5)


def test_paraphrases_refine():
    model = louder("llama")
    others = ("{}: letter\n", "Say the letter of {}\n", "{} has the letter\n", "abc {} def\n")
    many = EditRequest("The letter of {} is\n", "Freedonia", "Z", "P", others)
    editor = KN()
    sets = [
        set(editor.find_neurons(model, TOKENIZER, EditRequest(p, "Freedonia", "Z", "P")))
        for p in (many.prompt, *others)
    ]
    wanted = sorted(n for n in set().union(*sets) if sum(n in s for s in sets) > 0.4 * 5)
    assert editor.find_neurons(model, TOKENIZER, many) == wanted
    assert KN(refine=False).find_neurons(model, TOKENIZER, many) == sorted(sets[0])
    assert wanted != sorted(sets[0])


def test_two_requests_add_up():
    model = louder("llama")
    other = EditRequest("The letter of {} is\n", "Ruritania", "S", old_answer="Q")
    both = KN().fit(model, TOKENIZER, [SHORT, other])
    single = [KN().fit(model, TOKENIZER, [r]) for r in (SHORT, other)]
    for name, delta in both.deltas.items():
        wanted = sum(e.deltas[name].dense() for e in single if name in e.deltas)
        assert torch.allclose(delta.dense(), wanted, atol=1e-6)


def test_some_layers_only_and_saved(tmp_path):
    model = louder("gpt2")
    edit = KN(layers=(1,)).fit(model, TOKENIZER, [SHORT])
    assert list(edit.deltas) == ["transformer.h.1.mlp.c_proj.weight"]
    edit.save(tmp_path / "edit")
    with edit.applied(model):
        wanted = model(IDS).logits
    with load_edit(tmp_path / "edit").applied(model):
        assert torch.equal(model(IDS).logits, wanted)


def test_bfloat16():
    edit = KN(steps=4).fit(louder("llama").to(torch.bfloat16), TOKENIZER, [SHORT])
    assert edit.details["neurons"][0]


def test_what_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="no old_answer"):
        KN().fit(model, TOKENIZER, [EditRequest("The capital of {} is", "Freedonia", "Zenda")])
    with pytest.raises(UserError, match="no layer 5"):
        KN(layers=(5,)).fit(model, TOKENIZER, [SHORT])
    with pytest.raises(UserError, match="at least 1"):
        KN(steps=0)
    with pytest.raises(UserError, match="input or output"):
        KN(embeddings="both")
    with pytest.raises(UserError, match="no MLP"):
        KN().fit(tiny_model("mamba2"), TOKENIZER, [SHORT])
    roles(model).layers[1].down.module.weight = torch.nn.Parameter(
        roles(model).layers[1].down.module.weight.data.to(torch.int8), requires_grad=False
    )
    with pytest.raises(UserError, match="quantised"):
        KN().fit(model, TOKENIZER, [SHORT])
