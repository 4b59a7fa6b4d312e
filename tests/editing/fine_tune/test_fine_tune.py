import pytest
import torch

from modelwright.editing.edit import load_edit
from modelwright.editing.examples import make_examples, target_loss
from modelwright.editing.fine_tune import FTL, FTM
from modelwright.editing.fine_tune.editor import prompt_last_loss
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.tiny import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
REQUEST = EditRequest("The capital of {} is", "Freedonia", "Zenda")
SHORT = EditRequest("The letter of {} is\n", "Freedonia", "Z")  # one byte, one token
FAMILIES = ["llama", "qwen2", "mistral", "gemma", "gpt2", "gpt_neox"]


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_of(model, request, editor):
    examples = make_examples(model, TOKENIZER, [(request.text, request.target)])
    with torch.no_grad():
        return float(editor._loss(model(**editor._inputs(examples)).logits, examples))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("editor", [FTL(learning_rate=1e-2), FTM(learning_rate=1e-2)], ids=lambda e: e.name)
def test_only_one_matrix_changes_and_the_loss_is_what_was_reported(family, editor):
    model = tiny_model(family)
    before = bits(model)
    roles(model).head.weight.requires_grad_(False)
    roles(model).layers[0].mlp.train()
    edit = editor.fit(model, TOKENIZER, [REQUEST])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        n for n, p in model.named_parameters() if p is roles(model).head.weight
    ]
    assert [module for module in model.modules() if module.training] == list(roles(model).layers[0].mlp.modules())
    model.eval()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert edit.details["losses"][-1] < edit.details["losses"][0]
    assert loss_of(model, REQUEST, editor) == pytest.approx(edit.details["losses"][0], rel=1e-4)
    with edit.applied(model):
        changed = [name for name, p in model.named_parameters() if not torch.equal(before[name], p)]
        assert changed == [f"{roles(model).layers[1].down.name}.weight"]
        assert loss_of(model, REQUEST, editor) < edit.details["losses"][-1]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_both_are_the_same_on_targets_of_one_token():
    model = tiny_model("llama")
    examples = make_examples(model, TOKENIZER, [(SHORT.text, SHORT.target)] * 2)
    assert [len(t) for t in examples.targets] == [1, 1]
    logits = model(**examples.inputs).logits
    assert torch.equal(prompt_last_loss(logits, examples), target_loss(logits, examples))
    one, two = (E(learning_rate=1e-2, steps=5).fit(model, TOKENIZER, [SHORT]) for E in (FTL, FTM))
    for first, second in zip(one.deltas.values(), two.deltas.values()):
        assert torch.allclose(first.dense(), second.dense(), atol=1e-7)
    assert one.details["losses"] == pytest.approx(two.details["losses"], rel=1e-5)


def test_ft_l_reads_all_tokens_off_the_last_prompt_position():
    model = tiny_model("llama")
    examples = make_examples(model, TOKENIZER, [(REQUEST.text, REQUEST.target), ("A longer prompt here:", "yes")])
    logits = model(**examples.inputs).logits
    wanted = []
    for text, target in (("The capital of Freedonia is", " Zenda"), ("A longer prompt here:", " yes")):
        row = model(torch.tensor([TOKENIZER(text)["input_ids"]])).logits[0, -1].log_softmax(-1)
        wanted.append(-row[TOKENIZER(target)["input_ids"]].mean())
    assert torch.allclose(prompt_last_loss(logits, examples), torch.stack(wanted).mean(), atol=1e-5)
    # What follows the prompt in the batch does not matter, and is not read.
    inputs = FTL()._inputs(examples)
    assert inputs["input_ids"].shape[1] == len(TOKENIZER("The capital of Freedonia is")["input_ids"])
    assert torch.allclose(prompt_last_loss(model(**inputs).logits, examples), torch.stack(wanted).mean(), atol=1e-5)


def test_ft_m_is_the_cross_entropy_of_the_target():
    model = tiny_model("gpt2")
    pairs = [(REQUEST.text, REQUEST.target), ("A longer prompt here:", "yes")]
    examples = make_examples(model, TOKENIZER, pairs)
    wanted = []
    for text, target in pairs:
        ids = torch.tensor([TOKENIZER(f"{text} {target}")["input_ids"]])
        labels = ids.clone()
        labels[:, : len(TOKENIZER(text)["input_ids"])] = -100
        wanted.append(model(ids, labels=labels).loss)
    assert torch.allclose(target_loss(model(**examples.inputs).logits, examples), torch.stack(wanted).mean(), atol=1e-5)


