import pytest
import torch

from modelwright.editing.deltas import LowRank
from modelwright.editing.edit import load_edit
from modelwright.editing.examples import make_examples, target_loss, trainable_only
from modelwright.editing.learning import Lessons
from modelwright.editing.mend import MEND, MendNetworks
from modelwright.editing.mend.editor import edit_factors, edited_weights
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
FAMILIES = ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"]
IDS = torch.arange(3, 40)[None]
NAMES = ["Freedonia", "Ruritania", "Graustark", "Syldavia", "Borduria", "Elbonia"]


def request(name, letter="Z"):
    return EditRequest("The letter of {} is\n", name, letter, paraphrases=("{} has the letter\n",))


FACTS = [request(name, letter) for name, letter in zip(NAMES, "ZSEKTM")]
QUICK = {"rank": 8, "steps": 20, "accumulate": 2, "learning_rate": 1e-3, "rate_learning_rate": 1e-3}


def untrained(model, rate=1e-2, **options):
    """A MEND whose networks are as at the start, without normalising."""
    editor = MEND(rank=8, **options)
    maps = editor._maps(model)
    shapes = [(m.name, m.weight().shape[1], m.weight().shape[0]) for m in maps]
    editor.networks = MendNetworks(shapes, rank=8, normalise=False, rate=rate)
    return editor, maps


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_change_is_the_rate_times_the_gradient(family):
    model = tiny_model(family)
    editor, maps = untrained(model)
    edit = editor.fit(model, TOKENIZER, FACTS[:1])
    examples = make_examples(model, TOKENIZER, [(FACTS[0].text, FACTS[0].target)])
    loss = target_loss(model(**examples.inputs).logits, examples)
    gradients = torch.autograd.grad(loss, [m.base.weight for m in maps])
    assert list(edit.deltas) == [f"{m.name}.weight" for m in maps]
    for delta, gradient in zip(edit.deltas.values(), gradients):
        assert isinstance(delta, LowRank)
        assert float(gradient.abs().max()) > 0
        assert torch.allclose(delta.dense(), 1e-2 * gradient, atol=1e-7)
    assert edit.details["losses"] == pytest.approx([float(loss.detach())])


def test_which_weights_are_edited():
    deep = tiny_model("llama", num_hidden_layers=5)
    names = [m.name for m in untrained(deep)[1]]
    assert names == [f"model.layers.{i}.mlp.{n}_proj" for i in (2, 3, 4) for n in ("gate", "up", "down")]
    assert [m.name for m in untrained(tiny_model("gpt2"), layers=(1,))[1]] == [
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ]


def test_maps_of_one_shape_share_a_network_with_modes_of_their_own():
    networks = MendNetworks([("a", 4, 6), ("b", 6, 4), ("c", 4, 6)], rank=3)
    assert {k: t.blocks[0].scale.shape[0] for k, t in networks.transforms.items()} == {"4x6": 2, "6x4": 1}
    assert networks._modes == [0, 0, 1]
    with torch.no_grad():
        networks.transforms["4x6"].blocks[1].shift[1] += 1.0
    networks.transforms["4x6"].normalise = networks.transforms["6x4"].normalise = False
    x, d = torch.randn(2, 4), torch.randn(2, 6)
    changes = networks([(x, d), (d, x), (x, d)])
    assert torch.equal(changes[0][1], x)
    assert torch.equal(changes[2][1], x + 1)
    assert torch.allclose(changes[2][0], 1e-4 * (d + 1))


