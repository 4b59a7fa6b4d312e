import pytest
import torch
from peft.tuners.lora import LoraModel

from modelwright.editing.deltas import LowRank
from modelwright.editing.edit import load_edit
from modelwright.editing.examples import make_examples, target_loss
from modelwright.editing.lora import AdaLoRA, LoRA
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
REQUEST = EditRequest("The capital of {} is", "Freedonia", "Zenda")
FAMILIES = ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"]
IDS = torch.arange(3, 40)[None]


def trace(model):
    return (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: (type(module), module.training) for name, module in model.named_modules()},
        set(vars(model)),
    )


def same(one, other):
    return all(torch.equal(one[0][n], other[0][n]) for n in one[0]) and one[1:] == other[1:]


@pytest.mark.parametrize("editor", [LoRA(steps=8), AdaLoRA(steps=8)], ids=lambda e: e.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_unmerged_and_the_adapter_leaves_no_trace(family, editor, monkeypatch):
    model = tiny_model(family)
    before = trace(model)
    unmerged = []

    take_off = LoraModel.unload

    def spy(self):  # the logits with the adapter still on, as peft computes them
        with torch.no_grad():
            self.model.eval()
            unmerged.append(self.model(IDS).logits)
        return take_off(self)

    monkeypatch.setattr(LoraModel, "unload", spy)
    edit = editor.fit(model, TOKENIZER, [REQUEST])
    assert same(trace(model), before)
    assert all(isinstance(delta, LowRank) and delta.rank == 8 for delta in edit.deltas.values())
    plain = model(IDS).logits
    with edit.applied(model):
        merged = model(IDS).logits
    assert torch.allclose(merged, unmerged[0], atol=2e-5)
    assert float((merged - plain).detach().abs().max()) > 1e-3
    assert torch.equal(model(IDS).logits, plain)


def test_it_is_on_query_and_value_of_all_layers():
    model = tiny_model("llama")
    names = list(LoRA(steps=1).fit(model, TOKENIZER, [REQUEST]).deltas)
    wanted = [f"{p.name}.weight" for layer in roles(model).layers for p in (layer.query, layer.value)]
    assert names == wanted
    assert len(LoRA(steps=1, layers=(1,)).fit(model, TOKENIZER, [REQUEST]).deltas) == 2
    assert list(LoRA(steps=1).fit(tiny_model("gpt2"), TOKENIZER, [REQUEST]).deltas) == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.1.attn.c_attn.weight",
    ]


@pytest.mark.parametrize("editor", [LoRA(steps=8), AdaLoRA(steps=8)], ids=lambda e: e.name)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_where_they_are_fused_the_key_stays_as_it_is(family, editor):
    model = tiny_model(family)
    edit = editor.fit(model, TOKENIZER, [REQUEST])

    def weights():
        found = [(p.weight().detach().clone()) for la in roles(model).layers for p in (la.query, la.key, la.value)]
        return found[0::3], found[1::3], found[2::3]

    before = weights()
    with edit.applied(model):
        query, key, value = weights()
        inner = model(IDS).logits
    assert all(torch.equal(one, other) for one, other in zip(key, before[1]))
    for now, was in ((query, before[0]), (value, before[2])):
        assert all(float((one - other).abs().max()) > 1e-4 for one, other in zip(now, was))
    assert inner.isfinite().all()


@pytest.mark.parametrize("editor", [LoRA(), AdaLoRA(), AdaLoRA(start_rank=12)], ids=["lora", "adalora", "pruned"])
def test_the_papers_settings_learn_the_fact(editor):
    assert (editor.rank, editor.alpha, editor.dropout, editor.learning_rate, editor.steps) == (8, 32, 0.1, 5e-3, 70)
    model = tiny_model("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=128)
    edit = editor.fit(model, TOKENIZER, [REQUEST])
    assert len(edit.details["losses"]) == 70
    examples = make_examples(model, TOKENIZER, [(REQUEST.text, REQUEST.target)])
    with edit.applied(model), torch.no_grad():
        after = float(target_loss(model(**examples.inputs).logits, examples))
    assert after < edit.details["losses"][0] - 0.15


def test_pruning_leaves_the_wanted_rank_on_average():
    model = tiny_model("llama")
    edit = AdaLoRA(start_rank=6, rank=2, steps=30).fit(model, TOKENIZER, [REQUEST])
    kept = sum(int((delta.v.abs().sum(1) > 0).sum()) for delta in edit.deltas.values())
    assert kept == 2 * len(edit.deltas)


def test_adalora_keeps_its_vectors_orthogonal():
    model = tiny_model("llama")

    def distance(weight):
        edit = AdaLoRA(steps=40, orthogonality=weight, dropout=0.0).fit(model, TOKENIZER, [REQUEST])
        total = 0.0
        for delta in edit.deltas.values():
            u = delta.u / delta.u.norm(dim=0)
            total += float((u.T @ u - torch.eye(u.shape[1])).norm())
        return total / len(edit.deltas)

    assert distance(0.5) < 0.5 * distance(0.0)


def test_the_seed_decides():
    model = tiny_model("llama")
    state = torch.get_rng_state()
    one, two, other = (LoRA(steps=3, seed=s).fit(model, TOKENIZER, [REQUEST]) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.details["losses"] == two.details["losses"] != other.details["losses"]


def test_dropout_is_on_in_training_only():
    model = tiny_model("llama")
    dropped, whole = (LoRA(steps=4, dropout=d).fit(model, TOKENIZER, [REQUEST]) for d in (0.5, 0.0))
    assert dropped.details["losses"][0] == whole.details["losses"][0]  # the adapter starts at 0
    assert dropped.details["losses"][1:] != whole.details["losses"][1:]


def test_after_an_interrupted_fit_the_model_is_as_before(monkeypatch):
    model = tiny_model("llama")
    before = trace(model)
    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "_after_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            LoRA().fit(model, TOKENIZER, [REQUEST])
    assert same(trace(model), before)


def test_it_is_saved_as_factors(tmp_path):
    model = tiny_model("gpt2")
    edit = LoRA(steps=4).fit(model, TOKENIZER, [REQUEST])
    edit.save(tmp_path / "edit")
    with edit.applied(model):
        wanted = model(IDS).logits
    loaded = load_edit(tmp_path / "edit")
    assert all(isinstance(delta, LowRank) for delta in loaded.deltas.values())
    with loaded.applied(model):
        assert torch.equal(model(IDS).logits, wanted)


def test_wrong_options():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="no layer 7"):
        LoRA(layers=(7,)).fit(model, TOKENIZER, [REQUEST])
    with pytest.raises(UserError, match="start_rank"):
        AdaLoRA(start_rank=4)
    with pytest.raises(UserError, match="dropout"):
        LoRA(dropout=1.0)
    with pytest.raises(UserError, match="above 0"):
        LoRA(learning_rate=float("nan"))
    with pytest.raises(UserError, match="no query or value"):
        LoRA().fit(tiny_model("mamba2"), TOKENIZER, [REQUEST])