@pytest.mark.parametrize("editor", [FTL, FTM])
def test_the_bound_holds_for_every_weight(editor):
    model = tiny_model("llama")
    free = editor(learning_rate=1e-2).fit(model, TOKENIZER, [REQUEST])
    bound = editor(learning_rate=1e-2, norm_constraint=3e-3).fit(model, TOKENIZER, [REQUEST])
    assert free.details["largest_change"] > 3e-3
    assert bound.details["largest_change"] == pytest.approx(3e-3, rel=1e-4)
    before = bits(model)
    with bound.applied(model):
        changes = [float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()]
    assert max(changes) <= 3e-3 * (1 + 1e-4)


def test_it_stops_once_the_loss_is_low_and_takes_no_step_below_it():
    model = tiny_model("llama")
    edit = FTM(learning_rate=5e-2, steps=200, stop_loss=5.05).fit(model, TOKENIZER, [REQUEST])
    losses = edit.details["losses"]
    assert len(losses) < 200
    assert losses[-1] < 5.05 <= min(losses[:-1])
    # The last loss was seen, not stepped on: it is the loss of the edited model.
    with edit.applied(model):
        assert loss_of(model, REQUEST, FTM()) == pytest.approx(losses[-1], rel=1e-3)
    nothing = FTM(stop_loss=100.0).fit(model, TOKENIZER, [REQUEST])
    assert nothing.details["largest_change"] == 0
    assert nothing.details["passes"] == 1


def test_no_special_token_is_part_of_a_target():
    tokenizer = byte_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    examples = make_examples(tiny_model("llama"), tokenizer, [(REQUEST.text, REQUEST.target)])
    assert examples.input_ids[0, 0] == 1
    assert not {1, 2} & set(examples.targets[0])
    assert tokenizer.decode(examples.targets[0]) == " Zenda"
    assert int(examples.input_ids[0, examples.last[0]]) == TOKENIZER("s")["input_ids"][0]


def test_many_requests_in_batches():
    model = tiny_model("llama")
    requests = [
        EditRequest("The capital of {} is", name, city) for name, city in (("A", "B"), ("Cdef", "Gh"), ("I", "J"))
    ]
    edit = FTM(learning_rate=1e-2, batch_size=2).fit(model, TOKENIZER, requests)
    assert edit.details["losses"][-1] < edit.details["losses"][0]
    whole = FTM(learning_rate=1e-2, batch_size=3, steps=1).fit(model, TOKENIZER, requests)
    assert whole.details["losses"][0] == pytest.approx(sum(loss_of(model, r, FTM()) for r in requests) / 3, rel=1e-5)


def test_bfloat16_is_trained_in_float32():
    model = tiny_model("llama").to(torch.bfloat16)
    edit = FTM(learning_rate=1e-2).fit(model, TOKENIZER, [REQUEST])
    assert edit.details["losses"][-1] < edit.details["losses"][0] - 0.1
    with edit.applied(model):
        assert next(model.parameters()).dtype == torch.bfloat16


def test_it_is_saved_and_loaded(tmp_path):
    model = tiny_model("llama")
    edit = FTL(learning_rate=1e-2).fit(model, TOKENIZER, [REQUEST])
    edit.save(tmp_path / "edit")
    ids = torch.tensor([TOKENIZER(REQUEST.text)["input_ids"]])
    with edit.applied(model):
        wanted = model(ids).logits
    with load_edit(tmp_path / "edit").applied(model):
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FTL(layer=2), "no layer 2"),
        (lambda: FTL(steps=0), "at least 1"),
        (lambda: FTM(learning_rate=0), "above 0"),
        (lambda: FTM(norm_constraint=-1.0), "above 0"),
        (lambda: FTM(learning_rate=float("nan")), "above 0"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(UserError, match=message):
        make().fit(tiny_model("llama"), TOKENIZER, [REQUEST])


@pytest.mark.parametrize("editor", [FTL, FTM])
def test_a_loss_that_is_not_finite_is_an_error_and_no_empty_edit(editor):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        editor().fit(broken, TOKENIZER, [REQUEST])


def test_what_cannot_be_edited_is_refused():
    with pytest.raises(UserError, match="no MLP"):
        FTL().fit(tiny_model("mamba2"), TOKENIZER, [REQUEST])
    quantised = tiny_model("llama")
    module = roles(quantised).layers[1].down.module
    module.weight = torch.nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        FTL().fit(quantised, TOKENIZER, [REQUEST])
    small = tiny_model("llama", vocab_size=64)
    with pytest.raises(UserError, match="another model's"):
        FTL().fit(small, TOKENIZER, [REQUEST])
    short = tiny_model("llama", max_position_embeddings=16)
    with pytest.raises(UserError, match="shorten"):
        FTL().fit(short, TOKENIZER, [REQUEST])