def test_several_edits_at_once_are_the_sum_of_their_factors():
    model = tiny_model("llama")
    editor, _ = untrained(model)
    both = editor.fit(model, TOKENIZER, FACTS[:2])
    single = [editor.fit(model, TOKENIZER, [fact]) for fact in FACTS[:2]]
    for name, delta in both.deltas.items():
        assert torch.allclose(delta.dense(), sum(e.deltas[name].dense() for e in single), atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_functional_copy_is_the_edited_model(family):
    model = tiny_model(family)
    editor, maps = untrained(model, rate=-1.0)
    with trainable_only(model, [m.base.weight for m in maps]):
        factors, _ = edit_factors(model, TOKENIZER, maps, FACTS[0])
    copied = torch.func.functional_call(model, dict(edited_weights(maps, editor.networks(factors))), (IDS,)).logits
    plain = model(IDS).logits
    with editor.fit(model, TOKENIZER, FACTS[:1]).applied(model):
        assert torch.allclose(model(IDS).logits, copied, atol=1e-5)
    assert not torch.allclose(plain, copied, atol=1e-3)


def test_the_training_loss_is_the_formula():
    model = tiny_model("llama")
    editor, maps = untrained(model, rate=-1.0, edit_weight=0.3, locality_weight=2.0)
    lesson = Lessons(FACTS, ["an untouched text"]).at(1)
    assert lesson.prompt == f"{lesson.request.subject} has the letter\n"
    with trainable_only(model, [m.base.weight for m in maps]):
        found = float(editor._loss(model, TOKENIZER, maps, editor.networks, lesson).detach())
    ids = torch.tensor([TOKENIZER(lesson.elsewhere)["input_ids"]])
    asked = make_examples(model, TOKENIZER, [(lesson.prompt, lesson.request.target)])
    with torch.no_grad():
        base = model(ids).logits[0].log_softmax(-1)
        with editor.fit(model, TOKENIZER, [lesson.request]).applied(model):
            new = model(ids).logits[0].log_softmax(-1)
            nll = float(target_loss(model(**asked.inputs).logits, asked))
    divergence = float((base.exp() * (base - new)).sum(-1).mean())
    assert divergence > 1e-6
    assert found == pytest.approx(0.3 * nll + 2.0 * divergence, rel=1e-3)


def test_rows_without_gradient_do_not_enter_the_moments_and_validation_adds_none():
    model = tiny_model("llama")
    editor, maps = untrained(model)
    with trainable_only(model, [m.base.weight for m in maps]):
        factors, _ = edit_factors(model, TOKENIZER, maps, FACTS[0])
        # Of the last layer only the position that predicts the one token of the target has a gradient.
        assert [len(x) for x, _ in factors[3:]] == [1, 1, 1]
        assert all(bool((d != 0).any(1).all()) for _, d in factors)
        lesson = Lessons(FACTS).at(0)
        editor._loss(model, TOKENIZER, maps, editor.networks, lesson)
        counts = [float(t.inputs.count) for t in editor.networks.transforms.values()]
        assert counts == [0.0] * len(counts)
        editor._loss(model, TOKENIZER, maps, editor.networks, lesson, observe=True)
        assert all(float(t.inputs.count) > 0 for t in editor.networks.transforms.values())


@pytest.mark.slow
def test_training_leaves_the_model_as_it_was_and_learns():
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    editor = MEND(rank=16, steps=400, accumulate=4, learning_rate=3e-4, rate_learning_rate=3e-3, init_sign=-1)
    report = editor.train(model, TOKENIZER, FACTS)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert report["steps"] == 400
    asked = make_examples(model, TOKENIZER, [(FACTS[0].paraphrase_texts()[0], "Z")])
    with torch.no_grad():
        plain = float(target_loss(model(**asked.inputs).logits, asked))
        with editor.fit(model, TOKENIZER, FACTS[:1]).applied(model):
            edited = float(target_loss(model(**asked.inputs).logits, asked))
    assert edited < plain - 0.3


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_start(sign):
    model = tiny_model("llama")
    editor = MEND(**{**QUICK, "steps": 2, "rate_learning_rate": 1e-9, "rate": 1e-2}, init_sign=sign)
    editor.train(model, TOKENIZER, FACTS)
    assert torch.allclose(editor.networks.rates, torch.full((6,), sign * 1e-2), atol=1e-6)


class Killed(Exception):
    pass


def test_a_killed_training_ends_with_the_same_networks(tmp_path, monkeypatch):
    from modelwright.editing import learning

    model = tiny_model("llama")
    facts = FACTS + [request(f"Land {i}", "ABCDEFGHIJKL"[i]) for i in range(8)]  # one is held out
    keys = {**QUICK, "eval_every": 4, "patience": 1000}
    whole = MEND(**keys)
    report = whole.train(model, TOKENIZER, facts)

    real = learning._save
    monkeypatch.setattr(learning.time, "monotonic", iter(range(0, 10**9, 1000)).__next__)  # save at every step

    def save_and_die(folder, module, optimizer, state, *rest):
        real(folder, module, optimizer, state, *rest)
        if state["step"] == 12:
            raise Killed

    monkeypatch.setattr(learning, "_save", save_and_die)
    with pytest.raises(Killed):
        MEND(**keys).train(model, TOKENIZER, facts, checkpoint=tmp_path / "state")
    monkeypatch.setattr(learning, "_save", real)
    with pytest.raises(UserError, match="other options"):
        MEND(**{**keys, "seed": 5}).train(model, TOKENIZER, facts, checkpoint=tmp_path / "state")
    again = MEND(**keys)
    resumed = again.train(model, TOKENIZER, facts, checkpoint=tmp_path / "state")
    assert resumed["resumed_from"] == 12
    assert {**resumed, "resumed_from": 0} == report
    for name, tensor in whole.networks.state_dict().items():
        assert torch.equal(tensor, again.networks.state_dict()[name]), name


def test_it_is_saved_and_loaded(tmp_path):
    model = tiny_model("gpt2")
    editor = MEND(**QUICK)
    editor.train(model, TOKENIZER, FACTS)
    editor.save(tmp_path / "mend")
    edit = editor.fit(model, TOKENIZER, FACTS[:1])
    loaded = MEND(trained=tmp_path / "mend").fit(model, TOKENIZER, FACTS[:1])
    edit.save(tmp_path / "edit")
    with edit.applied(model):
        wanted = model(IDS).logits
    for other in (loaded, load_edit(tmp_path / "edit")):
        with other.applied(model):
            assert torch.equal(model(IDS).logits, wanted)
    with pytest.raises(UserError, match="another one"):
        MEND(trained=tmp_path / "mend").fit(tiny_model("llama"), TOKENIZER, FACTS[:1])


def test_bfloat16():
    model = tiny_model("llama").to(torch.bfloat16)
    editor = MEND(**{**QUICK, "steps": 4})
    editor.train(model, TOKENIZER, FACTS)
    with editor.fit(model, TOKENIZER, FACTS[:1]).applied(model):
        assert torch.isfinite(model(IDS).logits).all()


def test_what_is_refused(tmp_path):
    for rate in (float("nan"), -1.0):
        with pytest.raises(UserError, match="learning_rate must be above 0"):
            MEND(learning_rate=rate)
    model = tiny_model("llama")
    with pytest.raises(UserError, match="not trained"):
        MEND().fit(model, TOKENIZER, FACTS[:1])
    with pytest.raises(UserError, match="nothing to save"):
        MEND().save(tmp_path / "mend")
    with pytest.raises(UserError, match="no mend.json"):
        MEND(trained=tmp_path)
    with pytest.raises(UserError, match="at least 2"):
        MEND(**QUICK).train(model, TOKENIZER, FACTS[:1])
    with pytest.raises(UserError, match="no layer 4"):
        MEND(**QUICK, layers=(4,)).train(model, TOKENIZER, FACTS)
    with pytest.raises(UserError, match="no MLP"):
        MEND(**QUICK).train(tiny_model("mamba2"), TOKENIZER, FACTS)
    module = roles(model).layers[1].down.module
    module.weight = torch.nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        MEND(**QUICK).train(model, TOKENIZER, FACTS)
